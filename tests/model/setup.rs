//! What one run of the checker explores: how many nodes, keys and changes, which faults, and which
//! mechanism is taken out to see what it was for.

use std::ops::Range;

use crate::database::{Answer, Tick};
use crate::secrets::{LookupIds, Rotation};

/// The parts of the protocol that a test can do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mechanism {
    /// Nothing below a minimum revision is served, wherever it comes from.
    MinimumRevision,
    /// The minimum revision goes up before the generation moves. Without it the other way round.
    MinimumFirst,
    /// A hit compares the entry's generation with the bucket's.
    Generation,
    /// The generation of an entry is the one from before its read. Without it the one at its fill.
    GenerationBeforeRead,
    /// A look-up that began before the last processed change is not joined.
    LookUpCheck,
    /// Redis rejects a write of a lower revision than the one it holds.
    RevisionCompare,
    /// Key and owner have a revision each. Without it the higher of the two stands for both.
    RevisionPerSubject,
    /// A tombstone shows whether the key or its owner changed. Without it the key's
    /// minimum revision is raised, whatever it was.
    TombstoneOfSubject,
    /// A node that starts reads the changes of one entry lifetime before it trusts Redis.
    CatchUp,
    /// Age is looked at before an answer is served.
    AgeRule,
    /// A minimum revision is kept for as long as an entry of Redis lives and a look-up that holds one takes.
    MinimumOutlivesLookUp,
    /// The life of a minimum revision counts from the commit of the change, or later. Without it from the
    /// begin of its transaction, as a row's `now()` would have it.
    RowTimeOfCommit,
    /// A read of the feed that finds triggers missing is no sync.
    SyncNeedsTriggers,
    /// When the triggers are back, everything is reset before the next sync.
    ResetWhenBack,
    /// A reset counts for what a look-up has taken out of Redis before it, too.
    ResetCoversLookUps,
    /// The feed checks that a row of each transaction that it has read is still there. Without it
    /// only a row of the latest transaction.
    EveryRowChecked,
    /// Names and MACs in Redis are bound to the database.
    BoundToDatabase,
    /// A hit of the previous secret checks the end of the grace period.
    EndInLocalCache,
    /// So does the use of an entry of Redis.
    EndInRedis,
    /// So does a look-up when the database has answered, however long that took.
    EndAfterLookUp,
    /// A read of the database lists the previous secret also after its end, so that a denial is one for that reason,
    /// and applies from the end on. Without it the secret is unknown to a node whose clock has passed the end.
    ListedAfterTheEnd,
    /// A change is reported under the lookup ids of both secrets. Without it only under the new one.
    BothIdsReported,
    /// An entry of Redis lists the previous secret beside the current one.
    PreviousListed,
    /// An entry of Redis that does not list the secret is a miss. Without it the secret is denied.
    CopyNeverDenies,
}

/// What may happen to the database once in a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Break {
    /// The triggers are dropped, and made anew later.
    TriggersMissing,
    /// A failover loses the last commits, in the order in which they committed.
    CommitsLost,
    /// A clone goes on by itself, with nodes of its own on the same Redis.
    Clone,
}

/// The bounds of the rule of age, in ticks of the model's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ages {
    pub(crate) max_staleness: Tick,
    pub(crate) stale_if_error: Tick,
    /// How long an entry of Redis, and with it a minimum revision, can live.
    pub(crate) entry_lifetime: Tick,
    /// How long one look-up may take.
    pub(crate) look_up_timeout: Tick,
}

impl Ages {
    /// An answer may be served in the tick in which it was true.
    const LEAST: Self =
        Self { max_staleness: 0, stale_if_error: 0, entry_lifetime: 1, look_up_timeout: 0 };
}

/// Who writes to Redis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writers {
    /// The modelled nodes: what they have read and processed, late, twice or never.
    Nodes,
    /// A fleet around them: whatever was true once may be filled, and each change buried, at any
    /// time. Every behaviour of any number of further nodes is among these.
    Fleet,
}

