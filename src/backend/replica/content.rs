//! The keys and owners in memory, and which of them have changed since they were read: [`Content`].

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::sync::{Notify, watch};

use super::{
    packed_key::{PackedKey, SharedParts},
    pending::{Pending, PendingReads},
    shards::Shards,
};
use crate::{
    coherence::{Age, Subject},
    error::StoreError,
    record::{Revision, UserId},
    runtime::Moment,
    store::{
        Answer, Change, KeysRead, Lookup, ReadOwner, ReadRow, ReplicaState, Source, StoredKey,
    },
};

/// The keys in memory. One task writes what it reads; any thread may mark what has changed.
///
/// A change removes the key or owner and leaves a mark. What was read before the mark was set never replaces it, so that
/// no order of reads and changes brings back what is outdated.
pub(super) struct Content {
    by_id: Shards<Box<str>, UnderId>,
    owners: Shards<UserId, Owner>,
    shared: Mutex<SharedParts>,
    pending: PendingReads,
    /// Number of marks. It orders marks and reads.
    ticks: AtomicU64,
    keys: AtomicUsize,
    bytes: AtomicUsize,
    state: watch::Sender<ReplicaState>,
    /// Number of times that everything was removed.
    epoch: AtomicU64,
    /// The database's time of the last sync, in microseconds since the Unix epoch; 0 for none.
    synced: AtomicU64,
    synced_at: Mutex<Option<Moment>>,
    /// The database's time at the start of the load, in microseconds. What has no entry was absent then.
    loaded_from: AtomicU64,
    /// Wakes the task that reads.
    wake: Notify,
}

/// What is stored under a lookup id.
enum UnderId {
    Read(ReadId),
    Changed(Mark),
}

struct ReadId {
    /// Revision of the last change under the lookup id; 0 if no change was reported since the load.
    latest: Revision,
    /// The database's time at the read, in microseconds.
    read_at: u64,
    keys: Entries,
}

/// The keys under a lookup id. Almost always there is one.
enum Entries {
    None,
    One(Entry),
    Many(Vec<Entry>),
}

enum Entry {
    Key(PackedKey),
    /// The row can't be decoded.
    Unreadable(Box<StoreError>),
}

enum Owner {
    Read(ReadOwner),
    Changed(Mark),
}

/// A change after which the subject was not read again.
#[derive(Clone, Copy)]
struct Mark {
    tick: u64,
    /// The revision that was reported. A read below it is of a standby that lags behind.
    minimum: Revision,
}

/// What is in memory for a look-up.
#[expect(
    clippy::large_enum_variant,
    reason = "the large variant is the common one, and is not stored"
)]
pub(super) enum Found {
    /// The answer and its age, `Fresh` or `Stale`.
    Answer(Answer, Age),
    /// The store has to be asked, and what is in memory be read again if the key is valid: a slow check has to verify it,
    /// or a row can't be decoded.
    NeedsStore,
    /// The store has to be asked.
    Nothing,
}

/// Position among the marks at which a read was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tick(u64);

/// Time for which an absent lookup id that was read keeps its entry: as long as the change may be its minimum revision.
pub(super) const ABSENT_LIFETIME: Duration = crate::coherence::MINIMUM_REVISION_LIFETIME;

/// Approximate size of an entry apart from its bytes: a place in a hash table that is two thirds full, and two
/// allocations.
const ENTRY_BYTES: usize = (size_of::<(Box<str>, UnderId)>() + 1) * 3 / 2 + 32;

impl Content {
    pub(super) fn new() -> Self {
        Self {
            by_id: Shards::new(),
            owners: Shards::new(),
            shared: Mutex::default(),
            pending: PendingReads::default(),
            ticks: AtomicU64::new(0),
            keys: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            state: watch::Sender::new(ReplicaState::Loading),
            epoch: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            synced_at: Mutex::default(),
            loaded_from: AtomicU64::new(0),
            wake: Notify::new(),
        }
    }

