//! The minimum-revision rule: [`MinimumRevisions`].

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

/// The subject of a change.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Subject {
    /// The keys under a lookup id.
    Prefix(Box<str>),
    /// The keys of a user.
    Owner(UserId),
}

/// Minimum revisions of the subjects whose changes this node has received. An answer below its minimum is not served.
///
/// Minimum revisions are compared when the store returns an answer. Entries of the local cache use generations instead:
/// each bucket of subjects has a counter, which a change increments and every hit compares, so that a hit takes no
/// lock. Subjects that share the bucket of a change are looked up again, which costs one look-up each.
pub(crate) struct MinimumRevisions {
    table: Mutex<Table>,
    generations: Box<[AtomicU32; BUCKETS]>,
    hasher: RandomState,
    /// Whether all changes are known that are newer than the oldest possible copy in Redis.
    is_caught_up: AtomicBool,
}

#[derive(Debug, Default)]
struct Table {
    by_subject: HashMap<Subject, Minimum>,
    /// The subjects in the order in which their minimum revisions were raised, for eviction.
    raised: VecDeque<(Moment, Subject)>,
    /// Copies that were read before this time are rejected for all keys.
    everything: Option<SystemTime>,
    /// Number of changes received.
    seen: u64,
    /// Number of changes of owners, or of everything, without a usable revision.
    unordered: u64,
    /// Value of `seen` when `everything` was last set.
    everything_since: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Minimum {
    revision: Revision,
    /// Copies that were read before this time are rejected whatever their revision, because a change came that
    /// revisions do not order.
    as_of: Option<SystemTime>,
    /// Value of `seen` when `as_of` was last set.
    since: u64,
    /// The valid entry in `raised`, which is the last one of this subject.
    raised: Option<Moment>,
}

/// The number of changes received up to a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    all: u64,
    unordered: u64,
}

impl Seen {
    /// Returns whether this includes all changes that `other` includes.
    pub(crate) fn includes(self, other: Self) -> bool {
        self.all >= other.all
    }
}

/// Result of the comparison of an answer from the store with the minimum revisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It may be cached.
    Current,
    /// A change that revisions do not order came while the look-up was under way. The answer may be from before it, and
    /// may be served only to requests that came before the change.
    Overtaken,
    /// It is from before a known change, and must not be served.
    Below,
}

/// Lifetime of a minimum revision, longer than that of any entry in Redis.
pub(crate) const MINIMUM_REVISION_LIFETIME: Duration = Duration::from_secs(3600 + 300);
/// Maximum number of minimum revisions. Beyond it, one minimum for all subjects replaces them.
const MAX_SUBJECTS: usize = 100_000;
/// Number of generation counters: 32 KiB, which fit into the L1 cache of a core. A change invalidates one entry in
/// 8,192.
const BUCKETS: usize = 1 << 13;
/// Margin of error of the database's time that a node assumes.
pub(super) const MARGIN: Duration = Duration::from_secs(1);

