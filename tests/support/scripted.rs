//! A store whose rows, revisions and feed the test writes, and a node over it with a manual clock.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use futures_util::StreamExt;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower_api_key::{
    Authenticator, KeyManager, KeyScheme, MemoryStore, NewKey, StoreError,
    authenticator::AuthenticatorBuilder,
    clock::ManualClock,
    key::{KeyFormat, KeyHash},
    record::{KeyRecord, Revision, Revisions, User, UserId},
    store::{Answer, Change, ChangeStream, KeyStore, Lookup, StoredKey},
};

use super::{eventually::others_make, some_user};

/// Clones are the same store.
#[derive(Clone)]
pub struct Scripted(Arc<Inner>);

struct Inner {
    rows: Mutex<HashMap<String, StoredKey>>,
    /// Of prefixes under which there is nothing.
    gone: Mutex<HashMap<String, Revision>>,
    asked: AtomicUsize,
    fault: Mutex<Option<StoreError>>,
    panics: AtomicBool,
    holds: AtomicBool,
    gate: Semaphore,
    under_way: Arc<()>,
    feed: Feed,
    listeners: Mutex<Vec<mpsc::UnboundedSender<Change>>>,
    listened: AtomicUsize,
    sent: AtomicUsize,
    received: Arc<AtomicUsize>,
}

#[derive(Clone, Copy)]
enum Feed {
    None,
    Complete,
    Hints,
}

/// A key that a [`Scripted`] store has.
#[derive(Clone)]
pub struct Issued {
    pub key: String,
    pub prefix: String,
    pub owner: UserId,
}

impl Scripted {
    /// A store with a feed that emits the events that the test passes to it.
    pub fn new() -> Self {
        Self::with(Feed::Complete)
    }

    pub fn without_feed() -> Self {
        Self::with(Feed::None)
    }

    /// The feed is made with [`ChangeStream::best_effort`].
    pub fn with_hints() -> Self {
        Self::with(Feed::Hints)
    }

    fn with(feed: Feed) -> Self {
        Self(Arc::new(Inner {
            rows: Mutex::default(),
            gone: Mutex::default(),
            asked: AtomicUsize::new(0),
            fault: Mutex::default(),
            panics: AtomicBool::new(false),
            holds: AtomicBool::new(false),
            gate: Semaphore::new(0),
            under_way: Arc::default(),
            feed,
            listeners: Mutex::default(),
            listened: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
            received: Arc::default(),
        }))
    }

    /// Stores a new key of the user `owner`; both rows have the revision 1.
    pub async fn issue(&self, owner: i64) -> Issued {
        let elsewhere = MemoryStore::new();
        let user = some_user(elsewhere.clone()).await;
        let issued = KeyManager::new(elsewhere).issue(NewKey::new(user, "k")).await.unwrap();
        let (key, prefix) = (issued.expose_secret().to_owned(), issued.record().prefix.clone());
        let user = User::new(owner, format!("{owner}@example.com"));
        let record = KeyRecord::new(owner, prefix.clone(), user.clone());
        let revisions = Revisions { key: Revision(1), owner: Revision(1) };
        let stored = StoredKey::new(record, KeyHash::sha256(&key)).with_revisions(revisions);
        self.0.rows.lock().unwrap().insert(prefix.clone(), stored);
        Issued { key, prefix, owner: user.id }
    }

    /// Changes the row of a key, which gets these revisions, and emits no change event.
    pub fn edit(&self, issued: &Issued, key: u64, owner: u64, edit: impl FnOnce(&mut KeyRecord)) {
        let mut rows = self.0.rows.lock().unwrap();
        let row = rows.get_mut(&issued.prefix).expect("the key is there");
        let mut record = row.record().clone();
        edit(&mut record);
        let revisions = Revisions { key: Revision(key), owner: Revision(owner) };
        *row = StoredKey::new(record, row.hash().clone()).with_revisions(revisions);
    }

    /// Replaces the hash of a key; its row gets this revision. Sends no change event.
    pub fn rehash(&self, issued: &Issued, revision: u64, hash: KeyHash) {
        let mut rows = self.0.rows.lock().unwrap();
        let row = rows.get_mut(&issued.prefix).expect("the key is there");
        let revisions = Revisions { key: Revision(revision), owner: Revision(1) };
        *row = StoredKey::new(row.record().clone(), hash).with_revisions(revisions);
    }

    /// Deletes a key, and emits no change event.
    pub fn delete(&self, issued: &Issued, revision: u64) {
        self.0.rows.lock().unwrap().remove(&issued.prefix);
        self.0.gone.lock().unwrap().insert(issued.prefix.clone(), Revision(revision));
    }

    /// Number of look-ups in the store since this was last called.
    pub fn take_asked(&self) -> usize {
        self.0.asked.swap(0, SeqCst)
    }

    /// Number of look-ups since [`Scripted::take_asked`].
    pub fn asked(&self) -> usize {
        self.0.asked.load(SeqCst)
    }

    /// From now on each look-up fails.
    pub fn fail(&self) {
        self.fail_with(StoreError::unavailable("the test says so"));
    }

    pub fn fail_with(&self, error: StoreError) {
        *self.0.fault.lock().unwrap() = Some(error);
    }

    /// From now on each look-up panics.
    pub fn panic(&self) {
        self.0.panics.store(true, SeqCst);
    }