    /// Answers a look-up from memory, if that is allowed.
    pub(super) fn find(&self, lookup: &Lookup) -> Found {
        let epoch = self.epoch.load(Ordering::Acquire);
        if *self.state.borrow() != ReplicaState::Loaded
            || !lookup.view().minimum_revisions.is_caught_up()
        {
            return Found::Nothing;
        }
        // Read before the keys: what was in sync then still is what they were read for.
        let synced = time(self.synced.load(Ordering::Acquire));
        let now = lookup.clock().read();
        let view = lookup.view();
        let age = view.freshness.age(view.freshness.moment_of(synced, now), now);
        if age == Age::Expired {
            return Found::Nothing;
        }
        let mut subjects = vec![(Subject::Prefix(lookup.id().into()), Revision(0))];
        let read = self.by_id.with(lookup.id(), |under| match under {
            None => Some((Vec::new(), Revision(0), self.loaded_from.load(Ordering::Acquire))),
            Some(UnderId::Changed(_)) => None,
            Some(UnderId::Read(read)) => {
                let rows = self.rows(lookup, read, &mut subjects)?;
                Some((rows, read.latest, read.read_at))
            }
        });
        let Some((rows, latest, read_at)) = read else { return Found::Nothing };
        if self.epoch.load(Ordering::Acquire) != epoch {
            // Absent may mean removed.
            return Found::Nothing;
        }
        let of_rows = rows.iter().flatten().map(|key| key.revisions().key).max();
        subjects[0].1 = latest.max(of_rows.unwrap_or_default());
        if !view.accepts_replica(&subjects, time(read_at)) {
            // A change is known here that the read does not include: of a standby that lags behind, or a call of
            // `Authenticator::invalidate`.
            for (subject, _) in subjects {
                match subject {
                    Subject::Prefix(id) => self.mark_id(&id, Revision(0)),
                    Subject::Owner(owner) => self.mark_owner(&owner, Revision(0)),
                }
            }
            return Found::Nothing;
        }
        match lookup.verify_fast(rows) {
            // The row of the owner, which makes a row unreadable too, may be whole by now.
            None | Some(Err(_)) => Found::NeedsStore,
            Some(Ok(answer)) => Found::Answer(
                answer.with_key_revision(latest).with_as_of(synced).with_source(Source::Replica),
                age,
            ),
        }
    }

    /// Returns the rows under the id of a look-up, and adds their owners to `subjects`. `None` if an owner has changed.
    fn rows(
        &self,
        lookup: &Lookup,
        read: &ReadId,
        subjects: &mut Vec<(Subject, Revision)>,
    ) -> Option<Vec<Result<StoredKey, StoreError>>> {
        let mut rows = Vec::with_capacity(1);
        for entry in read.keys.iter() {
            let key = match entry {
                Entry::Key(key) => key.unpack(|id, revision| self.owner(id, revision))?,
                Entry::Unreadable(error) => {
                    rows.push(Err((**error).clone()));
                    continue;
                }
            };
            if key.is_listed_under(lookup.id(), lookup.asked_at().wall()) {
                let owner = Subject::Owner(key.record().user.id.clone());
                subjects.push((owner, key.revisions().owner));
                rows.push(Ok(key));
            }
        }
        Some(rows)
    }

    /// Returns the owner of a key with this revision.
    fn owner(&self, id: &UserId, key: Revision) -> Option<ReadOwner> {
        self.owners.with(id, |owner| match owner {
            Some(Owner::Read(owner)) if key >= owner.since => Some(owner.clone()),
            _ => None,
        })
    }

    /// Marks the subject of a change: it is read again, and not answered from memory until then.
    pub(super) fn mark(&self, change: &Change) {
        match change {
            Change::Prefix(id, revision) => self.mark_id(id, *revision),
            Change::Owner(owner, revision) => self.mark_owner(owner, *revision),
            _ => {}
        }
    }

