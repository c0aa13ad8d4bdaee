//! The cache protocol as a model, and a checker that goes through every order of its steps.
//!
//! **The protocol.** The database is the truth: each change draws a *revision* from one sequence
//! and leaves a row in a change table. A node that processes a change first raises its *minimum revision* for
//! that key or owner, then moves the *generation* of the key's bucket, and has a *tombstone* put
//! into Redis. A local hit compares generations. A miss is looked up by one *look-up* a key: Redis
//! first, if the node has caught up with the change table since its start, then the database;
//! nothing below the minimum revision counts, and a look-up that began before the last processed change is not
//! joined. What was read is kept under the generation from before the read, and goes to Redis,
//! where a script rejects a lower revision than the one it finds. Nothing is served past
//! `max_staleness` since it was read or the node was last in sync, nor past `stale_if_error` more
//! while the database fails.
//!
//! **What can go wrong** at every step, for free: a message of the feed, a fill or a delete is
//! late, comes twice or never; a look-up in Redis or the database fails, which is all that a node
//! cut off from them sees. A fault out of a small budget: Redis loses its memory, or goes back to
//! an earlier state (a snapshot, a lagging replica); a node crashes between any two steps.
//!
//! **What can break the history**, once in a run. The triggers are missing: a change then has
//! neither a revision nor a row. A failover loses the last commits, and their revisions are given
//! again. A clone of the database is used on the same Redis. The feed reports no sync while
//! triggers are missing and a reset when they are back; it resets if a row of any transaction that
//! it has read is gone; names and MACs in Redis are bound to the database. A reset clears minimum revisions and
//! generations, and no entry from before it is taken from Redis. These rules require that the feed
//! of each node reads the table during the break: has seen the triggers missing, or has read the
//! rows that are lost. The tests `without_a_mark_…` show the limit: a break between two reads, and a
//! node that starts after the break. A mark that a feed finds later (a row that resets, the timeline
//! of the server) removes it.
//!
//! **Rotation.** A rotation is one change of a row, which is reported under its lookup ids before and after it. An entry
//! lists the current and the previous secret; the end of the grace period is checked by the node's clock when a secret is
//! looked up and on each serve. An entry of Redis without the presented secret is a miss. Clocks are wrong by a bound.
//!
//! **Where to read.** [`setup`] is what a run explores, [`database`], [`redis`] and [`node`] are
//! the parts, [`fork`] is what breaks the history, [`feed`] is a read of the change table, [`look_up`]
//! is a look-up, [`writes`] are the writes to Redis, [`protocol`] puts them together for the checker, and
//! [`properties`] defines what must hold. [`secrets`] are those of a rotated key, [`grace`] what must hold of them, and
//! [`rotations`] the tests. Each mechanism can be taken out; the tests then show what
//! goes wrong without it. Not modelled: the time between a poll and its answer, a negative answer
//! as other than an answer (except of a rotated key), several rows under one prefix, a failover during a read of the feed.

mod database;
mod feed;
mod fork;
mod grace;
mod look_up;
mod node;
mod properties;
mod protocol;
mod redis;
mod replica;
mod rotations;
mod secrets;
mod setup;
mod writes;

use std::time::Instant;

use stateright::{Checker, Expectation, Model};

use crate::properties::{
    AGES_WITHOUT_TRIGGERS, ANSWERED_AGAIN, BURIED, CATCHES_UP, COMPARE_REJECTS, GIVEN_AGAIN,
    MINIMUM_DISCARDS, MINIMUM_REJECTS, NEVER_STUCK, NOT_JOINED, NOTHING_FROM_BEFORE,
    NOTHING_OF_CLONES, NOTHING_TOO_OLD, RESET_REJECTS, SERVED_OLDER,
};
use crate::protocol::World;
use crate::setup::{Break, Detail, Mechanism, Setup};

const REJECTIONS: [&str; 4] = [MINIMUM_REJECTS, MINIMUM_DISCARDS, COMPARE_REJECTS, NOT_JOINED];

#[test]
fn three_changes_and_two_faults_break_no_promise_in_a_fleet() {
    let setup = Setup { changes: 3, ..Setup::one_key() };
    keeps_every_promise(setup, 300_000, &[&REJECTIONS[..], &[CATCHES_UP]].concat());
}

#[test]
fn two_nodes_that_share_a_redis_break_no_promise() {
    keeps_every_promise(Setup::two_nodes(), 300_000, &[&REJECTIONS[..], &[CATCHES_UP]].concat());
}

