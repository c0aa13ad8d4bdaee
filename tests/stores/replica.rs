//! [`Replica`]: what it answers from memory, and what it never does, over a store that counts, holds and breaks its calls.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt, future::ready, stream};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower_api_key::{
    Authenticator, KeyManager, KeyScheme, MemoryStore, NewKey, Replica, StoreError,
    clock::ManualClock,
    key::KeyHash,
    management::{ImportedKey, IssuedKey, Rotation, UserPatch},
    record::{KeyId, KeyRecord, Revision, UserId},
    store::{
        Answer, Attribution, Change, ChangeStream, Inserted, KeyRepository, KeySelection, KeyStore,
        KeysRead, Lookup, ReadOwner, ReadRow, ReplicaState, StoredKey,
    },
};

use crate::support::{
    self,
    feed::{eventually, in_sync},
    log::capture,
    scripted::status,
    unknown_key_with_id,
};

/// A read of the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    /// The page with this number, from 0.
    Page(usize),
    Under,
    Owners,
}

/// Where a read is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum At {
    Start,
    End,
}

/// A store whose calls are counted, held and broken by the test. Clones are the same store.
pub(crate) struct Gated<S>(Arc<Inner<S>>);

impl<S> Clone for Gated<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Inner<S> {
    store: S,
    resolved: AtomicUsize,
    pages: AtomicUsize,
    reads: AtomicUsize,
    hold: watch::Sender<Option<(Read, At)>>,
    held: AtomicUsize,
    read_fault: Mutex<Option<StoreError>>,
    resolve_fault: Mutex<Option<StoreError>>,
    /// The lookup id that no read can contain.
    poison: Mutex<Option<String>>,
    /// The reads of a standby that has stopped: what was returned last for the same page, id or owner.
    frozen: AtomicBool,
    pages_read: Mutex<HashMap<Option<KeyId>, Vec<ReadRow>>>,
    ids_read: Mutex<HashMap<String, (Vec<ReadRow>, Revision)>>,
    owners_read: Mutex<HashMap<UserId, ReadOwner>>,
    /// Events of keys and owners that are not reported.
    is_mute: AtomicBool,
    /// Nothing is reported.
    is_cut_off: AtomicBool,
    injected: Mutex<Vec<mpsc::UnboundedSender<Option<Change>>>>,
    has_feed: bool,
    can_read: bool,
}

impl<S: KeyStore> Gated<S> {
    pub(crate) fn new(store: S) -> Self {
        Self::with(store, true, true)
    }

    fn with(store: S, has_feed: bool, can_read: bool) -> Self {
        Self(Arc::new(Inner {
            store,
            resolved: AtomicUsize::default(),
            pages: AtomicUsize::default(),
            reads: AtomicUsize::default(),
            hold: watch::Sender::new(None),
            held: AtomicUsize::default(),
            read_fault: Mutex::default(),
            resolve_fault: Mutex::default(),
            poison: Mutex::default(),
            frozen: AtomicBool::default(),
            pages_read: Mutex::default(),
            ids_read: Mutex::default(),
            owners_read: Mutex::default(),
            is_mute: AtomicBool::default(),
            is_cut_off: AtomicBool::default(),
            injected: Mutex::default(),
            has_feed,
            can_read,
        }))
    }

    /// Number of look-ups since this was last called.
    pub(crate) fn take_resolved(&self) -> usize {
        self.0.resolved.swap(0, SeqCst)
    }

    fn hold(&self, read: Read, at: At) {
        self.0.hold.send_replace(Some((read, at)));
    }

    fn release(&self) {
        self.0.hold.send_replace(None);
    }

    async fn is_held(&self) {
        eventually("a read to be held", async || self.0.held.load(SeqCst) > 0).await;
    }

    fn fail_reads(&self, fault: Option<StoreError>) {
        *self.0.read_fault.lock().unwrap() = fault;
    }

    fn fail_look_ups(&self, fault: Option<StoreError>) {
        *self.0.resolve_fault.lock().unwrap() = fault;
    }

    /// From now on, each read returns what the last one of the same subject returned.
    fn freeze(&self, frozen: bool) {
        self.0.frozen.store(frozen, SeqCst);
    }

    fn mute(&self, is_mute: bool) {
        self.0.is_mute.store(is_mute, SeqCst);
    }

    fn cut_off(&self, is_cut_off: bool) {
        self.0.is_cut_off.store(is_cut_off, SeqCst);
    }

    fn inject(&self, change: Option<Change>) {
        let injected = self.0.injected.lock().unwrap();
        let sent = injected.iter().filter(|to| to.send(change.clone()).is_ok()).count();
        assert!(sent > 0);
    }

    async fn gate(&self, read: Read, at: At) {
        if *self.0.hold.borrow() == Some((read, at)) {
            self.0.held.fetch_add(1, SeqCst);
            let _ = self.0.hold.subscribe().wait_for(Option::is_none).await;
            self.0.held.fetch_sub(1, SeqCst);
        }
    }

    fn may_read(&self) -> Result<(), StoreError> {
        self.0.reads.fetch_add(1, SeqCst);
        self.0.read_fault.lock().unwrap().clone().map_or(Ok(()), Err)
    }
}

