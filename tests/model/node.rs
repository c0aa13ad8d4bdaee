//! A node: what it has learned of changes, and what it serves without asking anybody.

use crate::database::{Answer, Change, Database, KEYS, Progress, Revisions, Tick};
use crate::look_up::LookUp;
use crate::setup::{Mechanism, Setup};

/// The time, and the rules of the run: what a step looks at besides the node itself.
#[derive(Clone, Copy)]
pub(crate) struct Moment<'a> {
    pub(crate) setup: &'a Setup,
    pub(crate) now: Tick,
}

impl Moment<'_> {
    pub(crate) fn has(&self, mechanism: Mechanism) -> bool {
        self.setup.has(mechanism)
    }

    /// Whether an entry of Redis still lives.
    pub(crate) fn entry_lives(&self, answer: Answer) -> bool {
        self.now - answer.as_of <= self.setup.ages.entry_lifetime
            && self.setup.rotation.is_none_or(|rotation| rotation.entry_lives(answer, self.now))
    }

    /// Whether the minimum revision of a change dated so is still needed: a look-up may hold an entry that was
    /// read when it had just not expired.
    pub(crate) fn minimum_lives(&self, dated: Tick) -> bool {
        let ages = self.setup.ages;
        let look_up =
            if self.has(Mechanism::MinimumOutlivesLookUp) { ages.look_up_timeout } else { 0 };
        self.now - dated <= ages.entry_lifetime + look_up
    }
}

pub(crate) type Generation = (u8, u8);

/// What the local cache holds of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LocalEntry {
    pub(crate) answer: Answer,
    pub(crate) generation: Generation,
    /// Whether it is the entry of a valid key. Else it is a negative one.
    pub(crate) is_accepted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Node {
    /// Nothing below is served.
    pub(crate) minimum: Progress,
    /// The changes of the feed that this life of the node is done with.
    pub(crate) processed: Progress,
    /// The same as identities of rows: the last one of each subject. The feed checks that they are
    /// still there.
    pub(crate) rows_read: Progress,
    /// Whether the feed's last read found that triggers were missing.
    pub(crate) saw_triggers_missing: bool,
    /// Whether the feed has read the mark that a break of the history leaves.
    pub(crate) saw_mark: bool,
    /// Resets in this life, which move all generations.
    pub(crate) resets: u8,
    /// When the last one was: nothing that was read up to then is taken from Redis.
    pub(crate) reset_at: Option<Tick>,
    /// A change that is half processed: the minimum revision is up, the generation has not moved yet.
    half: Option<Change>,
    pub(crate) local: [Option<LocalEntry>; KEYS],
    /// The look-up that a request for the key may join.
    pub(crate) look_ups: [Option<LookUp>; KEYS],
    /// A look-up that was not joined, and goes on for those who wait for it.
    pub(crate) left: [Option<LookUp>; KEYS],
    pub(crate) last_sync: Tick,
    /// How far its clock is ahead of the slowest.
    pub(crate) ahead: Tick,
    /// Whether this life has read the changes of one entry lifetime. Until then Redis is a miss.
    pub(crate) caught_up: bool,
    /// Not known to the node: the identities of what it has processed in all its lives, and of what
    /// a reset stood for. The properties look at it.
    pub(crate) ever_processed: Progress,
    /// Whether a reset stood for commits that were lost. Only the properties look at it.
    pub(crate) knows_of_loss: bool,
}

/// What a request may rely on: what its node had processed when it came. Only for the properties.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Known {
    pub(crate) identities: Revisions,
    pub(crate) of_loss: bool,
}

impl Node {
    /// A node that has been in sync from the start.
    pub(crate) fn new(ahead: Tick) -> Self {
        Self {
            minimum: Progress::default(),
            processed: Progress::default(),
            rows_read: Progress::default(),
            saw_triggers_missing: false,
            saw_mark: false,
            resets: 0,
            reset_at: None,
            half: None,
            local: [None; KEYS],
            look_ups: [None; KEYS],
            left: [None; KEYS],
            last_sync: 0,
            ahead,
            caught_up: true,
            ever_processed: Progress::default(),
            knows_of_loss: false,
        }
    }

    pub(crate) fn knows(&self, key: usize) -> Known {
        Known { identities: self.ever_processed.of(key), of_loss: self.knows_of_loss }
    }

    /// All keys share a bucket. What the counter counts is of no account, only that a processed
    /// change and a reset move it.
    pub(crate) fn generation(&self) -> Generation {
        (self.resets, self.processed.count())
    }

    pub(crate) fn has_processed(&self, change: Change) -> bool {
        self.processed.has(change)
    }

