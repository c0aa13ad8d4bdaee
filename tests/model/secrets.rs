//! The secrets of a key that is rotated, and what a request with one of them is answered.
//!
//! Secret 0 is the first one, and each rotation makes the next one. Until the end of the grace period the secret before
//! the current one is accepted, by the clock of the node that answers. All clocks of a run show the time of the database
//! plus the bound, so that the slowest one, which is behind by as much, shows no negative number.

use crate::database::{Answer, Change, Subject, Tick};
use crate::node::{LocalEntry, Moment, Node};
use crate::setup::Mechanism;

/// A rotation that a run explores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rotation {
    pub(crate) ids: LookupIds,
    pub(crate) grace: Tick,
    /// The most that a clock may be ahead or behind.
    pub(crate) skew: Tick,
    /// Whether clocks are corrected or go wrong at any time. Else each is wrong by the same all the time.
    pub(crate) are_clocks_set: bool,
}

/// The lookup ids of the first and of the later secrets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LookupIds {
    /// A structured key keeps its lookup id.
    Same,
    /// The first secret is in a legacy format, and has a lookup id of its own.
    Differ,
}

/// What a change does to the row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Edit {
    /// Something that has nothing to do with secrets.
    #[default]
    Other,
    /// The previous secret of an earlier rotation ends, if there is one.
    Rotate {
        ends_at: Tick,
    },
    EndGrace,
    Revoke,
}

/// What a row says of its secrets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Row {
    /// The number of the current secret.
    pub(crate) current: u8,
    /// Until when the secret before it is accepted. The row keeps it when that time is over.
    pub(crate) grace_ends_at: Option<Tick>,
    pub(crate) is_revoked: bool,
}

/// What a row says of the secret that a request presents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Current,
    Previous {
        ends_at: Tick,
    },
    /// Its hash is not in the row: not yet, or no more.
    Unknown,
}

impl Rotation {
    /// The subject that a change is reported under: the lookup ids of the row before it and after it.
    pub(crate) fn subject(self, before: Row, edit: Edit, are_both_reported: bool) -> Subject {
        let after = before.after(edit);
        match self.ids {
            LookupIds::Same => Subject::SharedId,
            LookupIds::Differ if !after.has_secret_of_first_id() => {
                let was_there = before.has_secret_of_first_id();
                if was_there { Subject::BothIds { are_both_reported } } else { Subject::Key(1) }
            }
            LookupIds::Differ if after.current == 0 => Subject::Key(0),
            LookupIds::Differ => Subject::BothIds { are_both_reported },
        }
    }

    /// The changes that can be made to a row. One that does nothing is none.
    pub(crate) fn edits(self, row: Row, now: Tick) -> impl Iterator<Item = Edit> {
        let ends_at = now + self.grace + self.skew;
        let rotate = (!row.is_revoked).then_some(Edit::Rotate { ends_at });
        let end_grace = row.grace_ends_at.map(|_| Edit::EndGrace);
        let revoke = (!row.is_revoked).then_some(Edit::Revoke);
        [rotate, end_grace, revoke].into_iter().flatten()
    }

    /// Whether anything is stored under the lookup id of a secret.
    pub(crate) fn has_entry(self, secret: usize, answer: Answer) -> bool {
        match (self.ids, secret) {
            (LookupIds::Same, _) => true,
            (LookupIds::Differ, 0) => answer.listed(0) != Standing::Unknown,
            (LookupIds::Differ, _) => answer.row.current > 0,
        }
    }

    /// The lists that nodes can have made of an answer. The secrets that a node lists are those that are accepted by
    /// its clock when it begins the look-up.
    pub(crate) fn lists(self, answer: Answer, timeout: Tick) -> [Option<Answer>; 2] {
        let earliest = answer.as_of - timeout.min(answer.as_of);
        let latest = answer.as_of + 2 * self.skew;
        let [with, without] = [earliest, latest].map(|clock| answer.listed_by(clock));
        [Some(with), (with != without).then_some(without)]
    }

    /// Whether an entry lives by the end of the grace period. One that is read after it lives as long as any.
    pub(crate) fn entry_lives(self, answer: Answer, now: Tick) -> bool {
        let by_database = |time: Tick| time + self.skew;
        answer
            .row
            .grace_ends_at
            .is_none_or(|ends_at| by_database(answer.as_of) > ends_at || by_database(now) < ends_at)
    }
}

