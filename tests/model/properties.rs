//! What must hold, and what must be reached for that to mean something.
//!
//! The model keeps no record of answers given. An answer is a matter of the state: what a request
//! would be served if it arrived now, and what a flight is about to deliver.

use stateright::Property;

use crate::database::{Answer, Database};
use crate::flight::{FlightStep, Lane, Origin, Stage};
use crate::node::{Known, Moment, Node};
use crate::protocol::World;
use crate::redis::{Entry, Redis};
use crate::setup::{Break, Setup};

pub(crate) const NOTHING_FROM_BEFORE: &str = "no answer from before a change that was processed";
pub(crate) const NOTHING_TOO_OLD: &str = "no answer is out of date for longer than the bounds";
pub(crate) const ANSWERED_AGAIN: &str = "a key is answered again once faults end";
pub(crate) const NEVER_STUCK: &str = "no floor is above the database once faults end";
pub(crate) const NOTHING_OF_CLONES: &str = "no answer is another database's";
pub(crate) const BURIED: &str = "a tombstone is not undone";

pub(crate) const FLOOR_REFUSES: &str = "a floor refuses an entry of Redis";
pub(crate) const FLOOR_DISCARDS: &str = "a floor discards an answer of the database";
pub(crate) const COMPARE_REFUSES: &str = "the compare refuses a late fill";
pub(crate) const NOT_JOINED: &str = "a flight is not joined";
pub(crate) const CATCHES_UP: &str = "a node restarts and catches up on a stale entry";
pub(crate) const SERVED_OLDER: &str = "an older answer is served in an outage";
pub(crate) const AGES_WITHOUT_TRIGGERS: &str = "an answer ages out although the feed is read";
pub(crate) const RESET_REFUSES: &str = "a reset refuses an entry of Redis";
pub(crate) const GIVEN_AGAIN: &str = "a revision is given again";

pub(crate) fn all(setup: &Setup) -> Vec<Property<Setup>> {
    let mut properties = vec![
        Property::always(NOTHING_FROM_BEFORE, serves_nothing_from_before),
        Property::always(NOTHING_TOO_OLD, serves_nothing_too_old),
        Property::always(ANSWERED_AGAIN, answers_again),
        Property::always(BURIED, keeps_tombstones),
        Property::sometimes(FLOOR_REFUSES, floor_refuses),
        Property::sometimes(FLOOR_DISCARDS, floor_discards),
        Property::sometimes(COMPARE_REFUSES, compare_refuses),
        Property::sometimes(NOT_JOINED, leaves_a_flight),
        Property::sometimes(CATCHES_UP, catches_up),
        Property::sometimes(SERVED_OLDER, serves_older),
    ];
    properties.extend(match setup.breaks {
        None => vec![],
        Some(Break::TriggersMissing) => vec![
            Property::sometimes(AGES_WITHOUT_TRIGGERS, ages_without_triggers),
            Property::sometimes(RESET_REFUSES, reset_refuses),
        ],
        Some(Break::CommitsLost) => vec![
            Property::always(NEVER_STUCK, gets_answers_again),
            Property::sometimes(RESET_REFUSES, reset_refuses),
            Property::sometimes(GIVEN_AGAIN, gives_a_revision_again),
        ],
        Some(Break::Clone) => vec![
            Property::always(NEVER_STUCK, gets_answers_again),
            Property::always(NOTHING_OF_CLONES, serves_nothing_of_clones),
        ],
    });
    properties
}

/// A change that was lost is none. A reset that stood for such is one: then what has a lost change
/// in it is from before.
fn serves_nothing_from_before(setup: &Setup, world: &World) -> bool {
    let database = &world.database;
    answers(setup, world).all(|Given { key, answer, asker_knows }| {
        let known = database.shared(key, asker_knows.identities);
        let is_lost = asker_knows.of_loss && database.is_strange(answer);
        !is_lost && database.shared(key, answer.content).covers(known)
    })
}