impl<S: KeyStore> KeyStore for Gated<S> {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.0.resolved.fetch_add(1, SeqCst);
        if let Some(fault) = self.0.resolve_fault.lock().unwrap().clone() {
            return Err(fault);
        }
        self.0.store.resolve(lookup).await
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        if !self.0.has_feed {
            return ChangeStream::none();
        }
        let (sender, injected) = mpsc::unbounded_channel();
        self.0.injected.lock().unwrap().push(sender);
        let this = self.clone();
        let of_store = self.0.store.changes(since).map(Some).filter(move |change| {
            let is_sync = matches!(change, Some(Change::Synced(_) | Change::Status(_)));
            let is_mute = this.0.is_mute.load(SeqCst) && !is_sync;
            ready(!is_mute && !this.0.is_cut_off.load(SeqCst))
        });
        let all = stream::select(of_store, UnboundedReceiverStream::new(injected)).boxed();
        let all = all.take_while(|change: &Option<Change>| ready(change.is_some()));
        ChangeStream::new(all.filter_map(ready))
    }

    fn can_read_keys(&self) -> bool {
        self.0.can_read && self.0.store.can_read_keys()
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        let kind = match selection {
            KeySelection::Page { .. } => Read::Page(self.0.pages.fetch_add(1, SeqCst)),
            _ => Read::Under,
        };
        self.gate(kind, At::Start).await;
        self.may_read()?;
        if let (KeySelection::Under(ids), Some(poison)) =
            (selection, &*self.0.poison.lock().unwrap())
            && ids.contains(poison)
        {
            return Err(StoreError::rejected("an id that the store rejects"));
        }
        let mut read = self.0.store.read_keys(selection).await?;
        let is_frozen = self.0.frozen.load(SeqCst);
        match selection {
            KeySelection::Page { after, .. } => {
                let mut pages = self.0.pages_read.lock().unwrap();
                match pages.get(after) {
                    Some(rows) if is_frozen => read.rows.clone_from(rows),
                    _ => drop(pages.insert(after.clone(), read.rows.clone())),
                }
            }
            KeySelection::Under(ids) => {
                let mut known = self.0.ids_read.lock().unwrap();
                for id in ids {
                    let is_under = |row: &ReadRow| row.lookup_ids.contains(id);
                    let latest = read.latest.iter_mut().find(|(of, _)| of == id).unwrap();
                    match known.get(id) {
                        Some((rows, revision)) if is_frozen => {
                            read.rows.retain(|row| !is_under(row));
                            read.rows.extend(rows.iter().cloned());
                            latest.1 = *revision;
                        }
                        _ => {
                            let rows = read.rows.iter().filter(|row| is_under(row)).cloned();
                            known.insert(id.clone(), (rows.collect(), latest.1));
                        }
                    }
                }
            }
            _ => unreachable!(),
        }
        self.gate(kind, At::End).await;
        Ok(read)
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        self.gate(Read::Owners, At::Start).await;
        self.may_read()?;
        let mut read = self.0.store.read_owners(owners).await?;
        {
            let mut known = self.0.owners_read.lock().unwrap();
            for owner in &mut read {
                match known.get(&owner.user.id) {
                    Some(old) if self.0.frozen.load(SeqCst) => owner.clone_from(old),
                    _ => drop(known.insert(owner.user.id.clone(), owner.clone())),
                }
            }
        }
        self.gate(Read::Owners, At::End).await;
        Ok(read)
    }
}

/// A node that caches nothing itself, over a replica.
pub(crate) struct Node<S> {
    pub(crate) store: Gated<S>,
    pub(crate) replica: Replica<Gated<S>>,
    pub(crate) node: Authenticator,
    clock: Arc<ManualClock>,
}

fn scheme() -> KeyScheme {
    support::old_and_new_keys().upgrade_hashes().pepper("sixteen bytes or more").build().unwrap()
}

impl<S: KeyStore> Node<S> {
    pub(crate) fn new(store: Gated<S>) -> Self {
        Self::at(store, Arc::new(ManualClock::at(SystemTime::now())))
    }

    fn at(store: Gated<S>, clock: Arc<ManualClock>) -> Self {
        let replica = Replica::new(store.clone()).unwrap();
        let node =
            Authenticator::builder(replica.clone()).scheme(scheme()).cache_capacity(0).build();
        Self { store, replica, node, clock }
    }

    /// With a manual clock in node, replica and store.
    fn timed(store: Gated<S>, clock: Arc<ManualClock>) -> Self {
        let replica = Replica::builder(store.clone()).clock(clock.clone()).build().unwrap();
        let node = Authenticator::builder(replica.clone()).scheme(scheme()).cache_capacity(0);
        Self { node: node.clock(clock.clone()).build(), store, replica, clock }
    }

    /// Waits until the replica is loaded, and the node has received every change.
    pub(crate) async fn loaded(self) -> Self {
        assert_eq!(self.replica.loaded().await.state, ReplicaState::Loaded);
        let _ = self.node.authenticate(&support::unknown_key()).await;
        eventually("a sync", async || self.node.health().last_sync.is_some()).await;
        self.store.take_resolved();
        self
    }

