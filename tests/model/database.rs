//! The database: the truth, the revisions that order it, and the table of changes.

use crate::fork::Fork;
use crate::secrets::{Edit, Row};

pub(crate) type Revision = u8;
/// Number of one change. Unlike a revision it is never given again, and changes without a trigger
/// have one too.
pub(crate) type Identity = u8;
pub(crate) type Tick = u8;

/// The most keys and the most changes that a model has.
pub(crate) const KEYS: usize = 2;
pub(crate) const CHANGES: usize = 3;

/// What a change is reported under: a lookup id, with the number of the key that is presented, or the owner. All keys of
/// a model belong to one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Subject {
    Key(u8),
    Owner,
    /// The one lookup id of all secrets of a key.
    SharedId,
    /// The lookup ids of the first and of the later secrets. It is a row of the change table for each.
    BothIds {
        are_both_reported: bool,
    },
}

impl Subject {
    pub(crate) fn touches(self, key: usize) -> bool {
        match self {
            Subject::Key(changed) => usize::from(changed) == key,
            Subject::Owner | Subject::SharedId | Subject::BothIds { .. } => true,
        }
    }
}

/// A row of the change table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Change {
    pub(crate) subject: Subject,
    /// 0 for a change that was made while the triggers were missing: it has no row either.
    pub(crate) revision: Revision,
    pub(crate) identity: Identity,
    /// When it committed.
    pub(crate) at: Tick,
    /// The time that its row bears, from which the life of its minimum revision counts.
    pub(crate) dated: Tick,
    pub(crate) edit: Edit,
}

impl Change {
    /// Its rows in the change table: none without a trigger, else one for each lookup id or owner.
    fn rows(self) -> impl Iterator<Item = Self> {
        let subjects = match self.subject {
            Subject::BothIds { are_both_reported: true } => {
                [Some(Subject::Key(0)), Some(Subject::Key(1))]
            }
            Subject::BothIds { are_both_reported: false } => [None, Some(Subject::Key(1))],
            subject => [Some(subject), None],
        };
        let subjects = subjects.into_iter().filter(move |_| self.revision > 0);
        subjects.flatten().map(move |subject| Self { subject, ..self })
    }
}

/// How far something has come: a number for each key and one for the owner. What a node has
/// processed is one, and so are its minimum revisions (revisions), and the rows that its feed checks
/// (identities).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Progress {
    keys: [Revision; KEYS],
    owner: Revision,
}

impl Progress {
    pub(crate) fn of(&self, key: usize) -> Revisions {
        Revisions { key: self.keys[key], owner: self.owner }
    }

    pub(crate) fn has(&self, change: Change) -> bool {
        change.revision <= self.number(change.subject)
    }

    pub(crate) fn raise(&mut self, change: Change) {
        self.update(change.subject, |slot| *slot = change.revision.max(*slot));
    }

    pub(crate) fn has_identity(&self, change: Change) -> bool {
        change.identity <= self.number(change.subject)
    }

    pub(crate) fn raise_identity(&mut self, change: Change) {
        self.update(change.subject, |slot| *slot = change.identity.max(*slot));
    }

    pub(crate) fn raise_to(&mut self, key: usize, revisions: Revisions) {
        self.keys[key] = self.keys[key].max(revisions.key);
        self.owner = self.owner.max(revisions.owner);
    }

    /// Forgets what `change` has raised, if nothing has gone further since.
    pub(crate) fn forget(&mut self, change: Change) {
        self.update(change.subject, |slot| {
            if *slot == change.revision {
                *slot = 0;
            }
        });
    }

    pub(crate) fn numbers(&self) -> impl Iterator<Item = u8> {
        self.keys.into_iter().chain([self.owner])
    }

    /// A number that moves with every change that is added.
    pub(crate) fn count(&self) -> u8 {
        self.keys.iter().sum::<u8>() + self.owner
    }

    /// The numbers of two lookup ids that one change is reported under are equal, or one has gone further.
    fn number(&self, subject: Subject) -> Revision {
        match subject {
            Subject::Key(key) => self.keys[usize::from(key)],
            Subject::Owner => self.owner,
            Subject::SharedId | Subject::BothIds { .. } => self.keys[0].min(self.keys[1]),
        }
    }

    fn update(&mut self, subject: Subject, mut update: impl FnMut(&mut Revision)) {
        match subject {
            Subject::Key(key) => update(&mut self.keys[usize::from(key)]),
            Subject::Owner => update(&mut self.owner),
            Subject::SharedId | Subject::BothIds { .. } => self.keys.iter_mut().for_each(update),
        }
    }
}

/// The revisions that an answer, a tombstone or a minimum revision for one key has: the key's and its
/// owner's. They come from one sequence, but they can commit in another order than they were
/// drawn, so one never stands for the other. Also a pair of identities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Revisions {
    pub(crate) key: Revision,
    pub(crate) owner: Revision,
}

impl Revisions {
    pub(crate) fn covers(self, other: Revisions) -> bool {
        self.key >= other.key && self.owner >= other.owner
    }

    pub(crate) fn max(self, other: Revisions) -> Revisions {
        Revisions { key: self.key.max(other.key), owner: self.owner.max(other.owner) }
    }

