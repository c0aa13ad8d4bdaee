//! What must hold of the two secrets of a key that is rotated, and what must be reached for that to mean something.

use stateright::Property;

use crate::database::{Answer, KEYS, Tick};
use crate::look_up::Stage;
use crate::node::{Moment, Node};
use crate::properties::{answers, is_below_minimum, look_ups, nodes_and_keys};
use crate::protocol::World;
use crate::redis::Entry;
use crate::secrets::{Edit, LookupIds, Rotation, Standing};
use crate::setup::{Mechanism, Setup};

pub(crate) const ACCEPTED_WHILE_VALID: &str = "no valid secret is denied";
pub(crate) const NO_DENIAL_KEPT: &str = "no negative entry denies a valid secret";
pub(crate) const DENIED_AFTER_THE_END: &str = "no secret is accepted after its grace period";
pub(crate) const BOTH_FROM_REDIS: &str = "an entry of Redis answers both secrets";
pub(crate) const MINIMUM_OF_BOTH_IDS: &str = "a change raises the minimum revisions of both ids";

pub(crate) const PREVIOUS_ACCEPTED: &str = "a previous secret is accepted";
pub(crate) const ENDS_IN_LOCAL_CACHE: &str = "the end of a grace period rejects a local entry";
pub(crate) const ENDS_IN_REDIS: &str = "the end of a grace period rejects an entry of Redis";
pub(crate) const NOT_LISTED: &str = "an entry of Redis does not list the secret";
pub(crate) const DENIAL_LIFTED: &str = "a clock that is set back lifts a denial";

pub(crate) fn all(setup: &Setup, rotation: Rotation) -> Vec<Property<Setup>> {
    let mut properties = vec![
        Property::always(ACCEPTED_WHILE_VALID, denies_no_valid_secret),
        Property::always(DENIED_AFTER_THE_END, accepts_nothing_after_its_end),
        Property::always(NO_DENIAL_KEPT, keeps_no_wrong_denial),
        Property::sometimes(PREVIOUS_ACCEPTED, accepts_a_previous_secret),
        Property::sometimes(ENDS_IN_LOCAL_CACHE, ends_in_the_local_cache),
        Property::sometimes(ENDS_IN_REDIS, ends_in_redis),
        Property::sometimes(NOT_LISTED, finds_an_entry_without_the_secret),
        Property::sometimes(DENIAL_LIFTED, lifts_a_denial),
    ];
    if setup.has(Mechanism::ListedAfterTheEnd) {
        properties.push(Property::always(BOTH_FROM_REDIS, answers_both_from_redis));
    }
    if rotation.ids == LookupIds::Differ {
        properties.push(Property::always(MINIMUM_OF_BOTH_IDS, raises_both_minimums));
    }
    properties
}

/// By the clock of the node that answers, and by what its answer is from. An answer from before the rotation that made
/// the secret is no reason for a denial.
fn denies_no_valid_secret(setup: &Setup, world: &World) -> bool {
    answers(setup, world)
        .filter(|given| !given.is_accepted)
        .all(|given| is_denied(setup, world, (given.node, given.key), given.answer))
}

/// The same of those that are served again and again while the node is in sync.
fn keeps_no_wrong_denial(setup: &Setup, world: &World) -> bool {
    nodes_and_keys(setup).all(|(node, key)| {
        let hit = world.nodes[node].hit(key, setup.moment(world));
        let negative = hit.filter(|entry| !entry.is_accepted);
        negative.is_none_or(|entry| is_denied(setup, world, (node, key), entry.answer))
    })
}

fn is_denied(setup: &Setup, world: &World, (node, key): (usize, usize), answer: Answer) -> bool {
    let (secret, row) = (setup.secret(key), answer.row);
    let clock = world.nodes[node].clock(setup.moment(world));
    secret <= usize::from(row.current) && !row.accepts(secret, clock)
}