/// How finely the steps of a node are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detail {
    /// Minimum revision and generation move in two steps, and a look-up that is not joined goes on.
    Fine,
    /// They move in one, and such a look-up is let go: for runs that have more of something else.
    Coarse,
}

/// One configuration.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub(crate) nodes: usize,
    /// The keys that requests present, at most two. If the key is rotated, its secrets: the first, the second, or both.
    pub(crate) keys: Range<usize>,
    pub(crate) changes: u8,
    /// Whether changes of the owner that all keys share are among the changes.
    pub(crate) owner_changes: bool,
    /// Whether a change can take its revision and commit only after a later one.
    pub(crate) late_commits: bool,
    pub(crate) writers: Writers,
    pub(crate) detail: Detail,
    /// How many times, all together, a node may crash, or Redis may lose its memory or go back to
    /// an earlier state. Lost and late messages, and servers out of reach, cost nothing: they can
    /// happen at every step.
    pub(crate) faults: u8,
    pub(crate) breaks: Option<Break>,
    /// Whether the triggers can be gone and back, or commits be made and lost, without a read of
    /// each node's feed in between.
    pub(crate) breaks_unseen: bool,
    /// Whether a break leaves a mark that a feed finds with any later read (a row that resets, the
    /// timeline of the server).
    pub(crate) reads_marks: bool,
    /// The last tick of the clock; 0 stops it, and with it the rule of age.
    pub(crate) ticks: Tick,
    pub(crate) ages: Ages,
    /// Whether the changes are those of one key that is rotated.
    pub(crate) rotation: Option<Rotation>,
    pub(crate) without: Option<Mechanism>,
}

impl Setup {
    /// One node within a fleet, one key, two changes, two faults, and a clock that stands still.
    pub(crate) fn one_key() -> Self {
        Self {
            nodes: 1,
            keys: 0..1,
            changes: 2,
            owner_changes: false,
            late_commits: false,
            writers: Writers::Fleet,
            detail: Detail::Fine,
            faults: 2,
            breaks: None,
            breaks_unseen: false,
            reads_marks: false,
            ticks: 0,
            ages: Ages {
                max_staleness: 1,
                stale_if_error: 1,
                entry_lifetime: 2,
                look_up_timeout: 1,
            },
            rotation: None,
            without: None,
        }
    }

    /// The least there is to explore. What breaks here needs no fault but a late or lost message.
    pub(crate) fn one_change() -> Self {
        Self { changes: 1, faults: 0, ..Self::one_key() }
    }

    /// One change of one key, with a clock that runs long enough to pass every bound.
    pub(crate) fn with_time() -> Self {
        Self { ticks: 4, faults: 1, ..Self::one_change() }
    }

    /// A key and its owner, whose changes may commit in another order than they began.
    pub(crate) fn key_and_owner() -> Self {
        Self { owner_changes: true, late_commits: true, faults: 1, ..Self::one_key() }
    }

    /// Two nodes, and no writes to Redis but theirs.
    pub(crate) fn two_nodes() -> Self {
        let detail = Detail::Coarse;
        Self { nodes: 2, writers: Writers::Nodes, detail, faults: 1, ..Self::one_key() }
    }

    /// Two keys of one owner in one bucket.
    pub(crate) fn two_keys() -> Self {
        let (writers, detail) = (Writers::Nodes, Detail::Coarse);
        Self { keys: 0..2, owner_changes: true, writers, detail, faults: 0, ..Self::one_key() }
    }

    /// One key whose change leaves no row while the triggers are missing.
    pub(crate) fn triggers_missing() -> Self {
        let (breaks, detail) = (Some(Break::TriggersMissing), Detail::Coarse);
        Self { breaks, detail, ticks: 2, ages: Ages::LEAST, ..Self::one_change() }
    }