    /// The status, and the number of look-ups in the store below.
    pub(crate) async fn ask(&self, key: &str) -> (u16, usize) {
        self.store.take_resolved();
        let status = status(&self.node, key).await;
        (status, self.store.take_resolved())
    }

    /// Waits until the key is answered from memory. It has to have this status all the time.
    pub(crate) async fn settles(&self, key: &str, status: u16) {
        eventually("an answer from memory", async || {
            let (actual, asked) = self.ask(key).await;
            assert_eq!(actual, status);
            asked == 0
        })
        .await;
    }

    /// The same, where memory need not have an answer.
    pub(crate) async fn becomes_without_memory(&self, key: &str, before: u16, after: u16) {
        eventually("another status", async || {
            let actual = self.ask(key).await.0;
            assert!(actual == before || actual == after, "{actual}");
            actual == after
        })
        .await;
    }

    /// Waits until the key has this status. Until then it has `before`.
    pub(crate) async fn becomes(&self, key: &str, before: u16, after: u16) {
        self.becomes_without_memory(key, before, after).await;
        self.settles(key, after).await;
    }
}

struct Keys {
    memory: MemoryStore,
    manager: KeyManager<MemoryStore>,
    issued: Vec<IssuedKey>,
}

/// Keys of an owner each.
async fn keys(count: usize) -> Keys {
    keys_in(MemoryStore::new(), count).await
}

async fn keys_in(memory: MemoryStore, count: usize) -> Keys {
    let manager = KeyManager::new(memory.clone()).scheme(scheme());
    let mut keys = Keys { memory, manager, issued: Vec::new() };
    keys.add(count).await;
    keys
}

impl Keys {
    async fn add(&mut self, count: usize) {
        for _ in 0..count {
            let email = format!("{}@example.com", self.issued.len());
            let owner = self.manager.create_user(&email, "user").await.unwrap().id;
            self.issued.push(self.manager.issue(NewKey::new(owner, "k")).await.unwrap());
        }
    }

    fn gated(&self) -> Gated<MemoryStore> {
        Gated::new(self.memory.clone())
    }

    fn secret(&self, n: usize) -> &str {
        self.issued[n].expose_secret()
    }

    /// Changes the last key, so that the feed reports a sync at once, and waits for it.
    async fn sync<S: KeyStore>(&self, node: &Node<S>) {
        let last = self.issued.last().unwrap().record();
        node.clock.advance(Duration::from_millis(1));
        support::edit_key(&self.memory, last, None).await.unwrap().unwrap();
        is_in_sync(node).await;
    }

    /// Lets the time pass after which nodes forget minimum revisions, which they do with the next change.
    async fn two_hours_later<S: KeyStore>(&self, node: &Node<S>) {
        self.sync(node).await;
        // What has changed is read again.
        tokio::time::sleep(Duration::from_millis(20)).await;
        node.clock.advance(Duration::from_secs(2 * 3600));
        self.sync(node).await;
        self.sync(node).await;
    }

    async fn revoke(&self, n: usize) {
        self.manager.revoke(&self.issued[n].record().id).await.unwrap();
    }
}

#[tokio::test]
async fn known_and_unknown_keys_cause_no_query_once_loaded() {
    let keys = keys(3).await;
    let node = Node::new(keys.gated()).loaded().await;
    for n in 0..200 {
        let key = unknown_key_with_id(&format!("{n:010}"));
        assert_eq!(node.ask(&key).await, (401, 0));
    }
    for n in 0..3 {
        assert_eq!(node.ask(keys.secret(n)).await, (200, 0));
        assert_eq!(node.ask(&support::with_wrong_secret(keys.secret(n))).await, (401, 0));
    }
    let status = node.node.health().replica.unwrap();
    assert_eq!((status.state, status.keys), (ReplicaState::Loaded, 3));
    assert!(status.bytes > 0 && status.lag.is_some());
    let shown =
        format!("{:?} {:?} {status:?}", node.node, Replica::new(keys.memory.clone()).unwrap());
    for key in &keys.issued {
        assert!(!shown.contains(key.expose_secret()));
        let stored = keys.memory.find_key(&key.record().id).await.unwrap().unwrap();
        assert!(!shown.contains(&stored.hash().expose_hash()));
    }
}

/// What happens to a key during the load.
#[derive(Debug, Clone, Copy)]
enum Event {
    Revoke,
    DeactivateOwner,
    Delete,
    Rotate,
}

impl Event {
    async fn happen(self, keys: &Keys, n: usize) {
        let record = keys.issued[n].record();
        match self {
            Self::Revoke => keys.revoke(n).await,
            Self::DeactivateOwner => {
                keys.manager.deactivate_user(&record.user.id).await.unwrap();
            }
            Self::Delete => keys.manager.delete(&record.id).await.unwrap(),
            Self::Rotate => {
                let rotation = Rotation::default().grace(Duration::ZERO);
                let rotated = keys.manager.rotate(&record.id, rotation).await.unwrap();
                assert_ne!(rotated.expose_secret(), keys.secret(n));
            }
        }
    }
}