/// By every clock, and whatever the answer is from: also on a node that has not learned of the rotation.
fn accepts_nothing_after_its_end(setup: &Setup, world: &World) -> bool {
    answers(setup, world).filter(|given| given.is_accepted).all(|given| {
        let ends_at = end_of(world, setup.secret(given.key));
        ends_at.is_none_or(|ends_at| world.now < ends_at)
    })
}

/// Whichever clock the node had that made the entry. This is for the nodes that are cut off from the database.
fn answers_both_from_redis(setup: &Setup, world: &World) -> bool {
    let moment = setup.moment(world);
    usable_entries(setup, world).all(|(node, key, answer)| {
        let is_valid = answer.row.accepts(setup.secret(key), node.clock(moment));
        let is_answered = || match node.clone().after_redis(key, Entry::Data(answer), moment) {
            Stage::Checked { is_accepted, .. } => is_accepted,
            _ => false,
        };
        !is_valid || is_answered()
    })
}

fn raises_both_minimums(setup: &Setup, world: &World) -> bool {
    let moment = setup.moment(world);
    world.nodes[..setup.nodes].iter().all(|node| {
        let mut node = *node;
        node.finish_change(moment);
        node.poll(&world.database, moment);
        world.database.changes().filter(|change| moment.minimum_lives(change.dated)).all(|change| {
            let mut ids = (0..KEYS).filter(|id| change.subject.touches(*id));
            ids.all(|id| node.minimum.of(id).key >= change.revision)
        })
    })
}

fn accepts_a_previous_secret(setup: &Setup, world: &World) -> bool {
    answers(setup, world).any(|given| {
        let standing = given.answer.row.standing(setup.secret(given.key));
        given.is_accepted && matches!(standing, Standing::Previous { .. })
    })
}

fn ends_in_the_local_cache(setup: &Setup, world: &World) -> bool {
    has_an_entry_out_of_time(setup, world, true)
}

fn lifts_a_denial(setup: &Setup, world: &World) -> bool {
    has_an_entry_out_of_time(setup, world, false)
}

fn has_an_entry_out_of_time(setup: &Setup, world: &World, is_accepted: bool) -> bool {
    let moment = setup.moment(world);
    nodes_and_keys(setup).any(|(node, key)| {
        let node = &world.nodes[node];
        node.live_entry(key, moment).is_some_and(|entry| {
            entry.is_accepted == is_accepted
                && node.is_fresh(entry.answer, moment)
                && !node.applies(setup.secret(key), entry, moment)
        })
    })
}

fn ends_in_redis(setup: &Setup, world: &World) -> bool {
    usable_entries(setup, world).any(|(node, key, answer)| match answer.listed(setup.secret(key)) {
        Standing::Previous { ends_at } => node.clock(setup.moment(world)) >= ends_at,
        Standing::Current | Standing::Unknown => false,
    })
}

fn finds_an_entry_without_the_secret(setup: &Setup, world: &World) -> bool {
    let is_listed = |(_, key, answer): (&Node, usize, Answer)| {
        answer.listed(setup.secret(key)) != Standing::Unknown
    };
    usable_entries(setup, world).any(|entry| !is_listed(entry))
}

/// The entries of Redis that a look-up is about to read, and that neither a change nor their age rejects.
fn usable_entries<'a>(
    setup: &'a Setup,
    world: &'a World,
) -> impl Iterator<Item = (&'a Node, usize, Answer)> + 'a {
    let moment: Moment<'a> = setup.moment(world);
    look_ups(setup, world).filter_map(move |(node, key, stage)| {
        let (Stage::QueryRedis, Entry::Data(answer)) = (stage, world.redis.entries[key]) else {
            return None;
        };
        let is_usable = moment.entry_lives(answer)
            && !is_below_minimum(node, key, answer)
            && node.is_fresh(answer, moment);
        is_usable.then_some((node, key, answer))
    })
}

/// When the grace period of a secret ends, whatever came later.
fn end_of(world: &World, secret: usize) -> Option<Tick> {
    let mut ends = world.database.changes().filter_map(|change| match change.edit {
        Edit::Rotate { ends_at } => Some(ends_at),
        _ => None,
    });
    ends.nth(secret)
}