    pub fn recover(&self) {
        *self.0.fault.lock().unwrap() = None;
        self.0.panics.store(false, SeqCst);
    }

    /// From now on each look-up, when it has read, waits until it is let go.
    pub fn hold(&self) {
        self.0.holds.store(true, SeqCst);
    }

    /// Lets so many look-ups go on, in the order in which they came.
    pub fn let_go(&self, look_ups: usize) {
        self.0.gate.add_permits(look_ups);
    }

    pub fn hold_no_more(&self) {
        self.0.holds.store(false, SeqCst);
    }

    /// Waits until so many look-ups are under way.
    pub async fn has_under_way(&self, look_ups: usize) {
        let what = format!("{look_ups} look-ups are under way");
        others_make(&what, || Arc::strong_count(&self.0.under_way) == look_ups + 1).await;
    }

    /// Number of change streams that were opened.
    pub fn times_listened(&self) -> usize {
        self.0.listened.load(SeqCst)
    }

    /// Waits until this number of change streams was opened.
    pub async fn is_listened_to(&self, times: usize) {
        others_make("somebody listens", || self.times_listened() == times).await;
    }

    /// Whether a change stream is still open.
    pub fn has_listeners(&self) -> bool {
        self.0.listeners.lock().unwrap().iter().any(|listener| !listener.is_closed())
    }

    /// Emits the change, and waits until every listener has taken it. Listeners must be on this thread.
    pub async fn emit(&self, change: Change) {
        // A node starts to listen on a task of its own.
        others_make("somebody listens", || self.has_listeners()).await;
        {
            let listeners = self.0.listeners.lock().unwrap();
            let received = listeners.iter().filter(|to| to.send(change.clone()).is_ok()).count();
            assert!(received > 0, "nobody listens");
            self.0.sent.fetch_add(received, SeqCst);
        }
        let is_received = || self.0.received.load(SeqCst) == self.0.sent.load(SeqCst);
        others_make("the change is heard", is_received).await;
    }

    /// Ends all change streams.
    pub fn end_feed(&self) {
        self.0.listeners.lock().unwrap().clear();
    }
}

impl KeyStore for Scripted {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let _under_way = Arc::clone(&self.0.under_way);
        self.0.asked.fetch_add(1, SeqCst);
        let row = self.0.rows.lock().unwrap().get(lookup.id()).cloned();
        let gone = self.0.gone.lock().unwrap().get(lookup.id()).copied();
        if self.0.holds.load(SeqCst) {
            self.0.gate.acquire().await.unwrap().forget();
        }
        assert!(!self.0.panics.load(SeqCst), "the test says so");
        if let Some(error) = self.0.fault.lock().unwrap().clone() {
            return Err(error);
        }
        Ok(lookup.verify(row).await?.with_key_revision(gone.unwrap_or_default()))
    }

    fn changes(&self, _since: SystemTime) -> ChangeStream {
        self.0.listened.fetch_add(1, SeqCst);
        let (sender, receiver) = mpsc::unbounded_channel();
        self.0.listeners.lock().unwrap().push(sender);
        let received = Arc::clone(&self.0.received);
        let count = move |_: &Change| {
            received.fetch_add(1, SeqCst);
        };
        let changes = UnboundedReceiverStream::new(receiver).inspect(count);
        match self.0.feed {
            Feed::None => ChangeStream::none(),
            Feed::Complete => ChangeStream::new(changes),
            Feed::Hints => ChangeStream::best_effort(changes),
        }
    }
}

/// An authenticator over a [`Scripted`] store, with a manual clock.
pub struct Node {
    pub clock: Arc<ManualClock>,
    pub store: Scripted,
    pub authenticator: Authenticator,
}

impl Node {
    pub fn over(store: Scripted) -> Self {
        Self::with(store, |builder| builder)
    }

    pub fn with(
        store: Scripted,
        settings: impl FnOnce(AuthenticatorBuilder) -> AuthenticatorBuilder,
    ) -> Self {
        let clock = Arc::new(ManualClock::at(SystemTime::now()));
        let format = KeyFormat::structured("tak", "live").unwrap();
        let scheme = KeyScheme::builder().format(format).build().unwrap();
        let builder = Authenticator::builder(store.clone()).scheme(scheme).clock(clock.clone());
        Self { clock, store, authenticator: settings(builder).build() }
    }

    /// The status that a request with this key is answered with, and the number of look-ups in the store.
    pub async fn ask(&self, key: &str) -> (u16, usize) {
        let status = status(&self.authenticator, key).await;
        // It may have begun one and not waited for it.
        let ended = || self.authenticator.health().lookups_under_way == 0;
        others_make("all look-ups end", ended).await;
        (status, self.store.take_asked())
    }

    /// Emits that every change up to now was reported.
    pub async fn sync(&self) {
        self.store.emit(Change::Synced(self.now())).await;
    }

    pub fn now(&self) -> SystemTime {
        tower_api_key::clock::Clock::now(&*self.clock)
    }

    pub fn seconds(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    pub fn moment(&self) {
        self.clock.advance(Duration::from_nanos(1));
    }
}

/// The status that a request with this key is answered with.
pub async fn status(authenticator: &Authenticator, key: &str) -> u16 {
    match authenticator.authenticate(key).await {
        Ok(_) => 200,
        Err(denial) => denial.status().as_u16(),
    }
}