fn serves_nothing_of_clones(setup: &Setup, world: &World) -> bool {
    answers(setup, world).all(|given| !world.database.is_strange(given.answer))
}

/// Against the true time of the change that an answer lacks, not against what a node thinks.
fn serves_nothing_too_old(setup: &Setup, world: &World) -> bool {
    let bound = setup.ages.max_staleness + setup.ages.stale_if_error;
    answers(setup, world)
        .all(|given| world.database.superseded_for(given.key, given.answer, world.now) <= bound)
}

/// The healing that every state must allow: the triggers are back, each node polls, its servers
/// answer, and a request that comes then gets the truth, whatever Redis holds and whatever was under
/// way.
fn answers_again(setup: &Setup, world: &World) -> bool {
    after_healing(setup, world).all(|(key, database, answer)| {
        answer.is_some_and(|answer| answer.content == database.identities().of(key))
    })
}

/// The weaker half of that: it gets an answer.
fn gets_answers_again(setup: &Setup, world: &World) -> bool {
    after_healing(setup, world).all(|(_, _, answer)| answer.is_some())
}

fn after_healing<'a>(
    setup: &'a Setup,
    world: &'a World,
) -> impl Iterator<Item = (usize, Database, Option<Answer>)> + 'a {
    nodes_and_keys(setup).map(|(node, key)| {
        let moment = setup.moment(world);
        let (mut node, mut database) = (world.nodes[node], world.database);
        node.finish_change(moment);
        if !setup.breaks_unseen {
            node.poll(&database, moment);
        }
        database.restore_triggers();
        node.poll(&database, moment);
        (key, database, ask_to_the_end(node, key, (&database, &world.redis), moment))
    })
}

fn keeps_tombstones(setup: &Setup, world: &World) -> bool {
    (0..setup.keys).all(|key| match world.redis.entries[key] {
        Entry::Data(answer) => answer.revisions.covers(world.redis.buried[key]),
        Entry::Empty | Entry::Tombstone(..) => true,
    })
}

fn floor_refuses(setup: &Setup, world: &World) -> bool {
    flights(setup, world).any(|(node, key, stage)| match (stage, world.redis.entries[key]) {
        (Stage::AskRedis, Entry::Data(answer)) => is_below_floor(node, key, answer),
        _ => false,
    })
}

fn floor_discards(setup: &Setup, world: &World) -> bool {
    flights(setup, world).any(|(node, key, stage)| match stage {
        Stage::Heard(answer) => is_below_floor(node, key, answer),
        _ => false,
    })
}

fn compare_refuses(setup: &Setup, world: &World) -> bool {
    (0..setup.keys).any(|key| setup.refuses_a_fill(world, key))
}

fn leaves_a_flight(setup: &Setup, world: &World) -> bool {
    nodes_and_keys(setup).any(|(node, key)| {
        let node = &world.nodes[node];
        node.flights[key].is_some() && !node.joins(key, setup.moment(world))
    })
}

/// Before it has caught up the node leaves Redis alone, after it the floor refuses the entry that
/// it would have believed.
fn catches_up(setup: &Setup, world: &World) -> bool {
    nodes_and_keys(setup).any(|(node, key)| {
        let mut node = world.nodes[node];
        let Entry::Data(answer) = world.redis.entries[key] else { return false };
        let believed = !node.caught_up && !is_below_floor(&node, key, answer);
        node.poll(&world.database, setup.moment(world));
        believed && node.caught_up && is_below_floor(&node, key, answer)
    })
}

fn serves_older(setup: &Setup, world: &World) -> bool {
    flights(setup, world).any(|(node, _, stage)| match stage {
        Stage::Checked { answer, origin: Origin::Older } => {
            !node.is_fresh(answer, setup.moment(world))
        }
        _ => false,
    })
}