/// Three pages. The first six keys of each have secrets that the test knows.
async fn three_pages(memory: MemoryStore) -> Keys {
    let mut keys = keys_in(memory, 0).await;
    let filler = keys.manager.create_user("filler@example.com", "user").await.unwrap();
    for fillers in [994, 994, 100] {
        keys.add(6).await;
        let of = |n: usize| {
            let mut id = format!("{:010}", keys.issued.len() * 10_000 + n);
            id.truncate(10);
            StoredKey::new(KeyRecord::new(0, id, filler.clone()), KeyHash::sha256("x"))
        };
        let fillers: Vec<_> = (0..fillers).map(of).collect();
        let inserted = keys.memory.insert_keys(&fillers, &Attribution::default()).await.unwrap();
        assert!(inserted.iter().all(|it| matches!(it, Inserted::Stored)), "{inserted:?}");
    }
    keys
}

/// When a key that was changed during a page is presented.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Asked {
    AtOnce,
    /// When the nodes have forgotten the minimum revision, so that the replica alone decides.
    AfterTwoHours,
    /// The feed was cut off, and has reported a reset.
    AfterAReset,
}

/// Changes a key of the page before, of the same, and of the one after each page, while the page is held before or after
/// it is read.
async fn during_each_page(event: Event, asked: Asked) {
    let clock = manual();
    let keys = three_pages(MemoryStore::with_clock(clock.clone())).await;
    let mut used = [0; 3];
    for at in [At::Start, At::End] {
        for page in 0..3 {
            let store = keys.gated();
            store.hold(Read::Page(page), at);
            let node = Node::timed(store.clone(), clock.clone());
            let _ = node.node.authenticate(&support::unknown_key()).await;
            store.is_held().await;
            let victims: Vec<_> = [page.checked_sub(1), Some(page), Some(page + 1)]
                .into_iter()
                .flatten()
                .filter(|page| *page < 3)
                .map(|page| {
                    used[page] += 1;
                    page * 6 + used[page] - 1
                })
                .collect();
            store.cut_off(asked == Asked::AfterAReset);
            for n in &victims {
                event.happen(&keys, *n).await;
            }
            if asked == Asked::AfterAReset {
                store.cut_off(false);
                store.inject(Some(Change::Reset));
            }
            keys.sync(&node).await;
            store.release();
            assert_eq!(node.replica.loaded().await.state, ReplicaState::Loaded);
            if asked == Asked::AfterTwoHours {
                keys.two_hours_later(&node).await;
            }
            for n in victims {
                for _ in 0..5 {
                    let status = node.ask(keys.secret(n)).await.0;
                    assert_eq!(status, 401, "{event:?} of {n}, page {page} held at {at:?}");
                }
                node.settles(keys.secret(n), 401).await;
            }
        }
    }
    let node = Node::timed(keys.gated(), clock).loaded().await;
    node.settles(keys.secret(5), 200).await;
    assert!(node.replica.status().keys > 2_000);
}

#[tokio::test]
async fn a_key_that_is_revoked_during_any_page_is_denied() {
    for asked in [Asked::AtOnce, Asked::AfterTwoHours, Asked::AfterAReset] {
        during_each_page(Event::Revoke, asked).await;
    }
}

#[tokio::test]
async fn a_key_whose_owner_is_deactivated_during_any_page_is_denied() {
    for asked in [Asked::AtOnce, Asked::AfterTwoHours, Asked::AfterAReset] {
        during_each_page(Event::DeactivateOwner, asked).await;
    }
}

#[tokio::test]
async fn a_key_that_is_deleted_during_any_page_is_denied() {
    for asked in [Asked::AtOnce, Asked::AfterTwoHours, Asked::AfterAReset] {
        during_each_page(Event::Delete, asked).await;
    }
}

#[tokio::test]
async fn a_secret_that_is_replaced_during_any_page_is_denied() {
    for asked in [Asked::AtOnce, Asked::AfterTwoHours, Asked::AfterAReset] {
        during_each_page(Event::Rotate, asked).await;
    }
}

#[tokio::test]
async fn a_key_that_is_issued_during_any_page_is_accepted() {
    for page in 0..3 {
        for at in [At::Start, At::End] {
            let mut keys = three_pages(MemoryStore::new()).await;
            let node = Node::new(keys.gated());
            node.store.hold(Read::Page(page), at);
            let _ = node.node.authenticate(&support::unknown_key()).await;
            node.store.is_held().await;
            keys.add(1).await;
            node.store.release();
            let node = node.loaded().await;
            in_sync(&node.node).await;
            node.settles(keys.secret(18), 200).await;
        }
    }
}