#[test]
fn two_keys_of_one_bucket_and_owner_break_no_promise() {
    keeps_every_promise(Setup::two_keys(), 600_000, &REJECTIONS);
}

#[test]
fn changes_that_commit_out_of_order_break_no_promise() {
    let reached = [&REJECTIONS[..], &[CATCHES_UP]].concat();
    keeps_every_promise(Setup::key_and_owner(), 200_000, &reached);
}

#[test]
fn no_answer_outlives_the_bounds_of_age() {
    let reached = [&REJECTIONS[..], &[CATCHES_UP, SERVED_OLDER]].concat();
    keeps_every_promise(Setup::with_time(), 400_000, &reached);
}

#[test]
fn missing_triggers_break_no_promise() {
    let reached = [AGES_WITHOUT_TRIGGERS, RESET_REJECTS];
    keeps_every_promise(Setup::triggers_missing(), 30_000, &reached);
}

#[test]
fn a_failover_that_loses_commits_breaks_no_promise() {
    let reached = [RESET_REJECTS, GIVEN_AGAIN];
    keeps_every_promise(Setup::commits_lost(), 20_000, &reached);
}

#[test]
fn no_lost_commit_outlives_the_bounds_of_age() {
    let setup = Setup { late_commits: false, ..Setup::commits_lost_in_time() };
    keeps_every_promise(setup, 200_000, &[RESET_REJECTS, GIVEN_AGAIN]);
}

#[test]
fn a_clone_on_the_same_redis_breaks_no_promise() {
    keeps_every_promise(Setup::cloned(), 30_000, &[MINIMUM_REJECTS, MINIMUM_DISCARDS]);
}

/// With a mark that stays, a feed can read it at any later time, also that of a node which starts.
#[test]
fn a_mark_of_the_break_replaces_a_read_during_it() {
    for breaks in [Break::TriggersMissing, Break::CommitsLost] {
        keeps_every_promise(Setup::unseen(breaks, 1).with_marks(), 20_000, &[RESET_REJECTS]);
    }
}

#[test]
#[ignore = "minutes without optimisation: cargo test --release --test model -- --ignored"]
fn two_nodes_and_three_changes_break_no_promise() {
    let setup = Setup { changes: 3, ..Setup::two_nodes() };
    keeps_every_promise(setup, 1_000_000, &[&REJECTIONS[..], &[CATCHES_UP]].concat());
}

#[test]
#[ignore = "minutes without optimisation: cargo test --release --test model -- --ignored"]
fn two_keys_and_a_fault_break_no_promise() {
    let setup = Setup { faults: 1, ..Setup::two_keys() };
    keeps_every_promise(setup, 1_000_000, &[&REJECTIONS[..], &[CATCHES_UP]].concat());
}

#[test]
#[ignore = "minutes without optimisation: cargo test --release --test model -- --ignored"]
fn two_changes_over_time_break_no_promise() {
    let setup = Setup { changes: 2, detail: Detail::Coarse, ..Setup::with_time() };
    keeps_every_promise(setup, 1_000_000, &[&REJECTIONS[..], &[CATCHES_UP, SERVED_OLDER]].concat());
}

#[test]
#[ignore = "minutes without optimisation: cargo test --release --test model -- --ignored"]
fn missing_triggers_and_an_outage_break_no_promise() {
    let ages = Setup::one_key().ages;
    let setup = Setup { ages, ticks: 3, ..Setup::triggers_missing() };
    keeps_every_promise(setup, 100_000, &[AGES_WITHOUT_TRIGGERS, RESET_REJECTS, SERVED_OLDER]);
}

#[test]
#[ignore = "minutes without optimisation: cargo test --release --test model -- --ignored"]
fn a_mark_of_missing_triggers_keeps_the_bounds_of_age_after_a_fault() {
    let setup = Setup { faults: 1, breaks_unseen: true, ..Setup::triggers_missing() };
    keeps_every_promise(setup.with_marks(), 100_000, &[AGES_WITHOUT_TRIGGERS, RESET_REJECTS]);
}

#[test]
#[ignore = "minutes without optimisation: cargo test --release --test model -- --ignored"]
fn no_commit_that_is_lost_late_outlives_the_bounds_of_age() {
    keeps_every_promise(Setup::commits_lost_in_time(), 350_000, &[RESET_REJECTS, GIVEN_AGAIN]);
}

#[test]
fn without_the_minimum_revision_an_old_redis_entry_is_served() {
    breaks(Setup::one_change().without(Mechanism::MinimumRevision), NOTHING_FROM_BEFORE);
}

