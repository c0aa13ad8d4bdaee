//! Usage and budgets of keys.
//!
//! [`AuthContext::record_usage`](crate::AuthContext::record_usage) adds a [`Usage`] of tokens and cost to the key.
//! [`AuthContext::reserve`](crate::AuthContext::reserve) holds a part of the key's budget before the work begins, and
//! returns a [`Reservation`] to settle. [`BudgetLayer`](crate::middleware::BudgetLayer) charges a fixed cost a request.
//!
//! ```
//! use tower_api_key::{AuthContext, Denial, metering::Usage};
//!
//! async fn complete(caller: AuthContext, prompt: String) -> Result<String, Denial> {
//!     // Two cents, in micro-cents.
//!     let reservation = caller.reserve(2_000_000).await?;
//!     let tokens = prompt.len() as u64;
//!     reservation.settle(tokens * 500);
//!     caller.record_usage(Usage::tokens(tokens));
//!     Ok(prompt)
//! }
//! ```
//!
//! # Usage
//!
//! Each request that is let in counts one, and handlers add tokens and cost. Usage is written every second, to the
//! totals of the key and by day (UTC) to `api_key_usage`. Batches are retried and idempotent. `kill -9` loses one
//! interval, or what has been queued while the store was unavailable; [`shutdown`](crate::Authenticator::shutdown)
//! loses nothing that the store accepts within 10 s. `last_used_at` is written once a minute for the whole fleet.
//! `record_usage` counts a cost and denies nothing.
//!
//! # Budgets
//!
//! A [`Budget`](crate::record::Budget) is total, or per day, week (from Monday) or month, in UTC. Limits are in cents,
//! costs in micro-cents (a cent is 1,000,000). A node leases a part of the budget and serves reservations from it
//! without I/O; what a fleet reserves never exceeds the limit. [`settle`](Reservation::settle) charges the actual cost,
//! also above the estimate; a reservation that is dropped charges its estimate.
//!
//! While the store is unavailable, reservations continue within the current leases, then the answer is 503. The lease
//! of a node that is killed, or has no connection for 30 s
//! ([`lease_lifetime`](crate::authenticator::AuthenticatorBuilder::lease_lifetime)), returns to the others: what it had
//! used and not written can exceed the limit, by one lease a node at most.
//!
//! A session that keeps a row of `api_keys` locked delays the usage of the nodes that used that key, and a `reserve`
//! that needs a new lease is 503 after 2 s. A store without [`KeyStore::lease`](crate::store::KeyStore::lease), or
//! [`without_usage`](crate::authenticator::AuthenticatorBuilder::without_usage), answers a reservation with 500 and
//! logs one warning. [`backend`](crate::backend#privileges-in-postgresql) lists the privileges that the role of the
//! service needs. `cargo bench --bench enforcement` measures usage and budgets.

mod key_lease;
mod leases;
mod recorder;
mod reservation;
mod usage;
mod usage_counter;
mod usage_queue;

pub(crate) use self::{recorder::Recorder, usage_counter::UsageCounter};
pub use self::{reservation::Reservation, usage::Usage};
