//! Rotation: both secrets are accepted within the grace period, and no node accepts the previous one after it.

use crate::grace::{
    ACCEPTED_WHILE_VALID, BOTH_FROM_REDIS, DENIAL_LIFTED, DENIED_AFTER_THE_END,
    ENDS_IN_LOCAL_CACHE, ENDS_IN_REDIS, MINIMUM_OF_BOTH_IDS, NO_DENIAL_KEPT, NOT_LISTED,
    PREVIOUS_ACCEPTED,
};
use crate::properties::{ANSWERED_AGAIN, MINIMUM_REJECTS, NOTHING_TOO_OLD};
use crate::secrets::{LookupIds, Rotation};
use crate::setup::{Ages, Mechanism, Setup, Writers};
use crate::{breaks, keeps_every_promise};

const ENDS: [&str; 3] = [PREVIOUS_ACCEPTED, ENDS_IN_LOCAL_CACHE, ENDS_IN_REDIS];

/// Among the three changes are rotations, the end of a grace period and a revocation, in every order that is possible.
#[test]
fn the_first_secret_of_a_key_breaks_no_promise() {
    let setup = Setup { changes: 3, ..Setup::rotated(LookupIds::Same, 0..1) };
    keeps_every_promise(setup, 150_000, &[&ENDS[..], &[DENIAL_LIFTED, MINIMUM_REJECTS]].concat());
}

#[test]
fn the_second_secret_of_a_key_breaks_no_promise() {
    let setup = Setup { changes: 3, ..Setup::rotated(LookupIds::Same, 1..2) };
    keeps_every_promise(setup, 120_000, &[PREVIOUS_ACCEPTED, NOT_LISTED, MINIMUM_REJECTS]);
}

#[test]
fn a_first_secret_with_another_lookup_id_breaks_no_promise() {
    let setup = Setup::rotated(LookupIds::Differ, 0..1);
    keeps_every_promise(setup, 80_000, &[&ENDS[..], &[DENIAL_LIFTED, MINIMUM_REJECTS]].concat());
}

#[test]
fn two_secrets_of_one_lookup_id_break_no_promise() {
    let setup = Setup { changes: 1, ..Setup::rotated(LookupIds::Same, 0..2) };
    keeps_every_promise(setup, 25_000, &[&ENDS[..], &[NOT_LISTED]].concat());
}

#[test]
fn two_secrets_of_two_lookup_ids_break_no_promise() {
    let (changes, writers) = (1, Writers::Nodes);
    let setup = Setup { changes, writers, ..Setup::rotated(LookupIds::Differ, 0..2) };
    keeps_every_promise(setup, 300_000, &ENDS);
}

#[test]
fn no_secret_outlives_its_grace_period() {
    keeps_every_promise(Setup::rotated_in_time(LookupIds::Same, 0..1), 150_000, &ENDS);
}

#[test]
fn a_new_secret_is_accepted_from_the_rotation_on() {
    keeps_every_promise(Setup::rotated_in_time(LookupIds::Same, 1..2), 30_000, &[NOT_LISTED]);
}

/// A node that leaves out a secret whose end its clock has passed. No clock is set here; the tests
/// `with_secrets_that_a_clock_leaves_out_…` show what goes wrong if one is.
#[test]
fn secrets_that_are_listed_by_a_steady_clock_break_no_promise() {
    let setup = Setup::rotated(LookupIds::Same, 0..1).with_steady_clocks();
    let reached = [PREVIOUS_ACCEPTED, NOT_LISTED, MINIMUM_REJECTS];
    keeps_every_promise(setup.without(Mechanism::ListedAfterTheEnd), 8_000, &reached);
}

#[test]
#[ignore = "minutes without optimisation: cargo test --release --test model -- --ignored"]
fn no_secret_with_another_lookup_id_outlives_its_grace_period() {
    let setup = Setup { ticks: 3, ..Setup::rotated_in_time(LookupIds::Differ, 0..1) };
    keeps_every_promise(setup, 700_000, &[&ENDS[..], &[DENIAL_LIFTED]].concat());
}

#[test]
#[ignore = "minutes without optimisation: cargo test --release --test model -- --ignored"]
fn no_secret_outlives_its_grace_period_on_two_nodes() {
    let (nodes, writers) = (2, Writers::Nodes);
    let setup = Setup::rotated_in_time(LookupIds::Same, 0..1).with_steady_clocks();
    keeps_every_promise(Setup { nodes, writers, ..setup }, 4_500_000, &ENDS);
}

