//! A look-up under way, from Redis through the database to those who wait for it.

use crate::database::{Answer, Database, Revisions, Tick};
use crate::node::{Generation, Known, LocalEntry, Moment, Node};
use crate::redis::{Entry, Redis};
use crate::secrets::Standing;
use crate::setup::{Detail, Mechanism};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Origin {
    Redis,
    Database,
    /// An older copy that the rule of age allows only because the database fails.
    Older,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Stage {
    QueryRedis,
    /// `older` is the answer of Redis, too old while the database answers.
    QueryDatabase {
        older: Option<Answer>,
    },
    /// The database has been read, its answer is on the way.
    Read(Answer),
    /// Checked against minimum revision and age, and about to go to all who wait.
    Checked {
        answer: Answer,
        origin: Origin,
        is_accepted: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LookUp {
    /// The bucket's, before anything was read.
    pub(crate) generation: Generation,
    pub(crate) began: Tick,
    /// The clock by which it lists secrets.
    pub(crate) listing_clock: Tick,
    pub(crate) stage: Stage,
    /// Not known to the look-up: what the node had processed when the last of those who wait for
    /// it arrived. The properties look at it.
    pub(crate) known_to_waiters: Known,
}

/// Which look-up of a node for a key takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    Joinable,
    Left,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LookUpStep {
    ReadRedis,
    /// Also what a node that is cut off from Redis sees.
    RedisTimesOut,
    ReadDatabase,
    /// Also what a node that is cut off from the database sees.
    DatabaseFails,
    Check,
    Deliver,
}

impl LookUp {
    pub(crate) fn is_checked(&self) -> bool {
        matches!(self.stage, Stage::Checked { .. })
    }
}

impl Stage {
    pub(crate) fn steps(self) -> &'static [LookUpStep] {
        match self {
            Stage::QueryRedis => &[LookUpStep::ReadRedis, LookUpStep::RedisTimesOut],
            Stage::QueryDatabase { .. } => &[LookUpStep::ReadDatabase, LookUpStep::DatabaseFails],
            Stage::Read(_) => &[LookUpStep::Check],
            Stage::Checked { .. } => &[LookUpStep::Deliver],
        }
    }
}

impl Node {
    /// Whether a request that arrives now would wait for the look-up that is under way.
    pub(crate) fn joins(&self, key: usize, moment: Moment<'_>) -> bool {
        let unchecked = !moment.has(Mechanism::LookUpCheck);
        self.look_ups[key].is_some_and(|f| unchecked || f.generation == self.generation())
    }

    /// A request that is no hit: joins the look-up, or leaves it and starts another.
    pub(crate) fn request(&mut self, key: usize, moment: Moment<'_>) {
        let knows = self.knows(key);
        if self.joins(key, moment) {
            if let Some(look_up) = &mut self.look_ups[key] {
                look_up.known_to_waiters = knows;
            }
            return;
        }
        let goes_on = moment.setup.detail == Detail::Fine;
        self.left[key] = self.look_ups[key].take().filter(|_| goes_on);
        let trusts_redis = self.caught_up;
        self.look_ups[key] = Some(LookUp {
            generation: self.generation(),
            began: moment.now,
            listing_clock: self.listing_clock(moment),
            stage: if trusts_redis {
                Stage::QueryRedis
            } else {
                Stage::QueryDatabase { older: None }
            },
            known_to_waiters: knows,
        });
    }

    pub(crate) fn look_up(&self, key: usize, lane: Lane) -> Option<LookUp> {
        match lane {
            Lane::Joinable => self.look_ups[key],
            Lane::Left => self.left[key],
        }
    }

    fn set_look_up(&mut self, key: usize, lane: Lane, look_up: Option<LookUp>) {
        match lane {
            Lane::Joinable => self.look_ups[key] = look_up,
            Lane::Left => self.left[key] = look_up,
        }
    }

    /// Moves a look-up on. Returns what it has to fill into Redis, once it is through.
    pub(crate) fn step(
        &mut self,
        (key, lane): (usize, Lane),
        step: LookUpStep,
        (database, redis): (&Database, &Redis),
        moment: Moment<'_>,
    ) -> Option<Answer> {
        let look_up = self.look_up(key, lane)?;
        let next = match (look_up.stage, step) {
            (Stage::QueryRedis, LookUpStep::ReadRedis) => {
                Some(self.after_redis(key, redis.entries[key], moment))
            }
            (Stage::QueryRedis, _) => Some(Stage::QueryDatabase { older: None }),
            (Stage::QueryDatabase { .. }, LookUpStep::ReadDatabase) => {
                Some(Stage::Read(database.read(key, moment.now).listed_by(look_up.listing_clock)))
            }
            (Stage::QueryDatabase { older }, _) => self.older_answer(key, older, moment),
            (Stage::Read(answer), _) => Some(self.after_database(key, answer, moment)),
            (Stage::Checked { .. }, _) => None,
        };
        self.set_look_up(key, lane, next.map(|stage| LookUp { stage, ..look_up }));
        match look_up.stage {
            Stage::Checked { answer, origin, is_accepted } if origin != Origin::Older => {
                let is_read = origin == Origin::Database;
                self.keep(key, look_up, (answer, is_accepted), moment);
                // Only a match is filled into Redis.
                let is_match = || answer.listed(moment.setup.secret(key)) != Standing::Unknown;
                (is_read && is_match()).then_some(answer)
            }
            _ => None,
        }
    }

    /// Uses an entry of Redis only above the minimum revision. A tombstone is a change that the feed may
    /// not have brought yet, so it raises the minimum revision.
    pub(crate) fn after_redis(&mut self, key: usize, entry: Entry, moment: Moment<'_>) -> Stage {
        let answer = match entry {
            Entry::Data(answer)
                if moment.entry_lives(answer) && self.is_from_after_reset(answer.as_of) =>
            {
                answer
            }
            Entry::Tombstone(revisions, at) if self.is_from_after_reset(at) => {
                self.minimum.raise_to(key, revisions_of_tombstone(revisions, moment));
                return Stage::QueryDatabase { older: None };
            }
            Entry::Data(_) | Entry::Tombstone(..) | Entry::Empty => {
                return Stage::QueryDatabase { older: None };
            }
        };
        match self.judge_copy(moment.setup.secret(key), answer, moment) {
            Some(is_accepted) if self.is_above_minimum(key, answer, moment) => {
                if self.is_fresh(answer, moment) {
                    Stage::Checked { answer, origin: Origin::Redis, is_accepted }
                } else {
                    Stage::QueryDatabase { older: Some(answer) }
                }
            }
            _ => Stage::QueryDatabase { older: None },
        }
    }

    /// A change may have been processed while the answer was on the way: then the database is
    /// asked again.
    fn after_database(&self, key: usize, answer: Answer, moment: Moment<'_>) -> Stage {
        if self.is_above_minimum(key, answer, moment) && self.is_fresh(answer, moment) {
            let is_accepted = self.judge_read(moment.setup.secret(key), answer, moment);
            Stage::Checked { answer, origin: Origin::Database, is_accepted }
        } else {
            Stage::QueryDatabase { older: None }
        }
    }

    /// What is served while the database fails: only what accepts the key. Nothing means a 503.
    fn older_answer(&self, key: usize, older: Option<Answer>, moment: Moment<'_>) -> Option<Stage> {
        let secret = moment.setup.secret(key);
        let local = self.live_entry(key, moment);
        let local = local.filter(|it| it.is_accepted && self.applies(secret, *it, moment));
        let local = local.map(|entry| entry.answer);
        let older = older.filter(|it| self.judge_copy(secret, *it, moment) == Some(true));
        let allowed = |answer: &Answer| {
            self.is_above_minimum(key, *answer, moment)
                && self.is_fresh_enough_in_outage(*answer, moment)
        };
        let after_reset = |answer: &Answer| {
            !moment.has(Mechanism::ResetCoversLookUps) || self.is_from_after_reset(answer.as_of)
        };
        let older = older.filter(after_reset);
        let answer = local.filter(allowed).or(older.filter(allowed))?;
        Some(Stage::Checked { answer, origin: Origin::Older, is_accepted: true })
    }

    /// All who wait have their answer. What came from a server is kept, under the generation from
    /// before it was read.
    fn keep(
        &mut self,
        key: usize,
        look_up: LookUp,
        (answer, is_accepted): (Answer, bool),
        moment: Moment<'_>,
    ) {
        let before = moment.has(Mechanism::GenerationBeforeRead);
        let generation = if before { look_up.generation } else { self.generation() };
        self.local[key] = Some(LocalEntry { answer, generation, is_accepted });
        self.drop_dead_entries(moment);
    }
}

fn revisions_of_tombstone(revisions: Revisions, moment: Moment<'_>) -> Revisions {
    if moment.has(Mechanism::TombstoneOfSubject) {
        revisions
    } else {
        Revisions { key: revisions.highest(), owner: 0 }
    }
}