    fn mark_id(&self, id: &str, minimum: Revision) {
        if self.loaded_from.load(Ordering::Acquire) == 0 {
            // Nothing was read that the change could make outdated.
            return;
        }
        self.by_id.update(id.into(), |under| {
            // What is read again must not be older than what is there, whatever sets the mark. The revision of a deletion is
            // left out, because the store does not keep it.
            let known = match under {
                Some(UnderId::Changed(mark)) => mark.minimum,
                Some(UnderId::Read(read)) => read.keys.revision(),
                None => Revision(0),
            };
            let minimum = known.max(minimum);
            self.forget(id, under.as_ref());
            *under = Some(UnderId::Changed(Mark { tick: self.next_tick(), minimum }));
        });
        self.read_again(Pending::Id(id.into()));
    }

    fn mark_owner(&self, owner: &UserId, minimum: Revision) {
        if self.loaded_from.load(Ordering::Acquire) == 0 {
            return;
        }
        self.owners.update(owner.clone(), |read| {
            let known = match read {
                Some(Owner::Changed(mark)) => mark.minimum,
                Some(Owner::Read(owner)) => owner.revision,
                None => Revision(0),
            };
            let minimum = known.max(minimum);
            *read = Some(Owner::Changed(Mark { tick: self.next_tick(), minimum }));
        });
        self.read_again(Pending::Owner(owner.clone()));
    }

    /// Queues a read.
    pub(super) fn read_again(&self, subject: Pending) {
        self.pending.push(subject);
        self.wake.notify_one();
    }

