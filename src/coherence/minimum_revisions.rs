//! The rule of by_subject: [`MinimumRevisions`].

use std::{
    collections::{HashMap, VecDeque, hash_map::RandomState},
    fmt,
    hash::BuildHasher,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::{
    record::{Revision, UserId},
    runtime::Moment,
};

/// What a change is about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Subject {
    /// The keys under a lookup prefix.
    Prefix(Box<str>),
    /// The keys of a user.
    Owner(UserId),
}

/// What this node has learned of changes. Nothing below a minimum is served.
///
/// MinimumRevisions are looked at when an answer comes up from below. For what is in the local cache there are
/// generations: a counter a bucket of subjects, which a change moves and every hit compares, so that a
/// hit takes no lock. Whatever shares a bucket is asked anew, which costs a look-up and nothing else.
pub(crate) struct MinimumRevisions {
    table: Mutex<Table>,
    generations: Box<[AtomicU32; BUCKETS]>,
    hasher: RandomState,
    /// Whether all the changes are known that a copy in Redis could be from before.
    is_caught_up: AtomicBool,
}

#[derive(Debug, Default)]
struct Table {
    by_subject: HashMap<Subject, Minimum>,
    /// The subjects in the order in which their minimum revisions were raised, to forget them in.
    raised: VecDeque<(Moment, Subject)>,
    /// Copies from before this are trusted for no key.
    everything: Option<SystemTime>,
    /// Counts what was learned.
    seen: u64,
    /// Counts changes of owners, or of everything, that revisions do not order.
    unordered: u64,
    /// What had been learned when `everything` was last set.
    everything_since: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Minimum {
    revision: Revision,
    /// Copies from before this are not trusted whatever their revision: a change came that revisions do
    /// not order.
    as_of: Option<SystemTime>,
    /// What had been learned when `as_of` was last set.
    since: u64,
    /// The last entry in `raised`, which counts.
    raised: Option<Moment>,
}

/// How much had been learned at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    all: u64,
    unordered: u64,
}

impl Seen {
    /// Whether all that had been learned at `other` had been learned by then.
    pub(crate) fn includes(self, other: Self) -> bool {
        self.all >= other.all
    }
}

/// What the minimum revisions say of an answer from the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It may be kept.
    Current,
    /// A change came while it was under way, and it does not say whether it is from after it. For those
    /// who had asked before the change.
    Overtaken,
    /// It is from before a change that is known. For nobody.
    Below,
}

/// Longer than any entry lives in Redis.
pub(crate) const MINIMUM_REVISION_LIFETIME: Duration = Duration::from_secs(3600 + 300);
/// Past so many minimum revisions, one for everything takes their place.
const MAX_SUBJECTS: usize = 100_000;
/// 32 KiB, which stay in a core's nearest cache. A change drops what shares its bucket: one entry in 8,192.
const BUCKETS: usize = 1 << 13;
/// How far the database's time may be off that a node knows.
pub(super) const MARGIN: Duration = Duration::from_secs(1);

/// A bucket, and its generation.
pub(crate) type Generation = (u16, u32);

impl MinimumRevisions {
    pub(super) fn new() -> Self {
        Self {
            table: Mutex::default(),
            generations: Box::new([const { AtomicU32::new(0) }; BUCKETS]),
            hasher: RandomState::new(),
            is_caught_up: AtomicBool::new(false),
        }
    }

    /// Learns of a change. The minimum is raised before the generation moves: whoever sees the new
    /// generation finds the new minimum.
    pub(super) fn raise(
        &self,
        subject: Subject,
        revision: Revision,
        now: Moment,
        database_now: SystemTime,
    ) {
        if revision > Revision(0) && self.revision_of(&subject) == Some(revision) {
            // Said twice: by the store, and by a tombstone.
            return;
        }
        self.change(subject, now, database_now, |minimum, table_seen| {
            if revision > minimum.revision {
                minimum.revision = revision;
            } else if revision < minimum.revision || revision == Revision(0) {
                // Two rows under one prefix were committed in another order than they were numbered, or
                // the store has no revisions at all.
                minimum.as_of = Some(database_now + MARGIN);
                minimum.since = table_seen;
            }
        });
    }

    /// Learns of a change if its revision is higher than any that is known.
    pub(super) fn raise_to(
        &self,
        subject: Subject,
        revision: Revision,
        now: Moment,
        database_now: SystemTime,
    ) {
        if revision > self.revision_of(&subject).unwrap_or_default() {
            self.raise(subject, revision, now, database_now);
        }
    }

    /// Learns of a change that has no revision.
    pub(super) fn invalidate(&self, subject: Subject, now: Moment, database_now: SystemTime) {
        self.raise(subject, Revision(0), now, database_now);
    }

    fn change(
        &self,
        subject: Subject,
        now: Moment,
        database_now: SystemTime,
        change: impl FnOnce(&mut Minimum, u64),
    ) {
        let bucket = self.bucket(&subject);
        let is_owner = matches!(subject, Subject::Owner(_));
        {
            let mut table = self.table();
            table.seen += 1;
            let seen = table.seen;
            table.forget_old(now);
            if table.by_subject.len() >= MAX_SUBJECTS && !table.by_subject.contains_key(&subject) {
                table.forget_all(database_now);
            }
            let minimum = table.by_subject.entry(subject.clone()).or_default();
            change(minimum, seen);
            minimum.raised = Some(now);
            let is_unordered = minimum.since == seen;
            table.unordered += u64::from(is_owner && is_unordered);
            table.raised.push_back((now, subject));
        }
        self.generations[bucket].fetch_add(1, Ordering::SeqCst);
    }