#[test]
fn without_the_minimum_revision_an_old_redis_entry_is_served_for_good() {
    breaks(Setup::one_change().without(Mechanism::MinimumRevision), ANSWERED_AGAIN);
}

#[test]
fn with_the_generation_moved_before_the_minimum_revision_an_old_answer_is_kept_as_new() {
    breaks(Setup::one_change().without(Mechanism::MinimumFirst), NOTHING_FROM_BEFORE);
}

#[test]
fn without_the_generation_a_hit_is_from_before_the_change() {
    breaks(Setup::one_change().without(Mechanism::Generation), NOTHING_FROM_BEFORE);
}

#[test]
fn with_the_generation_taken_after_the_read_an_old_answer_is_kept_as_new() {
    breaks(Setup::one_change().without(Mechanism::GenerationBeforeRead), NOTHING_FROM_BEFORE);
}

#[test]
fn without_the_look_up_check_a_request_joins_an_answer_from_before_the_change() {
    breaks(Setup::one_change().without(Mechanism::LookUpCheck), NOTHING_FROM_BEFORE);
}

#[test]
fn without_the_revision_compare_a_late_fill_undoes_a_tombstone() {
    breaks(Setup::one_change().without(Mechanism::RevisionCompare), BURIED);
}

#[test]
fn without_catch_up_a_restarted_node_believes_an_old_redis_entry() {
    breaks(
        Setup { faults: 1, ..Setup::one_change() }.without(Mechanism::CatchUp),
        NOTHING_FROM_BEFORE,
    );
}

#[test]
fn without_catch_up_a_restarted_node_never_learns_better() {
    breaks(Setup { faults: 1, ..Setup::one_change() }.without(Mechanism::CatchUp), ANSWERED_AGAIN);
}

/// The later revision commits first, the other's row second. By the higher of the two, an entry
/// read in between looks as new as the change that it lacks.
#[test]
fn with_one_revision_for_key_and_owner_a_late_commit_is_missed() {
    breaks(Setup::key_and_owner().without(Mechanism::RevisionPerSubject), NOTHING_FROM_BEFORE);
}

/// The owner's revision, taken for a minimum revision of the key, is above all that the key's row will say.
#[test]
fn with_a_tombstone_that_names_no_subject_a_key_is_never_answered_again() {
    breaks(Setup::key_and_owner().without(Mechanism::TombstoneOfSubject), ANSWERED_AGAIN);
}

#[test]
fn without_the_rule_of_age_a_node_that_receives_no_change_serves_for_ever() {
    breaks(Setup::with_time().without(Mechanism::AgeRule), NOTHING_TOO_OLD);
}

/// A look-up takes an entry that is about to expire out of Redis and has to ask the database. The
/// change is processed, the node is in sync, the minimum revision is forgotten, and then the database fails.
#[test]
fn with_a_minimum_revision_kept_no_longer_than_a_redis_entry_a_look_up_outlives_it() {
    breaks(Setup::with_time().without(Mechanism::MinimumOutlivesLookUp), NOTHING_TOO_OLD);
}

/// A change begins and commits only when its minimum revision's life is nearly over by the time in its row. An
/// entry read just before the commit outlives the minimum revision that should reject it.
#[test]
fn with_a_minimum_revision_that_counts_from_the_begin_of_a_transaction_a_late_commit_is_forgotten()
{
    let setup = Setup { late_commits: true, faults: 0, ..Setup::with_time() };
    breaks(setup.without(Mechanism::RowTimeOfCommit), NOTHING_FROM_BEFORE);
}

#[test]
fn with_syncs_while_triggers_are_missing_a_change_without_a_row_is_served_for_ever() {
    breaks(Setup::triggers_missing().without(Mechanism::SyncNeedsTriggers), NOTHING_TOO_OLD);
}

#[test]
fn without_a_reset_when_triggers_are_back_a_change_without_a_row_is_served_for_ever() {
    breaks(Setup::triggers_missing().without(Mechanism::ResetWhenBack), NOTHING_TOO_OLD);
}

#[test]
fn without_a_reset_when_triggers_are_back_a_node_never_learns_better() {
    breaks(Setup::triggers_missing().without(Mechanism::ResetWhenBack), ANSWERED_AGAIN);
}

/// The lost change has a lower revision than one that survives it. Its answer stays as it was read.
#[test]
fn with_only_the_latest_row_checked_a_lost_change_is_served_for_ever() {
    let setup = Setup::commits_lost_in_time().without(Mechanism::EveryRowChecked);
    breaks(setup, NOTHING_TOO_OLD);
}