#[tokio::test]
async fn a_read_from_before_a_change_does_not_replace_it() {
    for at in [At::Start, At::End] {
        let keys = keys(3).await;
        let node = Node::new(keys.gated()).loaded().await;
        node.store.hold(Read::Under, at);
        let edit = support::edit_key(&keys.memory, keys.issued[0].record(), None).await.unwrap();
        assert!(edit.is_some());
        node.store.is_held().await;
        keys.revoke(0).await;
        keys.manager
            .rotate(&keys.issued[1].record().id, Rotation::default().grace(Duration::ZERO))
            .await
            .unwrap();
        in_sync(&node.node).await;
        assert_eq!(node.ask(keys.secret(0)).await, (401, 1));
        node.store.release();
        for _ in 0..100 {
            assert_eq!(node.ask(keys.secret(0)).await.0, 401);
            assert_eq!(node.ask(keys.secret(1)).await.0, 401);
            tokio::task::yield_now().await;
        }
        node.settles(keys.secret(0), 401).await;
        node.settles(keys.secret(1), 401).await;
        assert_eq!(node.ask(keys.secret(2)).await, (200, 0));

        // The same for the owner.
        let owner = &keys.issued[2].record().user.id;
        node.store.hold(Read::Owners, at);
        keys.manager.update_user(owner, &UserPatch::default().role("x")).await.unwrap();
        node.store.is_held().await;
        keys.manager.deactivate_user(owner).await.unwrap();
        in_sync(&node.node).await;
        assert_eq!(node.ask(keys.secret(2)).await, (401, 1));
        node.store.release();
        for _ in 0..100 {
            assert_eq!(node.ask(keys.secret(2)).await.0, 401);
            tokio::task::yield_now().await;
        }
        node.settles(keys.secret(2), 401).await;
        keys.manager.reactivate_user(owner).await.unwrap();
        node.becomes(keys.secret(2), 401, 200).await;
    }
}

#[tokio::test]
async fn reads_of_a_standby_that_lags_behind_are_not_served() {
    for is_asked_late in [false, true] {
        let clock = manual();
        let keys = keys_in(MemoryStore::with_clock(clock.clone()), 4).await;
        let node = Node::timed(keys.gated(), clock).loaded().await;
        // These reads are what the standby goes on to return.
        for n in 0..2 {
            support::edit_key(&keys.memory, keys.issued[n].record(), None).await.unwrap().unwrap();
        }
        let owner = &keys.issued[1].record().user.id;
        let patch = UserPatch::default().role("x");
        keys.manager.update_user(owner, &patch).await.unwrap();
        keys.sync(&node).await;
        node.settles(keys.secret(0), 200).await;
        node.settles(keys.secret(1), 200).await;
        node.store.freeze(true);
        keys.revoke(0).await;
        keys.manager.deactivate_user(owner).await.unwrap();
        keys.sync(&node).await;
        if is_asked_late {
            tokio::time::sleep(Duration::from_millis(300)).await;
            keys.two_hours_later(&node).await;
        }
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_millis(300) {
            assert_eq!(node.ask(keys.secret(0)).await, (401, 1));
            assert_eq!(node.ask(keys.secret(1)).await, (401, 1));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(node.ask(keys.secret(2)).await, (200, 0), "the others are not affected");
        node.store.freeze(false);
        node.settles(keys.secret(0), 401).await;
        node.settles(keys.secret(1), 401).await;
    }
}

#[tokio::test]
async fn pages_of_a_standby_that_lags_behind_are_not_served_to_a_node_that_knows_better() {
    let keys = keys(2).await;
    let node = Node::new(keys.gated()).loaded().await;
    node.store.freeze(true);
    node.store.mute(true);
    keys.revoke(0).await;
    node.store.mute(false);
    // Both the replica and the node begin with the changes of the last hour.
    let node = Node::new(node.store);
    node.replica.loaded().await;
    let _ = node.node.authenticate(&support::unknown_key()).await;
    in_sync(&node.node).await;
    for _ in 0..20 {
        assert_eq!(node.ask(keys.secret(0)).await.0, 401);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(node.ask(keys.secret(1)).await.0, 200);
}

#[tokio::test]
async fn after_a_reset_everything_is_loaded_again() {
    let keys = keys(2).await;
    let node = Node::new(keys.gated()).loaded().await;
    for ends in [false, true] {
        let n = usize::from(ends);
        node.store.mute(true);
        keys.revoke(n).await;
        in_sync(&node.node).await;
        assert_eq!(node.ask(keys.secret(n)).await, (200, 0), "the event is missing");
        // The reload does not get far: what was in memory serves nothing.
        node.store.fail_reads(Some(StoreError::unavailable("down")));
        node.store.mute(false);
        node.store.inject((!ends).then_some(Change::Reset));
        eventually("the reset", async || node.replica.status().state == ReplicaState::Loading)
            .await;
        for _ in 0..20 {
            assert_eq!(node.ask(keys.secret(n)).await, (401, 1));
        }
        node.store.fail_reads(None);
        node.replica.loaded().await;
        node.settles(keys.secret(n), 401).await;
    }
}

#[tokio::test]
async fn a_reset_in_the_middle_of_the_load_begins_it_again() {
    let keys = three_pages(MemoryStore::new()).await;
    for at in [At::Start, At::End] {
        let node = Node::new(keys.gated());
        let n = if at == At::Start { 0 } else { 6 };
        node.store.hold(Read::Page(1), at);
        let _ = node.node.authenticate(&support::unknown_key()).await;
        node.store.is_held().await;
        node.store.mute(true);
        keys.revoke(n).await;
        node.store.mute(false);
        node.store.inject(Some(Change::Reset));
        in_sync(&node.node).await;
        node.store.release();
        let node = node.loaded().await;
        for _ in 0..20 {
            assert_eq!(node.ask(keys.secret(n)).await.0, 401);
        }
        assert_eq!(node.ask(keys.secret(12)).await, (200, 0));
    }
}

fn manual() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(SystemTime::now()))
}

