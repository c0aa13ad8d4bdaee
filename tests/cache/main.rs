//! The local cache: flights, staleness, rechecks, races with a revoke and floods of unknown keys.

mod extreme_durations;
mod flight;
mod flood;
mod local_cache;
mod race;
mod recheck;
#[path = "../support/mod.rs"]
mod support;
