//! The database: the truth, the revisions that order it, and the table of changes.

pub(crate) type Revision = u8;
pub(crate) type Tick = u8;

/// The most keys and the most changes that a model has.
pub(crate) const KEYS: usize = 2;
pub(crate) const CHANGES: usize = 3;

/// Whose row a change touches. All keys of a model belong to one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Subject {
    Key(u8),
    Owner,
}

impl Subject {
    pub(crate) fn touches(self, key: usize) -> bool {
        match self {
            Subject::Key(changed) => usize::from(changed) == key,
            Subject::Owner => true,
        }
    }
}

/// A row of the change table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Change {
    pub(crate) subject: Subject,
    pub(crate) revision: Revision,
    /// When it committed.
    pub(crate) at: Tick,
    /// The time that its row bears, from which the life of its floor counts.
    pub(crate) dated: Tick,
}

/// How far something has come: a revision for each key and one for the owner. What a node has
/// processed is one, and so are its floors.
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
        change.revision <= *self.clone().slot(change.subject)
    }

    pub(crate) fn raise(&mut self, change: Change) {
        let slot = self.slot(change.subject);
        *slot = change.revision.max(*slot);
    }

    pub(crate) fn raise_to(&mut self, key: usize, revisions: Revisions) {
        self.keys[key] = self.keys[key].max(revisions.key);
        self.owner = self.owner.max(revisions.owner);
    }

    /// Forgets what `change` has raised, if nothing has gone further since.
    pub(crate) fn forget(&mut self, change: Change) {
        let slot = self.slot(change.subject);
        if *slot == change.revision {
            *slot = 0;
        }
    }

    /// A number that moves with every change that is added.
    pub(crate) fn count(&self) -> u8 {
        self.keys.iter().sum::<u8>() + self.owner
    }

    fn slot(&mut self, subject: Subject) -> &mut Revision {
        match subject {
            Subject::Key(key) => &mut self.keys[usize::from(key)],
            Subject::Owner => &mut self.owner,
        }
    }
}

/// The revisions that an answer, a tombstone or a floor for one key has: the key's and its
/// owner's. They come from one sequence, but they can commit in another order than they were
/// drawn, so one never stands for the other.
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

/// What a read of the database says of one key, and when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Answer {
    pub(crate) revisions: Revisions,
    pub(crate) as_of: Tick,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Database {
    /// In the order of the commits, which is not always that of the revisions.
    committed: [Option<Change>; CHANGES],
    /// A change that has its revision, and the lock on its row, but has not committed.
    open: Option<Begun>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Begun {
    subject: Subject,
    revision: Revision,
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

    /// How many revisions have been drawn.
    pub(crate) fn drawn(&self) -> u8 {
        self.changes().count() as u8 + u8::from(self.open.is_some())
    }

    /// The subject whose row a change that has not committed holds locked.
    pub(crate) fn locked(&self) -> Option<Subject> {
        self.open.map(|begun| begun.subject)
    }

    /// Draws a revision for a change that commits later.
    pub(crate) fn begin(&mut self, subject: Subject, now: Tick) {
        self.open = Some(Begun { subject, revision: self.drawn() + 1, at: now });
    }

    pub(crate) fn commit_begun(&mut self, now: Tick, time: RowTime) {
        if let Some(Begun { subject, revision, at }) = self.open.take() {
            let dated = if time == RowTime::Commit { now } else { at };
            self.append(Change { subject, revision, at: now, dated });
        }
    }

    /// Draws a revision and commits at once.
    pub(crate) fn commit(&mut self, subject: Subject, now: Tick) {
        self.append(Change { subject, revision: self.drawn() + 1, at: now, dated: now });
    }

    fn append(&mut self, change: Change) {
        if let Some(free) = self.committed.iter_mut().find(|slot| slot.is_none()) {
            *free = Some(change);
        }
    }

    pub(crate) fn read(&self, key: usize, now: Tick) -> Answer {
        Answer { revisions: self.truth(key), as_of: now }
    }

    pub(crate) fn truth(&self, key: usize) -> Revisions {
        self.progress().of(key)
    }

    /// All that has committed.
    pub(crate) fn progress(&self) -> Progress {
        let mut progress = Progress::default();
        self.changes().for_each(|change| progress.raise(change));
        progress
    }

    /// For how long an answer has been out of date: since the first commit that it lacks.
    pub(crate) fn superseded_for(&self, key: usize, answer: Answer, now: Tick) -> Tick {
        let lacks = |change: &Change| match change.subject {
            Subject::Key(_) => change.revision > answer.revisions.key,
            Subject::Owner => change.revision > answer.revisions.owner,
        };
        let first = self.changes().find(|change| change.subject.touches(key) && lacks(change));
        first.map_or(0, |change| now - change.at)
    }

    /// How many commits lead to these revisions of `key`: a number for each version of the truth.
    pub(crate) fn version(&self, key: usize, revisions: Revisions) -> u8 {
        let mut past = Progress::default();
        let mut older = self.changes().take_while(|change| {
            let lacks = past.of(key) != revisions;
            past.raise(*change);
            lacks
        });
        older.by_ref().count() as u8
    }

    /// Every answer for `key` that a read, at some time up to now, has been able to give.
    pub(crate) fn history(&self, key: usize, now: Tick) -> Vec<Answer> {
        let mut past = Progress::default();
        let mut since = 0;
        let mut answers = Vec::new();
        for change in self.changes() {
            answers.extend(reads(past.of(key), since, change.at));
            past.raise(change);
            since = change.at;
        }
        answers.extend(reads(past.of(key), since, now));
        answers.dedup();
        answers
    }
}

fn reads(revisions: Revisions, from: Tick, to: Tick) -> impl Iterator<Item = Answer> {
    (from..=to).map(move |as_of| Answer { revisions, as_of })
}