#[tokio::test]
async fn without_a_sync_the_store_is_asked_and_while_it_fails_only_valid_keys_are_served() {
    let clock = manual();
    let keys = keys_in(MemoryStore::with_clock(clock.clone()), 3).await;
    let node = Node::timed(keys.gated(), clock).loaded().await;
    keys.revoke(1).await;
    in_sync_by(&node).await;
    node.settles(keys.secret(1), 401).await;
    node.store.cut_off(true);
    let down = || node.store.fail_look_ups(Some(StoreError::unavailable("down")));
    let unknown = unknown_key_with_id("1234567890");
    down();
    // Within max_staleness no query is needed.
    node.clock.advance(Duration::from_secs(29));
    assert_eq!(node.ask(keys.secret(0)).await, (200, 0));
    assert_eq!(node.ask(keys.secret(1)).await, (401, 0));
    assert_eq!(node.ask(&unknown).await, (401, 0));
    assert!(!node.node.health().is_store_failing, "it was not asked");
    node.clock.advance(Duration::from_secs(2));
    assert_eq!(node.ask(keys.secret(0)).await, (200, 1));
    assert!(node.node.health().is_store_failing, "the answer is in place of the store's");
    assert_eq!(node.ask(keys.secret(1)).await, (503, 1));
    assert_eq!(node.ask(&unknown).await, (503, 1));
    node.store.fail_look_ups(None);
    assert_eq!(node.ask(keys.secret(0)).await, (200, 1));
    assert_eq!(node.ask(keys.secret(1)).await, (401, 1));
    assert_eq!(node.ask(&unknown).await, (401, 1));
    down();
    node.clock.advance(Duration::from_secs(58));
    assert_eq!(node.ask(keys.secret(0)).await, (200, 1));
    node.clock.advance(Duration::from_secs(2));
    assert_eq!(node.ask(keys.secret(0)).await, (503, 1));
    // A revoke that came meanwhile arrives with the next sync.
    keys.revoke(0).await;
    node.store.fail_look_ups(None);
    node.store.cut_off(false);
    node.store.inject(Some(Change::Reset));
    node.replica.loaded().await;
    in_sync_by(&node).await;
    node.settles(keys.secret(0), 401).await;
    node.settles(keys.secret(2), 200).await;
}

/// Waits for a sync by a manual clock.
async fn in_sync_by<S: KeyStore>(node: &Node<S>) {
    node.clock.advance(Duration::from_millis(1));
    is_in_sync(node).await;
}

async fn is_in_sync<S: KeyStore>(node: &Node<S>) {
    eventually("a sync", async || {
        node.node.health().last_sync.is_some_and(|age| age < Duration::from_millis(1))
    })
    .await;
}

#[tokio::test]
async fn a_key_is_invalidated_until_it_is_read_again_and_for_good() {
    let clock = manual();
    let keys = keys_in(MemoryStore::with_clock(clock.clone()), 3).await;
    let node = Node::timed(keys.gated(), clock).loaded().await;
    node.settles(keys.secret(0), 200).await;
    node.store.mute(true);
    keys.revoke(0).await;
    keys.revoke(1).await;
    in_sync_by(&node).await;
    assert_eq!(node.ask(keys.secret(0)).await, (200, 0));
    assert_eq!(node.ask(keys.secret(1)).await, (200, 0));
    node.node.invalidate(&keys.issued[0].record().prefix);
    node.node.invalidate(&keys.issued[1].record().prefix);
    assert_eq!(node.ask(keys.secret(0)).await.0, 401);
    // Longer than the node keeps the minimum revision, without a look-up.
    node.store.mute(false);
    node.clock.advance(Duration::from_secs(2 * 3600));
    in_sync_by(&node).await;
    keys.revoke(2).await;
    node.becomes(keys.secret(2), 200, 401).await;
    assert_eq!(node.ask(keys.secret(1)).await.0, 401);
    node.settles(keys.secret(0), 401).await;
}

#[test]
fn a_runtime_that_ends_takes_what_was_in_memory_with_it() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let (node, keys) = first.block_on(async {
        let keys = keys(2).await;
        (Node::new(keys.gated()).loaded().await, keys)
    });
    drop(first);
    runtime().block_on(async {
        // The event is older than what a new stream reports.
        keys.revoke(0).await;
        node.store.mute(true);
        let _ = node.node.authenticate(keys.secret(1)).await;
        in_sync(&node.node).await;
        node.replica.loaded().await;
        for _ in 0..20 {
            assert_eq!(node.ask(keys.secret(0)).await.0, 401);
        }
        node.settles(keys.secret(1), 200).await;
    });
}