/// A bucket and its generation.
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

    /// Records a change. The minimum is raised before the generation is incremented: a reader of the new generation
    /// also reads the new minimum.
    pub(super) fn raise(
        &self,
        subject: Subject,
        revision: Revision,
        now: Moment,
        database_now: SystemTime,
    ) {
        if revision > Revision(0) && self.revision_of(&subject) == Some(revision) {
            // Reported twice: by the store, and by a tombstone.
            return;
        }
        self.change(subject, now, database_now, |minimum, table_seen| {
            if revision > minimum.revision {
                minimum.revision = revision;
            } else if revision < minimum.revision || revision == Revision(0) {
                // Two rows under one lookup id were committed in another order than they were numbered, or the store
                // has no revisions.
                minimum.as_of = Some(database_now + MARGIN);
                minimum.since = table_seen;
            }
        });
    }

    /// Records a change that has no revision.
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
            table.evict_old(now);
            if table.by_subject.len() >= MAX_SUBJECTS && !table.by_subject.contains_key(&subject) {
                table.evict_all(database_now);
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

    /// Records that changes may have been missed: all earlier answers are rejected.
    pub(super) fn reset(&self, database_now: SystemTime) {
        {
            let mut table = self.table();
            table.seen += 1;
            table.evict_all(database_now);
        }
        for generation in self.generations.iter() {
            generation.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn caught_up(&self) {
        self.is_caught_up.store(true, Ordering::Release);
    }

    /// Returns whether every change is known that is newer than the oldest possible copy in Redis.
    pub(crate) fn is_caught_up(&self) -> bool {
        self.is_caught_up.load(Ordering::Acquire)
    }

    /// Returns the number of changes received so far. It is read before a look-up, so that [`MinimumRevisions::judge`]
    /// can detect changes during it.
    pub(crate) fn seen(&self) -> Seen {
        let table = self.table();
        Seen { all: table.seen, unordered: table.unordered }
    }

    /// Returns whether a request may join a look-up of a key under `prefix` that began at `began`. It may not if a
    /// change of that prefix is known by now, or a change without a revision of any owner, because the owner of the key
    /// is not known yet. Changes of owners with a revision are irrelevant: [`MinimumRevisions::judge`] detects an
    /// answer that is from before one of them.
    pub(crate) fn may_join(&self, prefix: Generation, began: Seen) -> bool {
        self.is_current(prefix) && self.table().unordered == began.unordered
    }

    /// Returns the generation that a change of `subject` would increment.
    pub(crate) fn generation(&self, subject: &Subject) -> Generation {
        let bucket = self.bucket(subject);
        // The number fits: there are 2¹³ buckets.
        (bucket as u16, self.generations[bucket].load(Ordering::SeqCst))
    }

    #[inline]
    pub(crate) fn is_current(&self, (bucket, generation): Generation) -> bool {
        // Never out of bounds, because `generation` returned the bucket.
        self.generations[usize::from(bucket) % BUCKETS].load(Ordering::Acquire) == generation
    }

    /// Judges an answer about these subjects whose read was sent after `began`. Read the generations of its cache entry
    /// before this call.
    pub(crate) fn judge<'a>(
        &self,
        subjects: impl IntoIterator<Item = (&'a Subject, Revision)>,
        began: Seen,
        now: Moment,
    ) -> Standing {
        let table = self.table();
        let mut standing = Standing::Current;
        if table.everything_since > began.all {
            standing = Standing::Overtaken;
        }
        for (subject, revision) in subjects {
            let Some(minimum) = table.minimum(subject, now) else { continue };
            if revision < minimum.revision {
                return Standing::Below;
            }
            if minimum.since > began.all {
                standing = Standing::Overtaken;
            }
        }
        standing
    }

    /// Returns whether a change of one of these subjects is known that is newer than its revision.
    #[cfg(feature = "postgres")]
    pub(crate) fn is_below(
        &self,
        subjects: impl IntoIterator<Item = (Subject, Revision)>,
        now: Moment,
    ) -> bool {
        let table = self.table();
        subjects.into_iter().any(|(subject, revision)| {
            table.minimum(&subject, now).is_some_and(|minimum| revision < minimum.revision)
        })
    }

    fn revision_of(&self, subject: &Subject) -> Option<Revision> {
        self.table().by_subject.get(subject).map(|minimum| minimum.revision)
    }

    /// Returns the number of minimum revisions.
    pub(crate) fn len(&self) -> usize {
        self.table().by_subject.len()
    }

    fn bucket(&self, subject: &Subject) -> usize {
        // The low bits are as good as any.
        self.hasher.hash_one(subject) as usize % BUCKETS
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a replica holds.
impl MinimumRevisions {
    /// Returns whether what was read at `read_at`, by the database's clock, is not below the minimums of its subjects.
    pub(super) fn accept_read(
        &self,
        subjects: &[(Subject, Revision)],
        read_at: SystemTime,
    ) -> bool {
        let table = self.table();
        subjects.iter().all(|(subject, revision)| table.accepts(subject, *revision, read_at))
    }
}

/// Changes and copies that a shared cache holds.
#[cfg(feature = "redis")]
impl MinimumRevisions {
    /// Records a change if its revision is higher than the known minimum.
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

    /// Returns whether a copy that was read at `as_of`, by the database's clock, may be used.
    pub(super) fn accept_copy(&self, subjects: &[(Subject, Revision)], as_of: SystemTime) -> bool {
        if !self.is_caught_up() {
            return false;
        }
        let table = self.table();
        table.everything.is_none_or(|minimum| as_of >= minimum)
            && subjects.iter().all(|(subject, revision)| table.accepts(subject, *revision, as_of))
    }

    /// Returns whether a tombstone from `made_at` is valid.
    pub(super) fn accept_tombstone(&self, made_at: SystemTime) -> bool {
        self.table().everything.is_none_or(|minimum| made_at >= minimum)
    }
}

impl Table {
    /// Returns the minimum of a subject. A revision that the database has lost is never reached again: its minimum
    /// expires when no copy from before it is left.
    fn minimum(&self, subject: &Subject, now: Moment) -> Option<&Minimum> {
        let is_valid = |raised| now.since(raised) <= MINIMUM_REVISION_LIFETIME;
        self.by_subject.get(subject).filter(|minimum| minimum.raised.is_none_or(is_valid))
    }

    /// Returns whether an answer of this revision, read at `as_of`, is not below the minimum of its subject.
    fn accepts(&self, subject: &Subject, revision: Revision, as_of: SystemTime) -> bool {
        self.by_subject.get(subject).is_none_or(|minimum| {
            revision >= minimum.revision && minimum.as_of.is_none_or(|minimum| as_of >= minimum)
        })
    }

    fn evict_old(&mut self, now: Moment) {
        while let Some((raised, subject)) = self.raised.front() {
            if now.since(*raised) <= MINIMUM_REVISION_LIFETIME {
                break;
            }
            // Skip it if it was raised again since.
            if self.by_subject.get(subject).is_some_and(|minimum| minimum.raised == Some(*raised)) {
                self.by_subject.remove(subject);
            }
            self.raised.pop_front();
        }
        // If a few subjects change again and again, the queue is longer than the table.
        if self.raised.len() > 2 * self.by_subject.len() + 1024 {
            let minimums = &self.by_subject;
            self.raised.retain(|(raised, subject)| {
                minimums.get(subject).is_some_and(|minimum| minimum.raised == Some(*raised))
            });
        }
    }

    fn evict_all(&mut self, database_now: SystemTime) {
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
