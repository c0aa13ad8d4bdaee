//! What must hold, and what must be reached for that to mean something.
//!
//! The model keeps no record of answers given. An answer is a matter of the state: what a request
//! would be served if it arrived now, and what a look-up is about to deliver.

use stateright::Property;

use crate::database::{Answer, Database};
use crate::grace;
use crate::look_up::{Lane, LookUpStep, Origin, Stage};
use crate::node::{Known, Moment, Node};
use crate::protocol::World;
use crate::redis::{Entry, Redis};
use crate::setup::{Break, Setup};

pub(crate) const NOTHING_FROM_BEFORE: &str = "no answer from before a change that was processed";
pub(crate) const NOTHING_TOO_OLD: &str = "no answer is out of date for longer than the bounds";
pub(crate) const ANSWERED_AGAIN: &str = "a key is answered again once faults end";
pub(crate) const NEVER_STUCK: &str = "no minimum revision is above the database once faults end";
pub(crate) const NOTHING_OF_CLONES: &str = "no answer is another database's";
pub(crate) const BURIED: &str = "a tombstone is not undone";

pub(crate) const MINIMUM_REJECTS: &str = "a minimum revision rejects an entry of Redis";
pub(crate) const MINIMUM_DISCARDS: &str = "a minimum revision discards an answer of the database";
pub(crate) const COMPARE_REJECTS: &str = "the compare rejects a late fill";
pub(crate) const NOT_JOINED: &str = "a look-up is not joined";
pub(crate) const CATCHES_UP: &str = "a node restarts and catches up on a stale entry";
pub(crate) const SERVED_OLDER: &str = "an older answer is served in an outage";
pub(crate) const AGES_WITHOUT_TRIGGERS: &str = "an answer ages out although the feed is read";
pub(crate) const RESET_REJECTS: &str = "a reset rejects an entry of Redis";
pub(crate) const GIVEN_AGAIN: &str = "a revision is given again";

pub(crate) fn all(setup: &Setup) -> Vec<Property<Setup>> {
    let mut properties = vec![
        Property::always(NOTHING_FROM_BEFORE, serves_nothing_from_before),
        Property::always(NOTHING_TOO_OLD, serves_nothing_too_old),
        Property::always(ANSWERED_AGAIN, answers_again),
        Property::always(BURIED, keeps_tombstones),
        Property::sometimes(MINIMUM_REJECTS, minimum_rejects),
        Property::sometimes(MINIMUM_DISCARDS, minimum_discards),
        Property::sometimes(COMPARE_REJECTS, compare_rejects),
        Property::sometimes(NOT_JOINED, leaves_a_look_up),
        Property::sometimes(CATCHES_UP, catches_up),
        Property::sometimes(SERVED_OLDER, serves_older),
    ];
    properties.extend(match setup.breaks {
        None => vec![],
        Some(Break::TriggersMissing) => vec![
            Property::sometimes(AGES_WITHOUT_TRIGGERS, ages_without_triggers),
            Property::sometimes(RESET_REJECTS, reset_rejects),
        ],
        Some(Break::CommitsLost) => vec![
            Property::always(NEVER_STUCK, gets_answers_again),
            Property::sometimes(RESET_REJECTS, reset_rejects),
            Property::sometimes(GIVEN_AGAIN, gives_a_revision_again),
        ],
        Some(Break::Clone) => vec![
            Property::always(NEVER_STUCK, gets_answers_again),
            Property::always(NOTHING_OF_CLONES, serves_nothing_of_clones),
        ],
    });
    if let Some(rotation) = setup.rotation {
        properties.extend(grace::all(setup, rotation));
    }
    properties
}