/// A look-up takes an entry out of Redis and has to ask the database. The feed resets and is in
/// sync, no minimum revision is left, and then the database fails.
#[test]
fn with_a_reset_that_leaves_out_look_ups_a_lost_change_outlives_it() {
    let (changes, owner_changes, late_commits) = (1, false, false);
    let setup = Setup { changes, owner_changes, late_commits, ..Setup::commits_lost_in_time() };
    breaks(setup.without(Mechanism::ResetCoversLookUps), NOTHING_TOO_OLD);
}

/// The minimum revision of the lost change stays above all that the key's row holds.
#[test]
fn with_only_the_latest_row_checked_a_key_is_never_answered_again() {
    breaks(Setup::commits_lost().without(Mechanism::EveryRowChecked), NEVER_STUCK);
}

/// Nothing is left that a read could find.
#[test]
fn without_a_mark_triggers_that_are_back_before_the_next_read_are_missed() {
    breaks(Setup::unseen(Break::TriggersMissing, 0), ANSWERED_AGAIN);
}

/// The feed has read no row of it, but a look-up has read the change.
#[test]
fn without_a_mark_a_lost_change_that_only_a_look_up_has_read_is_served_for_ever() {
    breaks(Setup::unseen(Break::CommitsLost, 0), ANSWERED_AGAIN);
}

/// The feed has read no row of it, but a look-up has found the tombstone.
#[test]
fn without_a_mark_a_lost_change_that_only_another_node_has_read_locks_a_key() {
    breaks(Setup::unseen(Break::CommitsLost, 0), NEVER_STUCK);
}

/// Nor does the change table have anything for it.
#[test]
fn without_a_mark_a_node_that_starts_when_triggers_are_back_believes_an_old_redis_entry() {
    let setup = Setup { faults: 1, ticks: 0, ..Setup::triggers_missing() };
    breaks(setup, ANSWERED_AGAIN);
}

/// What the node has read is forgotten, and Redis has an entry with the lost change.
#[test]
fn without_a_mark_a_node_that_starts_after_the_failover_believes_an_old_redis_entry() {
    let setup = Setup { faults: 1, ..Setup::commits_lost() };
    breaks(setup, ANSWERED_AGAIN);
}

#[test]
fn without_the_name_of_the_database_an_entry_of_a_clone_is_served_for_a_revoked_key() {
    breaks(Setup::cloned().without(Mechanism::BoundToDatabase), NOTHING_FROM_BEFORE);
}

#[test]
fn without_the_name_of_the_database_the_answers_of_a_clone_are_served() {
    breaks(Setup::cloned().without(Mechanism::BoundToDatabase), NOTHING_OF_CLONES);
}

/// A tombstone of the clone has a revision that this database has not given.
#[test]
fn without_the_name_of_the_database_a_change_in_a_clone_locks_a_key() {
    breaks(Setup::cloned().without(Mechanism::BoundToDatabase), NEVER_STUCK);
}

/// Goes through every state. `reached` are the situations without which that would mean little.
pub(crate) fn keeps_every_promise(setup: Setup, at_least: usize, reached: &[&str]) {
    let began = Instant::now();
    // Depth first for its memory. Nodes are alike: worlds that differ in their order are one.
    let checker = setup.checker().threads(2).symmetry_fn(in_order).spawn_dfs().join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!("{states} states, up to {depth} steps deep, in {:?}", began.elapsed());
    let found = checker.discoveries();
    for property in checker.model().properties() {
        if property.expectation != Expectation::Sometimes {
            let trace = found.get(property.name).map(|path| path.clone().into_actions());
            assert!(trace.is_none(), "not kept: {}, after {trace:#?}", property.name);
        }
    }
    for situation in reached {
        assert!(found.contains_key(situation), "never reached: {situation}");
    }
    assert!(states >= at_least, "only {states} states: the model has shrunk");
}

fn in_order(world: &World) -> World {
    let mut world = world.clone();
    world.nodes.sort_unstable();
    world
}

/// Expects a counterexample, and prints the shortest: each round of the search goes a step deeper.
pub(crate) fn breaks(setup: Setup, promise: &'static str) {
    let missing = setup.without;
    let mut depth = 1;
    let trace = loop {
        let checker = setup.clone().checker().target_max_depth(depth).spawn_bfs().join();
        if let Some(path) = checker.discovery(promise) {
            break path.into_actions();
        }
        assert!(checker.max_depth() >= depth, "kept without {missing:?}: {promise}");
        depth += 1;
    };
    println!("Without {missing:?}, no longer: {promise}. After {} steps:", trace.len());
    trace.iter().for_each(|action| println!("    {action:?}"));
}
