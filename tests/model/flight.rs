//! A flight: one look-up under way, from Redis through the database to those who wait for it.

use crate::database::{Answer, Database, Revisions, Tick};
use crate::node::{Generation, Known, LocalEntry, Moment, Node};
use crate::redis::{Entry, Redis};
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
    AskRedis,
    /// `older` is what Redis has said, too old while the database answers.
    AskDatabase {
        older: Option<Answer>,
    },
    /// The database has been read, its answer is on the way.
    Heard(Answer),
    /// Checked against floor and age, and about to go to all who wait.
    Checked {
        answer: Answer,
        origin: Origin,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Flight {
    /// The bucket's, before anything was read.
    pub(crate) generation: Generation,
    pub(crate) began: Tick,
    pub(crate) stage: Stage,
    /// Not known to the flight: what the node had processed when the last of those who wait for
    /// it arrived. The properties look at it.
    pub(crate) waiters_know: Known,
}

/// Which flight of a node for a key takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    Joinable,
    Left,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FlightStep {
    ReadRedis,
    /// Also what a node that is cut off from Redis sees.
    RedisTimesOut,
    ReadDatabase,
    /// Also what a node that is cut off from the database sees.
    DatabaseFails,
    Check,
    Deliver,
}

impl Flight {
    pub(crate) fn is_checked(&self) -> bool {
        matches!(self.stage, Stage::Checked { .. })
    }
}

impl Stage {
    pub(crate) fn steps(self) -> &'static [FlightStep] {
        match self {
            Stage::AskRedis => &[FlightStep::ReadRedis, FlightStep::RedisTimesOut],
            Stage::AskDatabase { .. } => &[FlightStep::ReadDatabase, FlightStep::DatabaseFails],
            Stage::Heard(_) => &[FlightStep::Check],
            Stage::Checked { .. } => &[FlightStep::Deliver],
        }
    }
}

impl Node {
    /// Whether a request that arrives now would wait for the flight that is under way.
    pub(crate) fn joins(&self, key: usize, moment: Moment<'_>) -> bool {
        let unchecked = !moment.has(Mechanism::FlightCheck);
        self.flights[key].is_some_and(|f| unchecked || f.generation == self.generation())
    }

    /// A request that is no hit: joins the flight, or leaves it and starts another.
    pub(crate) fn ask(&mut self, key: usize, moment: Moment<'_>) {
        let knows = self.knows(key);
        if self.joins(key, moment) {
            if let Some(flight) = &mut self.flights[key] {
                flight.waiters_know = knows;
            }
            return;
        }
        let goes_on = moment.setup.detail == Detail::Fine;
        self.left[key] = self.flights[key].take().filter(|_| goes_on);
        let trusts_redis = self.caught_up;
        self.flights[key] = Some(Flight {
            generation: self.generation(),
            began: moment.now,
            stage: if trusts_redis { Stage::AskRedis } else { Stage::AskDatabase { older: None } },
            waiters_know: knows,
        });
    }

    pub(crate) fn flight(&self, key: usize, lane: Lane) -> Option<Flight> {
        match lane {
            Lane::Joinable => self.flights[key],
            Lane::Left => self.left[key],
        }
    }

    fn set_flight(&mut self, key: usize, lane: Lane, flight: Option<Flight>) {
        match lane {
            Lane::Joinable => self.flights[key] = flight,
            Lane::Left => self.left[key] = flight,
        }
    }