/// The bound that keeps an answer without its change from being served for ever.
fn ages_without_triggers(setup: &Setup, world: &World) -> bool {
    nodes_and_keys(setup).any(|(node, key)| {
        let (mut node, moment) = (world.nodes[node], setup.moment(world));
        let was_live = node.live_entry(key, moment).is_some();
        node.poll(&world.database, moment);
        was_live && node.live_entry(key, moment).is_some() && node.hit(key, moment).is_none()
    })
}

/// An entry that no floor refuses.
fn reset_refuses(setup: &Setup, world: &World) -> bool {
    flights(setup, world).any(|(node, key, stage)| match (stage, world.redis.entries[key]) {
        (Stage::AskRedis, Entry::Data(answer)) => {
            !is_below_floor(node, key, answer) && !node.is_from_after_reset(answer.as_of)
        }
        _ => false,
    })
}

fn gives_a_revision_again(_: &Setup, world: &World) -> bool {
    let rows = || world.database.rows_ever();
    rows().any(|one| {
        rows().any(|other| one.revision == other.revision && one.identity != other.identity)
    })
}

/// An answer that somebody gets in this state.
struct Given {
    key: usize,
    answer: Answer,
    /// What the node had processed when the asker arrived.
    asker_knows: Known,
}

fn answers<'a>(setup: &'a Setup, world: &'a World) -> impl Iterator<Item = Given> + 'a {
    nodes_and_keys(setup).flat_map(move |(node, key)| {
        let node = &world.nodes[node];
        let hit = node.hit(key, setup.moment(world)).map(|answer| Given {
            key,
            answer,
            asker_knows: node.knows(key),
        });
        let delivered = [node.flights[key], node.left[key]].into_iter().flatten();
        let delivered = delivered.filter_map(move |flight| match flight.stage {
            Stage::Checked { answer, .. } => {
                Some(Given { key, answer, asker_knows: flight.waiters_know })
            }
            _ => None,
        });
        hit.into_iter().chain(delivered)
    })
}

fn flights<'a>(
    setup: &'a Setup,
    world: &'a World,
) -> impl Iterator<Item = (&'a Node, usize, Stage)> + 'a {
    nodes_and_keys(setup).flat_map(move |(node, key)| {
        let both = [Lane::Joinable, Lane::Left].into_iter();
        let node = &world.nodes[node];
        let both = both.filter_map(move |lane| node.flight(key, lane));
        both.map(move |flight| (node, key, flight.stage))
    })
}

fn nodes_and_keys(setup: &Setup) -> impl Iterator<Item = (usize, usize)> {
    let keys = setup.keys;
    (0..setup.nodes).flat_map(move |node| (0..keys).map(move |key| (node, key)))
}

fn is_below_floor(node: &Node, key: usize, answer: Answer) -> bool {
    !answer.revisions.covers(node.floor.of(key))
}

/// The longest way a flight can take when all servers answer: Redis, a read that turns out to be
/// below the floor, another read, and the checks.
const STEPS_OF_A_FLIGHT: usize = 6;

fn ask_to_the_end(
    mut node: Node,
    key: usize,
    servers: (&Database, &Redis),
    moment: Moment<'_>,
) -> Option<Answer> {
    if let Some(answer) = node.hit(key, moment) {
        return Some(answer);
    }
    node.ask(key, moment);
    for _ in 0..STEPS_OF_A_FLIGHT {
        let step = match node.flights[key]?.stage {
            // A node in sync leaves tombstones alone.
            Stage::AskRedis if matches!(servers.1.entries[key], Entry::Tombstone(..)) => {
                FlightStep::RedisTimesOut
            }
            Stage::AskRedis => FlightStep::ReadRedis,
            Stage::AskDatabase { .. } => FlightStep::ReadDatabase,
            Stage::Heard(_) => FlightStep::Check,
            Stage::Checked { answer, .. } => return Some(answer),
        };
        node.step((key, Lane::Joinable), step, servers, moment);
    }
    None
}