/// A change that was lost is none. A reset that stood for such is one: then what has a lost change
/// in it is from before.
fn serves_nothing_from_before(setup: &Setup, world: &World) -> bool {
    let database = &world.database;
    answers(setup, world).all(|Given { key, answer, known_at_request, .. }| {
        let known = database.shared(key, known_at_request.identities);
        let is_lost = known_at_request.of_loss && database.is_strange(answer);
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
    after_healing(setup, world).all(|Healed { node, key, database, given }| {
        given.is_some_and(|(answer, is_accepted)| {
            let clock = node.clock(setup.moment(world));
            answer.content == database.identities().of(key)
                && is_accepted == database.row().accepts(setup.secret(key), clock)
        })
    })
}

/// The weaker half of that: it gets an answer.
fn gets_answers_again(setup: &Setup, world: &World) -> bool {
    after_healing(setup, world).all(|healed| healed.given.is_some())
}

fn after_healing<'a>(setup: &'a Setup, world: &'a World) -> impl Iterator<Item = Healed> + 'a {
    let current = usize::from(world.database.row().current);
    let issued = nodes_and_keys(setup).filter(move |(_, key)| setup.secret(*key) <= current);
    issued.map(|(node, key)| {
        let moment = setup.moment(world);
        let (mut node, mut database) = (world.nodes[node], world.database);
        node.finish_change(moment);
        if !setup.breaks_unseen {
            node.poll(&database, moment);
        }
        database.restore_triggers();
        node.poll(&database, moment);
        let given = run_to_the_end(node, key, (&database, &world.redis), moment);
        Healed { node, key, database, given }
    })
}

/// What a request gets after the healing, and the parts as they are then.
struct Healed {
    node: Node,
    key: usize,
    database: Database,
    given: Option<(Answer, bool)>,
}

fn keeps_tombstones(setup: &Setup, world: &World) -> bool {
    setup.keys.clone().all(|key| match world.redis.entries[key] {
        Entry::Data(answer) => answer.revisions.covers(world.redis.buried[key]),
        Entry::Empty | Entry::Tombstone(..) => true,
    })
}

fn minimum_rejects(setup: &Setup, world: &World) -> bool {
    look_ups(setup, world).any(|(node, key, stage)| match (stage, world.redis.entries[key]) {
        (Stage::QueryRedis, Entry::Data(answer)) => is_below_minimum(node, key, answer),
        _ => false,
    })
}

fn minimum_discards(setup: &Setup, world: &World) -> bool {
    look_ups(setup, world).any(|(node, key, stage)| match stage {
        Stage::Read(answer) => is_below_minimum(node, key, answer),
        _ => false,
    })
}

fn compare_rejects(setup: &Setup, world: &World) -> bool {
    setup.keys.clone().any(|key| setup.rejects_a_fill(world, key))
}

fn leaves_a_look_up(setup: &Setup, world: &World) -> bool {
    nodes_and_keys(setup).any(|(node, key)| {
        let node = &world.nodes[node];
        node.look_ups[key].is_some() && !node.joins(key, setup.moment(world))
    })
}

/// Before it has caught up the node leaves Redis alone, after it the minimum revision rejects the entry that
/// it would have believed.
fn catches_up(setup: &Setup, world: &World) -> bool {
    nodes_and_keys(setup).any(|(node, key)| {
        let mut node = world.nodes[node];
        let Entry::Data(answer) = world.redis.entries[key] else { return false };
        let believed = !node.caught_up && !is_below_minimum(&node, key, answer);
        node.poll(&world.database, setup.moment(world));
        believed && node.caught_up && is_below_minimum(&node, key, answer)
    })
}

fn serves_older(setup: &Setup, world: &World) -> bool {
    look_ups(setup, world).any(|(node, _, stage)| match stage {
        Stage::Checked { answer, origin: Origin::Older, .. } => {
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

/// An entry that no minimum revision rejects.
fn reset_rejects(setup: &Setup, world: &World) -> bool {
    look_ups(setup, world).any(|(node, key, stage)| match (stage, world.redis.entries[key]) {
        (Stage::QueryRedis, Entry::Data(answer)) => {
            !is_below_minimum(node, key, answer) && !node.is_from_after_reset(answer.as_of)
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
pub(crate) struct Given {
    pub(crate) node: usize,
    pub(crate) key: usize,
    pub(crate) answer: Answer,
    pub(crate) is_accepted: bool,
    /// What the node had processed when the asker arrived.
    known_at_request: Known,
}

pub(crate) fn answers<'a>(setup: &'a Setup, world: &'a World) -> impl Iterator<Item = Given> + 'a {
    nodes_and_keys(setup).flat_map(move |(index, key)| {
        let node = &world.nodes[index];
        let given = move |answer, is_accepted, known_at_request| Given {
            node: index,
            key,
            answer,
            is_accepted,
            known_at_request,
        };
        let hit = node.hit(key, setup.moment(world));
        let hit = hit.map(|entry| given(entry.answer, entry.is_accepted, node.knows(key)));
        let delivered = [node.look_ups[key], node.left[key]].into_iter().flatten();
        let delivered = delivered.filter_map(move |look_up| match look_up.stage {
            Stage::Checked { answer, is_accepted, .. } => {
                Some(given(answer, is_accepted, look_up.known_to_waiters))
            }
            _ => None,
        });
        hit.into_iter().chain(delivered)
    })
}

pub(crate) fn look_ups<'a>(
    setup: &'a Setup,
    world: &'a World,
) -> impl Iterator<Item = (&'a Node, usize, Stage)> + 'a {
    nodes_and_keys(setup).flat_map(move |(node, key)| {
        let both = [Lane::Joinable, Lane::Left].into_iter();
        let node = &world.nodes[node];
        let both = both.filter_map(move |lane| node.look_up(key, lane));
        both.map(move |look_up| (node, key, look_up.stage))
    })
}

pub(crate) fn nodes_and_keys(setup: &Setup) -> impl Iterator<Item = (usize, usize)> {
    let keys = setup.keys.clone();
    (0..setup.nodes).flat_map(move |node| keys.clone().map(move |key| (node, key)))
}

pub(crate) fn is_below_minimum(node: &Node, key: usize, answer: Answer) -> bool {
    !answer.revisions.covers(node.minimum.of(key))
}

/// The longest way a look-up can take when all servers answer: Redis, a read that turns out to be
/// below the minimum revision, another read, and the checks.
const STEPS_OF_A_LOOK_UP: usize = 6;

fn run_to_the_end(
    mut node: Node,
    key: usize,
    servers: (&Database, &Redis),
    moment: Moment<'_>,
) -> Option<(Answer, bool)> {
    if let Some(entry) = node.hit(key, moment) {
        return Some((entry.answer, entry.is_accepted));
    }
    node.request(key, moment);
    for _ in 0..STEPS_OF_A_LOOK_UP {
        let step = match node.look_ups[key]?.stage {
            // A node in sync leaves tombstones alone.
            Stage::QueryRedis if matches!(servers.1.entries[key], Entry::Tombstone(..)) => {
                LookUpStep::RedisTimesOut
            }
            Stage::QueryRedis => LookUpStep::ReadRedis,
            Stage::QueryDatabase { .. } => LookUpStep::ReadDatabase,
            Stage::Read(_) => LookUpStep::Check,
            Stage::Checked { answer, is_accepted, .. } => return Some((answer, is_accepted)),
        };
        node.step((key, Lane::Joinable), step, servers, moment);
    }
    None
}