    pub(crate) fn highest(self) -> Revision {
        self.key.max(self.owner)
    }
}

/// What a read of the database returns for one key, and when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Answer {
    pub(crate) revisions: Revisions,
    /// Not known to those who read it: the identities of the last changes that are in it. The
    /// properties look at it, because revisions can be given again.
    pub(crate) content: Revisions,
    pub(crate) as_of: Tick,
    pub(crate) row: Row,
    /// Whether the previous secret is among those that the answer lists.
    pub(crate) lists_previous: bool,
}

/// Changes in the order of their commits, which is not always that of the revisions.
pub(crate) type Log = [Option<Change>; CHANGES];

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Database {
    pub(crate) committed: Log,
    /// A change that has its revision, and the lock on its row, but has not committed.
    pub(crate) open: Option<Begun>,
    /// How many changes have begun, lost ones included.
    pub(crate) begun: u8,
    pub(crate) lacks_triggers: bool,
    /// The failover that lost commits, or the moment when a clone was made.
    pub(crate) fork: Option<Fork>,
    /// Whether this is the clone.
    pub(crate) is_clone: bool,
    /// Whether commits were lost, or the triggers were missing and are back.
    pub(crate) is_marked: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Begun {
    subject: Subject,
    revision: Revision,
    identity: Identity,
    at: Tick,
}

/// Which time a row of the change table bears, if it was not written and committed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowTime {
    Commit,
    Begin,
}

impl Database {
    pub(crate) fn changes(&self) -> impl DoubleEndedIterator<Item = Change> + '_ {
        self.committed.iter().flatten().copied()
    }

    /// What the change table holds.
    pub(crate) fn rows(&self) -> impl Iterator<Item = Change> + '_ {
        self.changes().flat_map(Change::rows)
    }

    /// What the row of a key that is rotated says now.
    pub(crate) fn row(&self) -> Row {
        Row::of(self.changes())
    }

    /// The subject whose row a change that has not committed holds locked.
    pub(crate) fn locked(&self) -> Option<Subject> {
        self.open.map(|begun| begun.subject)
    }

    /// Draws a revision for a change that commits later.
    pub(crate) fn begin(&mut self, subject: Subject, now: Tick) {
        let revision = self.draw();
        self.open = Some(Begun { subject, revision, identity: self.next_identity(), at: now });
    }

    pub(crate) fn commit_begun(&mut self, now: Tick, time: RowTime) {
        if let Some(Begun { subject, revision, identity, at }) = self.open.take() {
            let dated = if time == RowTime::Commit { now } else { at };
            let edit = Edit::Other;
            self.append(Change { subject, revision, identity, at: now, dated, edit });
        }
    }

    /// Draws a revision and commits at once.
    pub(crate) fn commit(&mut self, subject: Subject, edit: Edit, now: Tick) {
        let revision = if self.lacks_triggers { 0 } else { self.draw() };
        let identity = self.next_identity();
        self.append(Change { subject, revision, identity, at: now, dated: now, edit });
    }

    /// After a failover the sequence goes on from what has survived: revisions are given again.
    fn draw(&self) -> Revision {
        let open = self.open.map(|begun| begun.revision);
        self.changes().map(|change| change.revision).chain(open).max().unwrap_or(0) + 1
    }

    fn next_identity(&mut self) -> Identity {
        self.begun += 1;
        self.begun + if self.is_clone { OF_A_CLONE } else { 0 }
    }

    fn append(&mut self, change: Change) {
        if let Some(free) = self.committed.iter_mut().find(|slot| slot.is_none()) {
            *free = Some(change);
        }
    }

    pub(crate) fn read(&self, key: usize, now: Tick) -> Answer {
        read(&self.committed, key, now)
    }

    /// All that has committed and has a revision.
    pub(crate) fn progress(&self) -> Progress {
        let mut progress = Progress::default();
        self.changes().for_each(|change| progress.raise(change));
        progress
    }

    /// All that has committed, as identities.
    pub(crate) fn identities(&self) -> Progress {
        let mut identities = Progress::default();
        self.changes().for_each(|change| identities.raise_identity(change));
        identities
    }
}

/// The identities of a clone's own changes are above this one.
pub(crate) const OF_A_CLONE: Identity = 8;

fn read(log: &[Option<Change>], key: usize, now: Tick) -> Answer {
    let (mut revisions, mut content) = (Progress::default(), Progress::default());
    for change in log.iter().flatten() {
        revisions.raise(*change);
        content.raise_identity(*change);
    }
    let row = Row::of(log.iter().flatten().copied());
    let (revisions, content) = (revisions.of(key), content.of(key));
    Answer { revisions, content, as_of: now, row, lists_previous: false }
}

/// Every answer for `key` that a read of a database with this log, between two times, has been able
/// to give.
pub(crate) fn reads(log: &Log, key: usize, from: Tick, to: Tick) -> Vec<Answer> {
    let mut answers = Vec::new();
    let mut since = 0;
    let times = log.iter().flatten().map(|change| change.at).chain([to]);
    for (past, until) in times.enumerate() {
        let seen = since.max(from)..=until.min(to);
        answers.extend(seen.map(|as_of| read(&log[..past], key, as_of)));
        since = until;
    }
    answers.dedup();
    answers
}
