//! Usage, budgets and rate limits.

mod budget;
mod budget_fleet;
mod capabilities;
mod coarse_totals;
mod ledger;
mod rate_limit;
mod reservations;
#[path = "../support/mod.rs"]
mod support;
mod usage;
mod usage_faults;
mod usage_fleet;