    fn next_tick(&self) -> u64 {
        self.ticks.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Returns the position of a read that is sent now.
    pub(super) fn tick(&self) -> Tick {
        Tick(self.ticks.load(Ordering::SeqCst))
    }

    pub(super) fn pending(&self) -> &PendingReads {
        &self.pending
    }

    /// Waits until a read is queued.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }
}

/// What the task writes.
impl Content {
    /// Removes everything, because changes may have been missed or the replica is turned off.
    pub(super) fn clear(&self, state: ReplicaState) {
        // In this order, no look-up takes what is left for all keys.
        self.state.send_replace(state);
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.loaded_from.store(0, Ordering::Release);
        self.by_id.clear();
        self.owners.clear();
        self.pending.clear();
        *self.shared() = SharedParts::default();
        self.keys.store(0, Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
    }

    /// Begins a load. Changes are marked from now on.
    pub(super) fn begin(&self, as_of: SystemTime) {
        self.loaded_from.store(micros(as_of).max(1), Ordering::Release);
    }

    /// Ends a load: every key was read.
    pub(super) fn loaded(&self) {
        self.state.send_replace(ReplicaState::Loaded);
    }

    /// Records that every change up to `as_of`, a time of the database, is marked.
    pub(super) fn synced(&self, as_of: SystemTime, now: Moment) {
        self.synced.store(micros(as_of), Ordering::Release);
        *self.synced_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Inserts the rows of a page. What was marked or read again meanwhile is kept.
    pub(super) fn insert_page(&self, read: KeysRead) {
        let read_at = micros(read.as_of);
        for row in read.rows {
            self.insert_owner(row.key.as_ref().ok());
            for id in &row.lookup_ids {
                let entry = self.entry(&row, id);
                self.by_id.update(id.as_str().into(), |under| match under {
                    Some(UnderId::Changed(_)) => {}
                    Some(UnderId::Read(under)) => {
                        if !under.keys.contains(&entry, &row) {
                            self.count(id, &entry, 1);
                            under.keys.push(entry);
                        }
                    }
                    none => {
                        self.count(id, &entry, 1);
                        let keys = Entries::One(entry);
                        *none = Some(UnderId::Read(ReadId { latest: Revision(0), read_at, keys }));
                    }
                });
            }
        }
    }

    /// Replaces what is stored under lookup ids that were read again at `tick`. Returns those that have to be read once
    /// more, and those under which there is no key.
    pub(super) fn replace(
        &self,
        ids: &[String],
        tick: Tick,
        read: KeysRead,
    ) -> (Vec<Pending>, Vec<Box<str>>) {
        let (mut again, mut absent) = (Vec::new(), Vec::new());
        let read_at = micros(read.as_of);
        for row in &read.rows {
            self.insert_owner(row.key.as_ref().ok());
        }
        for id in ids {
            let latest = read.latest.iter().find(|(of, _)| of == id);
            let latest = latest.map_or(Revision(0), |(_, latest)| *latest);
            let rows = read.rows.iter().filter(|row| row.lookup_ids.contains(id));
            let of_rows = rows.clone().filter_map(|row| row.key.as_ref().ok());
            let latest =
                latest.max(of_rows.map(|key| key.revisions().key).max().unwrap_or_default());
            let entries: Vec<_> = rows.map(|row| self.entry(row, id)).collect();
            let is_absent = entries.is_empty();
            let is_replaced = self.by_id.update(id.as_str().into(), |under| {
                if let Some(UnderId::Changed(mark)) = under
                    && !mark.is_included(tick, latest)
                {
                    return false;
                }
                self.forget(id, under.as_ref());
                entries.iter().for_each(|entry| self.count(id, entry, 1));
                let keys = Entries::new(entries);
                *under = Some(UnderId::Read(ReadId { latest, read_at, keys }));
                true
            });
            match (is_replaced, is_absent) {
                (false, _) => again.push(Pending::Id(id.as_str().into())),
                (true, true) => absent.push(id.as_str().into()),
                (true, false) => {}
            }
        }
        (again, absent)
    }

    /// Replaces owners that were read again at `tick`. Returns those that have to be read once more.
    pub(super) fn replace_owners(
        &self,
        ids: &[UserId],
        tick: Tick,
        read: Vec<ReadOwner>,
    ) -> Vec<Pending> {
        let mut again = Vec::new();
        for id in ids {
            let owner = read.iter().find(|owner| owner.user.id == *id);
            let revision = owner.map(|owner| owner.revision);
            let is_replaced = self.owners.update(id.clone(), |known| {
                if let Some(Owner::Changed(mark)) = known {
                    // A user that was deleted has no revision.
                    let minimum = revision.unwrap_or(mark.minimum);
                    if !mark.is_included(tick, minimum) {
                        return false;
                    }
                }
                // What remains of a user that was deleted is the mark.
                if let Some(owner) = owner {
                    *known = Some(Owner::Read(owner.clone()));
                }
                true
            });
            if !is_replaced {
                again.push(Pending::Owner(id.clone()));
            }
        }
        again
    }

    /// Removes the entry of a lookup id under which no key was found.
    pub(super) fn remove_absent(&self, id: &str) {
        self.by_id.update(id.into(), |under| {
            if let Some(UnderId::Read(ReadId { keys: Entries::None, .. })) = under {
                *under = None;
            }
        });
    }

    /// Adds the owner of a key that was read, unless a later one is known.
    fn insert_owner(&self, key: Option<&StoredKey>) {
        let Some(key) = key else { return };
        let (user, revision) = (&key.record().user, key.revisions().owner);
        self.owners.update(user.id.clone(), |known| {
            let is_known = match known {
                Some(Owner::Read(owner)) => owner.revision >= revision,
                Some(Owner::Changed(_)) => {
                    // It is read alone, because a key does not show that the id was another user's.
                    self.pending.push(Pending::Owner(user.id.clone()));
                    true
                }
                None => false,
            };
            if !is_known {
                let since = match known {
                    Some(Owner::Read(owner)) => owner.since,
                    _ => Revision(0),
                };
                let owner = ReadOwner::new(user.clone(), revision).with_since(since);
                *known = Some(Owner::Read(owner));
            }
        });
    }

    fn entry(&self, row: &ReadRow, id: &str) -> Entry {
        let unreadable = |error: StoreError| Entry::Unreadable(Box::new(error));
        match &row.key {
            // A key that was left out would be unknown.
            Ok(key) => PackedKey::new(key, id, &mut self.shared()).map_or_else(
                || unreadable(StoreError::bad_row(format!("key {} can't be packed", row.id))),
                Entry::Key,
            ),
            Err(error) => unreadable(error.clone()),
        }
    }

    /// Subtracts what is stored under a lookup id from the counts.
    fn forget(&self, id: &str, under: Option<&UnderId>) {
        if let Some(UnderId::Read(read)) = under {
            read.keys.iter().for_each(|entry| self.count(id, entry, -1));
        }
    }

    fn count(&self, id: &str, entry: &Entry, sign: isize) {
        let (keys, own) = match entry {
            Entry::Key(key) => (usize::from(key.is_current()), key.own_bytes()),
            Entry::Unreadable(_) => (1, size_of::<StoreError>()),
        };
        let bytes = ENTRY_BYTES + id.len() + own;
        // A negative number wraps around, which the addition makes a subtraction.
        self.keys.fetch_add(keys.wrapping_mul(sign as usize), Ordering::Relaxed);
        self.bytes.fetch_add(bytes.wrapping_mul(sign as usize), Ordering::Relaxed);
    }

    fn shared(&self) -> MutexGuard<'_, SharedParts> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is reported.
impl Content {
    pub(super) fn state(&self) -> watch::Receiver<ReplicaState> {
        self.state.subscribe()
    }

    pub(super) fn keys(&self) -> usize {
        self.keys.load(Ordering::Relaxed)
    }

    /// Returns the approximate size, in bytes.
    pub(super) fn bytes(&self) -> usize {
        let owners = self.owners.len() * (size_of::<(UserId, Owner)>() * 3 / 2 + 64);
        self.bytes.load(Ordering::Relaxed) + self.shared().bytes() + owners
    }

    /// Returns the moment of the last sync.
    pub(super) fn last_sync(&self) -> Option<Moment> {
        *self.synced_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mark {
    /// Returns whether a read that was sent at `tick`, and returned this revision, includes the change.
    fn is_included(self, tick: Tick, revision: Revision) -> bool {
        self.tick <= tick.0 && revision >= self.minimum
    }
}

impl Entries {
    fn new(mut entries: Vec<Entry>) -> Self {
        match (entries.len(), entries.pop()) {
            (1, Some(entry)) => Self::One(entry),
            (_, None) => Self::None,
            (_, Some(last)) => {
                entries.push(last);
                Self::Many(entries)
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Entry> {
        match self {
            Self::None => &[],
            Self::One(entry) => std::slice::from_ref(entry),
            Self::Many(entries) => entries.as_slice(),
        }
        .iter()
    }

    /// Returns the highest revision of the keys.
    fn revision(&self) -> Revision {
        let keys = self.iter().filter_map(|entry| match entry {
            Entry::Key(key) => key.revision(),
            Entry::Unreadable(_) => None,
        });
        keys.max().unwrap_or_default()
    }

    fn push(&mut self, entry: Entry) {
        *self = match std::mem::replace(self, Self::None) {
            Self::None => Self::One(entry),
            Self::One(first) => Self::Many(vec![first, entry]),
            Self::Many(mut entries) => {
                entries.push(entry);
                Self::Many(entries)
            }
        };
    }

    /// Returns whether the key of `row` was inserted by a read of its lookup id, before the page reached it.
    fn contains(&self, entry: &Entry, row: &ReadRow) -> bool {
        self.iter().any(|known| match (known, entry) {
            (Entry::Key(known), _) => known.id().as_ref() == Some(&row.id),
            (Entry::Unreadable(known), Entry::Unreadable(error)) => {
                known.to_string() == error.to_string()
            }
            (Entry::Unreadable(_), Entry::Key(_)) => false,
        })
    }
}

fn micros(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn time(micros: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(micros)
}
