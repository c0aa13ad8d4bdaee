//! The local cache: look-ups, staleness, rechecks, races with a revoke and floods of unknown keys.

mod extreme_durations;
mod flood;
mod local_cache;
mod race;
mod recheck;
mod single_flight;
#[path = "../support/mod.rs"]
mod support;