#[test]
fn without_the_end_in_the_local_cache_a_previous_secret_outlives_it() {
    let setup = Setup::rotated_in_time(LookupIds::Same, 0..1);
    breaks(setup.without(Mechanism::EndInLocalCache), DENIED_AFTER_THE_END);
}

#[test]
fn without_the_end_in_redis_a_previous_secret_outlives_it() {
    let setup = Setup::rotated_in_time(LookupIds::Same, 0..1);
    breaks(setup.without(Mechanism::EndInRedis), DENIED_AFTER_THE_END);
}

#[test]
fn without_the_end_after_a_look_up_a_previous_secret_outlives_it() {
    let setup = Setup::rotated_in_time(LookupIds::Same, 0..1);
    breaks(setup.without(Mechanism::EndAfterLookUp), DENIED_AFTER_THE_END);
}

/// The clock was ahead when the database was read, and is set back.
#[test]
fn with_secrets_that_a_clock_leaves_out_a_valid_secret_is_denied() {
    let setup = Setup::rotated(LookupIds::Same, 0..1);
    breaks(setup.without(Mechanism::ListedAfterTheEnd), ACCEPTED_WHILE_VALID);
}

/// The negative entry applies at any time, and the node is in sync: it is served until the end of the grace period.
#[test]
fn with_secrets_that_a_clock_leaves_out_a_denial_outlives_the_correction_of_the_clock() {
    let setup = Setup::rotated(LookupIds::Same, 0..1);
    breaks(setup.without(Mechanism::ListedAfterTheEnd), NO_DENIAL_KEPT);
}

#[test]
fn with_changes_under_the_new_lookup_id_only_the_old_one_has_no_minimum_revision() {
    let setup = Setup::rotated(LookupIds::Differ, 0..1);
    breaks(setup.without(Mechanism::BothIdsReported), MINIMUM_OF_BOTH_IDS);
}

#[test]
fn with_changes_under_the_new_lookup_id_only_a_node_never_learns_better() {
    let setup = Setup::rotated(LookupIds::Differ, 0..1);
    breaks(setup.without(Mechanism::BothIdsReported), ANSWERED_AGAIN);
}

#[test]
fn with_changes_under_the_new_lookup_id_only_an_answer_without_them_is_served_for_ever() {
    let setup = Setup::rotated_in_time(LookupIds::Differ, 0..1);
    breaks(setup.without(Mechanism::BothIdsReported), NOTHING_TOO_OLD);
}

/// The entry is from before the rotation, and has no end.
#[test]
fn with_changes_under_the_new_lookup_id_only_a_previous_secret_outlives_its_end() {
    let setup = Setup::rotated_in_time(LookupIds::Differ, 0..1);
    breaks(setup.without(Mechanism::BothIdsReported), DENIED_AFTER_THE_END);
}

/// A look-up for the previous secret goes on to the database, which a node that is cut off from it does not reach.
#[test]
fn with_entries_of_the_current_secret_only_the_previous_one_needs_the_database() {
    let setup = Setup::rotated(LookupIds::Same, 0..1);
    breaks(setup.without(Mechanism::PreviousListed), BOTH_FROM_REDIS);
}

/// The entry is from before the rotation, and the node has not learned of it.
#[test]
fn with_entries_that_deny_what_they_do_not_list_a_new_secret_is_denied() {
    let setup = Setup::rotated(LookupIds::Same, 1..2);
    breaks(setup.without(Mechanism::CopyNeverDenies), ACCEPTED_WHILE_VALID);
}

/// A node that is cut off before the rotation serves what it has for as long as the bounds of age allow.
#[test]
fn with_a_grace_period_below_the_bounds_of_age_a_node_that_is_cut_off_accepts_a_secret_after_it() {
    let setup = Setup::rotated_in_time(LookupIds::Same, 0..1);
    let rotation = setup.rotation.map(|rotation| Rotation { grace: 0, ..rotation });
    let ages = Ages { stale_if_error: 2, ..setup.ages };
    breaks(Setup { rotation, ages, ..setup }, DENIED_AFTER_THE_END);
}