#[tokio::test]
async fn too_many_keys_turn_the_replica_off_with_one_warning() {
    let (log, _guard) = capture();
    let warnings = || log.text().lines().filter(|line| line.contains("is turned off")).count();
    for is_later in [false, true] {
        log.take();
        let mut keys = keys(if is_later { 3 } else { 4 }).await;
        let store = keys.gated();
        let replica = Replica::builder(store.clone()).max_keys(3).build().unwrap();
        let node =
            Authenticator::builder(replica.clone()).scheme(scheme()).cache_capacity(0).build();
        if is_later {
            assert_eq!(replica.loaded().await.state, ReplicaState::Loaded);
            assert!(node.authenticate(keys.secret(0)).await.is_ok());
            keys.add(1).await;
        }
        eventually("too many", async || {
            let _ = node.authenticate(keys.secret(0)).await;
            replica.status().state == ReplicaState::TooManyKeys
        })
        .await;
        assert_eq!(replica.loaded().await.keys, 0);
        store.inject(Some(Change::Reset));
        in_sync(&node).await;
        keys.revoke(1).await;
        in_sync(&node).await;
        store.take_resolved();
        for (n, expected) in [(0, 200), (1, 401), (2, 200), (3, 200)] {
            assert_eq!(status(&node, keys.secret(n)).await, expected);
        }
        assert_eq!(store.take_resolved(), 4);
        assert_eq!((warnings(), replica.status().state), (1, ReplicaState::TooManyKeys));
    }
}

#[test]
fn a_store_without_the_ability_or_a_feed_is_an_error_and_no_runtime_is_needed() {
    let memory = MemoryStore::new;
    let error = Replica::new(Gated::with(memory(), true, false)).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("can't read all keys"), "{error}");
    let error = Replica::new(Gated::with(memory(), false, true)).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("does not report every change"), "{error}");
    let replica = Replica::new(memory()).unwrap();
    assert_eq!(replica.status().state, ReplicaState::Loading);
    let postgres = tower_api_key::PostgresStore::new("postgres://app@localhost/none").unwrap();
    assert!(Replica::new(postgres).is_ok());
    assert!(Replica::new(tower_api_key::SqliteStore::in_memory().unwrap()).is_ok());
}

