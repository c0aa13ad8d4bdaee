//! The keys and owners in memory, and which of them have changed since they were read: [`Content`].

mod entries;
mod reads;

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::sync::{Notify, watch};

use self::entries::{Entry, Mark, Owner, ReadId, UnderId};
pub(super) use self::{entries::Tick, reads::ABSENT_LIFETIME};
use super::{
    packed_key::SharedParts,
    pending::{Pending, PendingReads},
    shards::Shards,
};
use crate::{
    coherence::{Age, Subject},
    error::StoreError,
    record::{Revision, UserId},
    runtime::Moment,
    store::{Answer, Change, Lookup, ReadOwner, ReplicaState, Source, StoredKey},
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

fn micros(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn time(micros: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(micros)
}
