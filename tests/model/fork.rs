//! A database that is no longer what it was: the failover that loses commits, the clone, and the
//! triggers that were missing.

use crate::database::{
    Answer, Change, Database, Identity, Log, OF_A_CLONE, Revisions, Subject, Tick, reads,
};

/// Where a history parts from this database's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Fork {
    /// The commits up to then.
    former: Log,
    /// How many of them both histories have.
    common: u8,
    at: Tick,
}

impl Database {
    /// Fails over to a copy that has no more than the first `kept` commits.
    pub(crate) fn fail_over(&mut self, kept: u8, now: Tick) {
        self.fork = Some(Fork { former: self.committed, common: kept, at: now });
        self.committed[usize::from(kept)..].fill(None);
        self.open = None;
        self.is_marked = true;
    }

    /// Makes a copy that goes on by itself.
    pub(crate) fn make_clone(&mut self, now: Tick) -> Database {
        let common = self.changes().count() as u8;
        self.fork = Some(Fork { former: self.committed, common, at: now });
        Self { is_clone: true, open: None, ..*self }
    }

    pub(crate) fn restore_triggers(&mut self) {
        self.is_marked |= self.lacks_triggers;
        self.lacks_triggers = false;
    }

    /// The commits that are lost if no more than `kept` survive.
    pub(crate) fn after(&self, kept: u8) -> impl Iterator<Item = Change> + '_ {
        self.changes().skip(usize::from(kept))
    }

    /// All rows that the change table has held, lost ones included.
    pub(crate) fn rows_ever(&self) -> impl Iterator<Item = Change> + '_ {
        let lost = self.fork.iter().flat_map(|fork| fork.former.iter().flatten().copied());
        let lost = lost.filter(|change| change.revision > 0 && !self.contains(change.identity));
        self.rows().chain(lost)
    }

    /// Every answer for `key` that a read, at some time up to now, has been able to give.
    pub(crate) fn history(&self, key: usize, now: Tick) -> Vec<Answer> {
        let Some(fork) = &self.fork else { return reads(&self.committed, key, 0, now) };
        let mut answers = reads(&fork.former, key, 0, fork.at);
        answers.extend(reads(&self.committed, key, fork.at, now));
        answers
    }

    pub(crate) fn contains(&self, identity: Identity) -> bool {
        identity == 0 || self.changes().any(|change| change.identity == identity)
    }

    /// Whether an answer has a change in it that this database does not have.
    pub(crate) fn is_strange(&self, answer: Answer) -> bool {
        !self.contains(answer.content.key) || !self.contains(answer.content.owner)
    }

    /// The last changes of this database that a read with `content` has in it. Changes of one
    /// subject commit in the order of their identities.
    pub(crate) fn shared(&self, key: usize, content: Revisions) -> Revisions {
        if self.fork.is_none() {
            return content;
        }
        let last = |subject: Subject, identity: Identity| {
            let common = self.fork.map_or(0, |fork| usize::from(fork.common));
            let known = if identity > OF_A_CLONE { common } else { usize::MAX };
            let of_subject = self.changes().take(known).filter(|change| change.subject == subject);
            let identities = of_subject.map(|change| change.identity);
            identities.filter(|shared| *shared <= identity).max().unwrap_or(0)
        };
        Revisions {
            key: last(Subject::Key(key as u8), content.key),
            owner: last(Subject::Owner, content.owner),
        }
    }

    /// For how long an answer has been out of date: since the first commit that it lacks, or since
    /// this database does not have what the answer has.
    pub(crate) fn superseded_for(&self, key: usize, answer: Answer, now: Tick) -> Tick {
        let shared = self.shared(key, answer.content);
        let lacks = |change: &Change| match change.subject {
            Subject::Owner => change.identity > shared.owner,
            _ => change.identity > shared.key,
        };
        let first = self.changes().find(|change| change.subject.touches(key) && lacks(change));
        let parted = self.fork.filter(|_| self.is_strange(answer)).map(|fork| fork.at);
        first.map(|change| change.at).into_iter().chain(parted).min().map_or(0, |at| now - at)
    }
}