    /// Changes may have been missed: nothing is trusted from before.
    pub(super) fn reset(&self, database_now: SystemTime) {
        {
            let mut table = self.table();
            table.seen += 1;
            table.forget_all(database_now);
        }
        for generation in self.generations.iter() {
            generation.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn caught_up(&self) {
        self.is_caught_up.store(true, Ordering::Release);
    }

    /// Whether every change is known that a copy in Redis could be from before.
    pub(crate) fn is_caught_up(&self) -> bool {
        self.is_caught_up.load(Ordering::Acquire)
    }

    /// What has been learned so far. Taken before a read, so that [`MinimumRevisions::judge`] can tell what came
    /// during it.
    pub(crate) fn seen(&self) -> Seen {
        let table = self.table();
        Seen { all: table.seen, unordered: table.unordered }
    }

    /// Whether a request may join a look-up of a key under `prefix` that began at `began`. Not if a change
    /// of that prefix is known by now, or a change without a revision of any owner: whose key it will turn
    /// out to be is not known yet. Changes of owners with a revision don't matter: [`MinimumRevisions::judge`] finds
    /// an answer that is from before one of them.
    pub(crate) fn may_join(&self, prefix: Generation, began: Seen) -> bool {
        self.is_current(prefix) && self.table().unordered == began.unordered
    }

    /// The generation of what a change of `subject` would move.
    pub(crate) fn generation(&self, subject: &Subject) -> Generation {
        let bucket = self.bucket(subject);
        // There are 2¹³ buckets.
        (bucket as u16, self.generations[bucket].load(Ordering::SeqCst))
    }

    #[inline]
    pub(crate) fn is_current(&self, (bucket, generation): Generation) -> bool {
        // Never out of bounds: `generation` made it.
        self.generations[usize::from(bucket) % BUCKETS].load(Ordering::Acquire) == generation
    }

    /// Judges an answer about these subjects whose read was sent after `began`. Generations for keeping
    /// it are to be taken before this.
    pub(crate) fn judge(
        &self,
        subjects: &[(Subject, Revision)],
        began: Seen,
        now: Moment,
    ) -> Standing {
        let table = self.table();
        let mut standing = Standing::Current;
        if table.everything_since > began.all {
            standing = Standing::Overtaken;
        }
        for (subject, revision) in subjects {
            let Some(minimum) = table.by_subject.get(subject) else { continue };
            // One that the database has lost is never reached: it ends, as no copy from before it is left.
            if minimum.raised.is_some_and(|raised| now.since(raised) > MINIMUM_REVISION_LIFETIME) {
                continue;
            }
            if *revision < minimum.revision {
                return Standing::Below;
            }
            if minimum.since > began.all {
                standing = Standing::Overtaken;
            }
        }
        standing
    }

    /// Whether a copy that was read at `as_of`, by the database's clock, may be looked at.
    pub(super) fn accept_copy(&self, subjects: &[(Subject, Revision)], as_of: SystemTime) -> bool {
        if !self.is_caught_up() {
            return false;
        }
        let table = self.table();
        table.everything.is_none_or(|minimum| as_of >= minimum)
            && subjects.iter().all(|(subject, revision)| {
                table.by_subject.get(subject).is_none_or(|minimum| {
                    *revision >= minimum.revision
                        && minimum.as_of.is_none_or(|minimum| as_of >= minimum)
                })
            })
    }

    /// Whether a tombstone from then may be believed.
    pub(super) fn accept_delete(&self, made_at: SystemTime) -> bool {
        self.table().everything.is_none_or(|minimum| made_at >= minimum)
    }

    fn revision_of(&self, subject: &Subject) -> Option<Revision> {
        self.table().by_subject.get(subject).map(|minimum| minimum.revision)
    }

    /// How many minimum revisions there are.
    pub(crate) fn len(&self) -> usize {
        self.table().by_subject.len()
    }

    fn bucket(&self, subject: &Subject) -> usize {
        // The top bits would do as well; these are enough.
        self.hasher.hash_one(subject) as usize % BUCKETS
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn forget_old(&mut self, now: Moment) {
        while let Some((raised, subject)) = self.raised.front() {
            if now.since(*raised) <= MINIMUM_REVISION_LIFETIME {
                break;
            }
            // Raised again since then?
            if self.by_subject.get(subject).is_some_and(|minimum| minimum.raised == Some(*raised)) {
                self.by_subject.remove(subject);
            }
            self.raised.pop_front();
        }
        // The same few subjects over and over: the queue is longer than the table.
        if self.raised.len() > 2 * self.by_subject.len() + 1024 {
            let minimums = &self.by_subject;
            self.raised.retain(|(raised, subject)| {
                minimums.get(subject).is_some_and(|minimum| minimum.raised == Some(*raised))
            });
        }
    }

    fn forget_all(&mut self, database_now: SystemTime) {
        self.by_subject.clear();
        self.raised.clear();
        self.everything = Some(database_now + MARGIN);
        self.everything_since = self.seen;
        self.unordered += 1;
    }
}

impl fmt::Debug for MinimumRevisions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MinimumRevisions")
            .field("minimum revisions", &self.len())
            .field("is_caught_up", &self.is_caught_up())
            .finish_non_exhaustive()
    }
}
