//! Redis: one entry a key, written only by a script that compares revisions, and trusted for
//! nothing else.

use crate::database::{Answer, Change, KEYS, Revisions, Subject, Tick};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Entry {
    #[default]
    Empty,
    Data(Answer),
    /// "Nothing before these revisions": what a delete leaves for nodes that the database cannot
    /// tell. And the time of the oldest thing that its revisions are from.
    Tombstone(Revisions, Tick),
}

impl Entry {
    pub(crate) fn revisions(self) -> Revisions {
        match self {
            Entry::Empty => Revisions::default(),
            Entry::Data(answer) => answer.revisions,
            Entry::Tombstone(revisions, _) => revisions,
        }
    }

    fn time(self) -> Option<Tick> {
        match self {
            Entry::Empty => None,
            Entry::Data(answer) => Some(answer.as_of),
            Entry::Tombstone(_, since) => Some(since),
        }
    }
}

/// What the script does with a revision lower than the one it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Script {
    /// Compares the key's and the owner's revision, each with its own.
    Compares,
    /// Compares the higher of the two.
    ComparesHighest,
    /// Writes whatever comes.
    Overwrites,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Redis {
    pub(crate) entries: [Entry; KEYS],
    /// Not part of Redis: the revisions of the tombstones that reached it since it last lost
    /// memory. The properties look at it.
    pub(crate) buried: [Revisions; KEYS],
}

impl Redis {
    pub(crate) fn rejects(&self, key: usize, answer: Answer, script: Script) -> bool {
        let (new, held) = (answer.revisions, self.entries[key].revisions());
        match script {
            Script::Compares => !new.covers(held),
            Script::ComparesHighest => new.highest() < held.highest(),
            Script::Overwrites => false,
        }
    }

    pub(crate) fn fill(&mut self, key: usize, answer: Answer, script: Script) {
        if !self.rejects(key, answer, script) {
            self.entries[key] = Entry::Data(answer);
        }
    }

    /// A delete: leaves a tombstone, unless the entry has the change in it.
    pub(crate) fn bury(&mut self, key: usize, change: Change, script: Script) {
        let grave = match change.subject {
            Subject::Owner => Revisions { key: 0, owner: change.revision },
            _ => Revisions { key: change.revision, owner: 0 },
        };
        let held = self.entries[key].revisions();
        self.buried[key] = self.buried[key].max(grave);
        match script {
            Script::Compares if held.covers(grave) => {}
            Script::Compares => {
                let since = self.entries[key].time().map_or(change.at, |time| time.min(change.at));
                self.entries[key] = Entry::Tombstone(held.max(grave), since);
            }
            Script::ComparesHighest if held.highest() >= grave.highest() => {}
            Script::ComparesHighest | Script::Overwrites => {
                self.entries[key] = Entry::Tombstone(grave, change.at);
            }
        }
    }

    /// Loses all memory, or all but some earlier state.
    pub(crate) fn become_again(&mut self, earlier: [Entry; KEYS]) {
        *self = Self { entries: earlier, ..Self::default() };
    }
}