impl Row {
    pub(crate) fn of(changes: impl Iterator<Item = Change>) -> Self {
        changes.fold(Self::default(), |row, change| row.after(change.edit))
    }

    fn after(self, edit: Edit) -> Self {
        match edit {
            Edit::Other => self,
            Edit::Rotate { ends_at } => {
                Self { current: self.current + 1, grace_ends_at: Some(ends_at), ..self }
            }
            Edit::EndGrace => Self { grace_ends_at: None, ..self },
            Edit::Revoke => Self { is_revoked: true, ..self },
        }
    }

    pub(crate) fn standing(self, secret: usize) -> Standing {
        let current = usize::from(self.current);
        match self.grace_ends_at {
            _ if secret == current => Standing::Current,
            Some(ends_at) if secret + 1 == current => Standing::Previous { ends_at },
            _ => Standing::Unknown,
        }
    }

    /// Whether a node whose clock shows this accepts the secret.
    pub(crate) fn accepts(self, secret: usize, clock: Tick) -> bool {
        let is_valid = match self.standing(secret) {
            Standing::Current => true,
            Standing::Previous { ends_at } => clock < ends_at,
            Standing::Unknown => false,
        };
        is_valid && !self.is_revoked
    }

    fn has_secret_of_first_id(self) -> bool {
        self.standing(0) != Standing::Unknown
    }
}

impl Answer {
    /// The answer with the secrets that are accepted by this clock.
    pub(crate) fn listed_by(self, clock: Tick) -> Self {
        let lists_previous = self.row.grace_ends_at.is_some_and(|ends_at| clock < ends_at);
        Self { lists_previous, ..self }
    }

    /// What the answer says of a secret. One whose end the reader's clock had passed is left out.
    pub(crate) fn listed(self, secret: usize) -> Standing {
        match self.row.standing(secret) {
            Standing::Previous { .. } if !self.lists_previous => Standing::Unknown,
            standing => standing,
        }
    }
}

impl Node {
    pub(crate) fn clock(&self, moment: Moment<'_>) -> Tick {
        moment.now + self.ahead
    }

    /// The clock by which a look-up that begins now lists secrets: one that has passed no end, if it is not looked at.
    pub(crate) fn listing_clock(&self, moment: Moment<'_>) -> Tick {
        let is_needed = self.is_rotated(moment) && !moment.has(Mechanism::ListedAfterTheEnd);
        if is_needed { self.clock(moment) } else { 0 }
    }

    /// Whether an answer from a copy accepts the secret. A copy that does not list it says nothing.
    pub(crate) fn judge_copy(
        &self,
        secret: usize,
        answer: Answer,
        moment: Moment<'_>,
    ) -> Option<bool> {
        let is_miss = self.is_rotated(moment) && answer.listed(secret) == Standing::Unknown;
        if is_miss && moment.has(Mechanism::CopyNeverDenies) {
            return None;
        }
        Some(self.accepts(secret, answer, Mechanism::EndInRedis, moment))
    }

    /// Whether an answer of the database accepts the secret, by the clock after the look-up.
    pub(crate) fn judge_read(&self, secret: usize, answer: Answer, moment: Moment<'_>) -> bool {
        self.accepts(secret, answer, Mechanism::EndAfterLookUp, moment)
    }

    /// Whether an entry of the local cache applies, by the clock: one that accepts the previous secret until its end,
    /// one that denies it from then on.
    pub(crate) fn applies(&self, secret: usize, entry: LocalEntry, moment: Moment<'_>) -> bool {
        let LocalEntry { answer, is_accepted, .. } = entry;
        match answer.row.standing(secret) {
            Standing::Previous { ends_at } if is_accepted => {
                self.clock(moment) < ends_at || !moment.has(Mechanism::EndInLocalCache)
            }
            Standing::Previous { ends_at } if !answer.row.is_revoked => {
                self.clock(moment) >= ends_at || answer.listed(secret) == Standing::Unknown
            }
            _ => true,
        }
    }

    fn accepts(&self, secret: usize, answer: Answer, check: Mechanism, moment: Moment<'_>) -> bool {
        if !self.is_rotated(moment) {
            return true;
        }
        let is_accepted = match answer.listed(secret) {
            Standing::Current => true,
            Standing::Previous { ends_at } => self.clock(moment) < ends_at || !moment.has(check),
            Standing::Unknown => false,
        };
        is_accepted && !answer.row.is_revoked
    }

    fn is_rotated(&self, moment: Moment<'_>) -> bool {
        moment.setup.rotation.is_some()
    }
}