    /// A key and its owner, whose changes may be lost in another order than they were numbered.
    pub(crate) fn commits_lost() -> Self {
        let (breaks, detail) = (Some(Break::CommitsLost), Detail::Coarse);
        Self { breaks, detail, faults: 0, ..Self::key_and_owner() }
    }

    /// The same with a clock.
    pub(crate) fn commits_lost_in_time() -> Self {
        Self { ticks: 1, ages: Ages::LEAST, writers: Writers::Nodes, ..Self::commits_lost() }
    }

    /// One key of a database that is cloned.
    pub(crate) fn cloned() -> Self {
        Self { breaks: Some(Break::Clone), faults: 0, ..Self::one_key() }
    }

    /// A break that no read of a feed need come between, and a clock that stands still.
    pub(crate) fn unseen(breaks: Break, faults: u8) -> Self {
        let owner_changes = breaks == Break::CommitsLost;
        let (breaks, detail) = (Some(breaks), Detail::Coarse);
        Self { breaks, detail, faults, breaks_unseen: true, owner_changes, ..Self::one_key() }
    }

    pub(crate) fn with_marks(self) -> Self {
        Self { reads_marks: true, ..self }
    }

    /// One key that is rotated, and changed once more, and requests with some of its secrets. Time stands still, but a
    /// clock that is ahead passes the end of the grace period.
    pub(crate) fn rotated(ids: LookupIds, keys: Range<usize>) -> Self {
        let rotation = Some(Rotation { ids, grace: 1, skew: 1, are_clocks_set: true });
        Self { keys, rotation, detail: Detail::Coarse, faults: 0, ..Self::one_key() }
    }

    /// One key that is rotated once, with time. An answer is out of date for less time than the grace period takes by the
    /// fastest clock.
    pub(crate) fn rotated_in_time(ids: LookupIds, keys: Range<usize>) -> Self {
        let ages = Ages { stale_if_error: 1, look_up_timeout: 1, ..Ages::LEAST };
        Self { changes: 1, ticks: 2, ages, ..Self::rotated(ids, keys) }
    }

    /// The same with clocks that are wrong by the same all the time.
    pub(crate) fn with_steady_clocks(self) -> Self {
        let rotation = self.rotation.map(|it| Rotation { are_clocks_set: false, ..it });
        Self { rotation, ..self }
    }

    /// The secret that a request with a key presents.
    pub(crate) fn secret(&self, key: usize) -> usize {
        if self.rotation.is_some() { key } else { 0 }
    }

    /// The most that a clock may be ahead or behind.
    pub(crate) fn skew(&self) -> Tick {
        self.rotation.map_or(0, |rotation| rotation.skew)
    }

    /// The entries of Redis that a write for a key changes. Secrets with one lookup id have one entry, which the model
    /// keeps under each of them.
    pub(crate) fn entries(&self, key: usize) -> Range<usize> {
        match self.rotation {
            Some(Rotation { ids: LookupIds::Same, .. }) => self.keys.clone(),
            _ => key..key + 1,
        }
    }

    /// The entries of Redis that nodes can have made of an answer.
    pub(crate) fn entries_of(&self, key: usize, answer: Answer) -> Vec<Answer> {
        let Some(rotation) = self.rotation else { return vec![answer] };
        let lists = if !self.has(Mechanism::PreviousListed) {
            [Some(answer), None]
        } else if self.has(Mechanism::ListedAfterTheEnd) {
            [Some(answer.listed_by(0)), None]
        } else {
            rotation.lists(answer, self.ages.look_up_timeout)
        };
        lists.into_iter().flatten().filter(|list| rotation.has_entry(key, *list)).collect()
    }

    pub(crate) fn has(&self, mechanism: Mechanism) -> bool {
        self.without != Some(mechanism)
    }

    pub(crate) fn without(self, mechanism: Mechanism) -> Self {
        Self { without: Some(mechanism), ..self }
    }
}