    pub(crate) fn half_processed(&self) -> Option<Change> {
        self.half
    }

    /// The first half of a change: the minimum revision. A request between the halves finds the old entry
    /// still served, but fills nothing old into the new generation.
    pub(crate) fn begin_change(&mut self, change: Change, moment: Moment<'_>) {
        self.half = Some(change);
        if moment.has(Mechanism::MinimumFirst) {
            self.raise_minimum(change, moment);
        } else {
            self.move_generation(change, moment);
        }
    }

    /// The second half: the generation. From here on the change counts as processed.
    pub(crate) fn finish_change(&mut self, moment: Moment<'_>) {
        let Some(change) = self.half.take() else { return };
        if moment.has(Mechanism::MinimumFirst) {
            self.move_generation(change, moment);
        } else {
            self.raise_minimum(change, moment);
        }
        self.ever_processed.raise_identity(change);
    }

    /// Loses all it has in memory. A node without catch-up follows the feed from here on, and
    /// takes that for knowing all.
    pub(crate) fn crash(&mut self, database: &Database, moment: Moment<'_>) {
        let Self { ever_processed, knows_of_loss, ahead, .. } = *self;
        *self = Self { ever_processed, knows_of_loss, caught_up: false, ..Self::new(ahead) };
        if !moment.has(Mechanism::CatchUp) {
            self.caught_up = true;
            self.processed = database.progress();
            self.rows_read = database.identities();
        }
    }

    /// Drops minimum revisions that no living entry of Redis can be below.
    pub(crate) fn evict_old_minimums(&mut self, database: &Database, moment: Moment<'_>) {
        let lives = |change: &Change| moment.minimum_lives(change.dated);
        for dead in database.rows_ever().filter(|change| !lives(change)) {
            let again = |it: Change| (it.subject, it.revision) == (dead.subject, dead.revision);
            if !database.rows_ever().any(|change| again(change) && lives(&change)) {
                self.minimum.forget(dead);
            }
        }
    }

    /// What a request that arrives now is answered from the local cache.
    pub(crate) fn hit(&self, key: usize, moment: Moment<'_>) -> Option<LocalEntry> {
        let entry = self.live_entry(key, moment)?;
        let is_servable = self.applies(moment.setup.secret(key), entry, moment)
            && self.is_fresh(entry.answer, moment);
        is_servable.then_some(entry)
    }

    /// The local entry of the current generation, of whatever age.
    pub(crate) fn live_entry(&self, key: usize, moment: Moment<'_>) -> Option<LocalEntry> {
        let any = !moment.has(Mechanism::Generation);
        self.local[key].filter(|entry| any || entry.generation == self.generation())
    }

    /// An entry of an older generation is dead, on arrival or later. Dropping it changes nothing
    /// but saves the checker states.
    pub(crate) fn drop_dead_entries(&mut self, moment: Moment<'_>) {
        for key in moment.setup.keys.clone() {
            self.local[key] = self.live_entry(key, moment);
        }
    }

    pub(crate) fn is_above_minimum(&self, key: usize, answer: Answer, moment: Moment<'_>) -> bool {
        let minimum = self.minimum.of(key);
        !moment.has(Mechanism::MinimumRevision) || covers(answer.revisions, minimum, moment)
    }

    /// The rule of age, while the database answers.
    pub(crate) fn is_fresh(&self, answer: Answer, moment: Moment<'_>) -> bool {
        self.is_within(answer, moment.setup.ages.max_staleness, moment)
    }

    /// The rule of age, while the database fails.
    pub(crate) fn is_fresh_enough_in_outage(&self, answer: Answer, moment: Moment<'_>) -> bool {
        let ages = moment.setup.ages;
        self.is_within(answer, ages.max_staleness + ages.stale_if_error, moment)
    }

    fn is_within(&self, answer: Answer, bound: Tick, moment: Moment<'_>) -> bool {
        let known_good = answer.as_of.max(self.last_sync);
        !moment.has(Mechanism::AgeRule) || moment.now - known_good <= bound
    }

    fn raise_minimum(&mut self, change: Change, moment: Moment<'_>) {
        if moment.minimum_lives(change.dated) {
            self.minimum.raise(change);
        }
    }

    fn move_generation(&mut self, change: Change, moment: Moment<'_>) {
        self.processed.raise(change);
        self.rows_read.raise_identity(change);
        self.drop_dead_entries(moment);
    }
}

fn covers(revisions: Revisions, minimum: Revisions, moment: Moment<'_>) -> bool {
    if moment.has(Mechanism::RevisionPerSubject) {
        revisions.covers(minimum)
    } else {
        revisions.highest() >= minimum.highest()
    }
}