#[tokio::test]
async fn a_store_that_is_away_is_loaded_when_it_is_back() {
    let keys = three_pages(MemoryStore::new()).await;
    let (log, _guard) = capture();
    let node = Node::new(keys.gated());
    node.store.fail_reads(Some(StoreError::unavailable("away")));
    for _ in 0..10 {
        assert_eq!(node.ask(keys.secret(0)).await, (200, 1));
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    let tries = node.store.0.reads.load(SeqCst);
    assert!((2..=5).contains(&tries), "{tries} reads in 400 ms: 50, 100, 200 ms apart");
    let lines = log.text().lines().filter(|line| line.contains("can't be loaded")).count();
    assert_eq!(lines, 1);
    // It goes away again in the middle.
    let pages = node.store.0.pages.load(SeqCst);
    node.store.hold(Read::Page(pages + 1), At::Start);
    node.store.fail_reads(None);
    node.store.is_held().await;
    node.store.fail_reads(Some(StoreError::unavailable("away")));
    node.store.release();
    keys.revoke(0).await;
    in_sync(&node.node).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(node.ask(keys.secret(0)).await, (401, 1));
    node.store.fail_reads(None);
    let node = node.loaded().await;
    node.settles(keys.secret(0), 401).await;
    assert_eq!(node.ask(keys.secret(7)).await, (200, 0));
    assert_eq!(node.replica.status().keys, 18 + 994 + 994 + 100);
}

#[tokio::test]
async fn one_id_that_the_store_rejects_does_not_keep_the_others_from_being_read() {
    let keys = keys(20).await;
    let node = Node::new(keys.gated()).loaded().await;
    *node.store.0.poison.lock().unwrap() = Some(keys.issued[5].record().prefix.clone());
    node.store.hold(Read::Under, At::Start);
    for n in 0..20 {
        keys.revoke(n).await;
    }
    in_sync(&node.node).await;
    node.store.release();
    for n in (0..20).filter(|n| *n != 5) {
        node.settles(keys.secret(n), 401).await;
    }
    assert_eq!(node.ask(keys.secret(5)).await, (401, 1));
}

#[tokio::test]
async fn a_bcrypt_key_is_looked_up_below_until_its_fast_hash_is_stored() {
    let memory = support::store_of(["old-key-".to_owned()], 4).await;
    let node = Node::new(Gated::new(memory)).loaded().await;
    assert_eq!(node.ask("old-key--of-mine").await, (200, 1));
    node.settles("old-key--of-mine", 200).await;
    assert_eq!(node.ask("old-key--of-yours").await, (401, 0));
}

#[tokio::test]
async fn the_previous_secret_is_accepted_from_memory_until_its_grace_period_ends() {
    for is_legacy in [false, true] {
        let clock = manual();
        let mut keys = keys_in(MemoryStore::with_clock(clock.clone()), 1).await;
        keys.manager = keys.manager.clone().clock(clock.clone());
        let (id, old) = if is_legacy {
            let owner = keys.issued[0].record().user.id.clone();
            let old = "legacy-key-of-mine";
            let key = ImportedKey::new(
                NewKey::new(owner, "k"),
                "legacy-k",
                KeyHash::bcrypt(old, 4).unwrap(),
            );
            let imported = keys.manager.import([key]).await.unwrap();
            let found = keys.memory.list_keys(&Default::default()).await.unwrap().keys;
            assert_eq!((imported.len(), found.len()), (1, 2));
            (found[1].id.clone(), old.to_owned())
        } else {
            (keys.issued[0].record().id.clone(), keys.secret(0).to_owned())
        };
        let node = Node::timed(keys.gated(), clock).loaded().await;
        node.settles(&old, 200).await;
        let rotation = Rotation::default().grace(Duration::from_secs(3600));
        let new = keys.manager.rotate(&id, rotation).await.unwrap();
        in_sync_by(&node).await;
        node.settles(&old, 200).await;
        node.settles(new.expose_secret(), 200).await;
        // The same after a load.
        let later = Node::timed(keys.gated(), node.clock.clone()).loaded().await;
        for node in [&node, &later] {
            node.settles(&old, 200).await;
            node.settles(new.expose_secret(), 200).await;
        }
        node.clock.advance(Duration::from_secs(3601));
        for node in [&node, &later] {
            in_sync_by(node).await;
            node.settles(&old, 401).await;
            node.settles(new.expose_secret(), 200).await;
        }
    }
}

#[tokio::test]
async fn keys_that_share_a_lookup_id_are_each_tried_up_to_eight() {
    let memory = MemoryStore::new();
    let user = memory.insert_user("a@example.com", "user", &Attribution::default()).await.unwrap();
    let add = async |n: usize| {
        let hash = KeyHash::bcrypt(&format!("sk-proj-{n}"), 4).unwrap();
        let key = StoredKey::new(KeyRecord::new(0, "sk-proj-", user.clone()), hash);
        memory.insert_key(&key, &Attribution::default()).await.unwrap();
    };
    add(0).await;
    add(1).await;
    let node = Node::new(Gated::new(memory.clone())).loaded().await;
    for n in 0..2 {
        node.settles(&format!("sk-proj-{n}"), 200).await;
    }
    assert_eq!(node.ask("sk-proj-2").await, (401, 0));
    for n in 2..9 {
        add(n).await;
    }
    in_sync(&node.node).await;
    let late = Node::new(Gated::new(memory.clone())).loaded().await;
    for node in [&node, &late] {
        for n in 0..8 {
            node.settles(&format!("sk-proj-{n}"), 200).await;
        }
        // It may be the ninth key.
        assert_eq!(node.ask("sk-proj-8").await.0, 500);
        assert_eq!(node.ask("sk-proj-9").await.0, 500);
    }
    let revoked = memory.list_keys(&Default::default()).await.unwrap().keys[0].id.clone();
    memory.delete_key(&revoked, &Attribution::default()).await.unwrap().unwrap();
    for node in [&node, &late] {
        in_sync(&node.node).await;
        node.settles("sk-proj-8", 200).await;
        node.settles("sk-proj-0", 401).await;
        assert_eq!(node.replica.status().keys, 8);
    }
}

#[tokio::test]
async fn the_last_replica_ends_the_task_also_in_the_middle_of_a_read() {
    for read in [Read::Page(0), Read::Under] {
        let keys = keys(1).await;
        let store = keys.gated();
        store.hold(read, At::Start);
        let node = Node::new(store.clone());
        let _ = node.node.authenticate(keys.secret(0)).await;
        if read == Read::Under {
            node.replica.loaded().await;
            keys.revoke(0).await;
        }
        store.is_held().await;
        drop(node);
        // The store here, and in no task.
        eventually("the task to end", async || Arc::strong_count(&store.0) == 1).await;
    }
}

#[tokio::test]
async fn many_changes_of_few_keys_at_once_end_in_the_last_state() {
    let keys = Arc::new(keys(20).await);
    let node = Node::new(keys.gated()).loaded().await;
    let ids: HashSet<_> = keys.issued.iter().map(|key| key.record().id.clone()).collect();
    assert_eq!(ids.len(), 20);
    let editor = tokio::spawn({
        let keys = Arc::clone(&keys);
        async move {
            for round in 0..50 {
                for n in 0..20 {
                    let mut record = keys.issued[n].record().clone();
                    record.name = format!("{round}");
                    support::edit_key(&keys.memory, &record, None).await.unwrap().unwrap();
                }
                tokio::task::yield_now().await;
            }
            for n in 0..20 {
                keys.revoke(n).await;
            }
        }
    });
    while !editor.is_finished() {
        let _ = node.ask(keys.secret(7)).await;
        tokio::task::yield_now().await;
    }
    editor.await.unwrap();
    in_sync(&node.node).await;
    for n in 0..20 {
        assert_eq!(node.ask(keys.secret(n)).await.0, 401);
        node.settles(keys.secret(n), 401).await;
    }
    assert_eq!(node.replica.status().keys, 20);
}