    /// Moves a flight on. Returns what it has to fill into Redis, once it is through.
    pub(crate) fn step(
        &mut self,
        (key, lane): (usize, Lane),
        step: FlightStep,
        (database, redis): (&Database, &Redis),
        moment: Moment<'_>,
    ) -> Option<Answer> {
        let flight = self.flight(key, lane)?;
        let next = match (flight.stage, step) {
            (Stage::AskRedis, FlightStep::ReadRedis) => {
                Some(self.after_redis(key, redis.entries[key], moment))
            }
            (Stage::AskRedis, _) => Some(Stage::AskDatabase { older: None }),
            (Stage::AskDatabase { .. }, FlightStep::ReadDatabase) => {
                Some(Stage::Heard(database.read(key, moment.now)))
            }
            (Stage::AskDatabase { older }, _) => self.older_answer(key, older, moment),
            (Stage::Heard(answer), _) => Some(self.after_database(key, answer, moment)),
            (Stage::Checked { .. }, _) => None,
        };
        self.set_flight(key, lane, next.map(|stage| Flight { stage, ..flight }));
        match flight.stage {
            Stage::Checked { answer, origin } => self.deliver(key, flight, answer, origin, moment),
            _ => None,
        }
    }

    /// Takes Redis at its word only above the floor. A tombstone is a change that the feed may
    /// not have brought yet, so it raises the floor.
    fn after_redis(&mut self, key: usize, entry: Entry, moment: Moment<'_>) -> Stage {
        let answer = match entry {
            Entry::Data(answer)
                if moment.entry_lives(answer.as_of) && self.is_from_after_reset(answer.as_of) =>
            {
                answer
            }
            Entry::Tombstone(revisions, at) if self.is_from_after_reset(at) => {
                self.floor.raise_to(key, told_by_tombstone(revisions, moment));
                return Stage::AskDatabase { older: None };
            }
            Entry::Data(_) | Entry::Tombstone(..) | Entry::Empty => {
                return Stage::AskDatabase { older: None };
            }
        };
        if !self.is_above_floor(key, answer, moment) {
            Stage::AskDatabase { older: None }
        } else if self.is_fresh(answer, moment) {
            Stage::Checked { answer, origin: Origin::Redis }
        } else {
            Stage::AskDatabase { older: Some(answer) }
        }
    }

    /// A change may have been processed while the answer was on the way: then the database is
    /// asked again.
    fn after_database(&self, key: usize, answer: Answer, moment: Moment<'_>) -> Stage {
        if self.is_above_floor(key, answer, moment) && self.is_fresh(answer, moment) {
            Stage::Checked { answer, origin: Origin::Database }
        } else {
            Stage::AskDatabase { older: None }
        }
    }

    /// What is served while the database fails. Nothing means a 503.
    fn older_answer(&self, key: usize, older: Option<Answer>, moment: Moment<'_>) -> Option<Stage> {
        let local = self.live_entry(key, moment).map(|entry| entry.answer);
        let allowed = |answer: &Answer| {
            self.is_above_floor(key, *answer, moment)
                && self.is_fresh_enough_in_outage(*answer, moment)
        };
        let after_reset = |answer: &Answer| {
            !moment.has(Mechanism::ResetCoversLookUps) || self.is_from_after_reset(answer.as_of)
        };
        let older = older.filter(after_reset);
        let answer = local.filter(allowed).or(older.filter(allowed))?;
        Some(Stage::Checked { answer, origin: Origin::Older })
    }

    /// All who wait have their answer. What came from a server is kept, under the generation from
    /// before it was read.
    fn deliver(
        &mut self,
        key: usize,
        flight: Flight,
        answer: Answer,
        origin: Origin,
        moment: Moment<'_>,
    ) -> Option<Answer> {
        if origin == Origin::Older {
            return None;
        }
        let before = moment.has(Mechanism::GenerationBeforeRead);
        let generation = if before { flight.generation } else { self.generation() };
        self.local[key] = Some(LocalEntry { answer, generation });
        self.drop_dead_entries(moment);
        (origin == Origin::Database).then_some(answer)
    }
}

fn told_by_tombstone(revisions: Revisions, moment: Moment<'_>) -> Revisions {
    if moment.has(Mechanism::TombstoneOfSubject) {
        revisions
    } else {
        Revisions { key: revisions.highest(), owner: 0 }
    }
}
