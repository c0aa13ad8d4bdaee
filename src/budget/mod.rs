//! What a key may cost: [`Reservation`], [`BudgetLayer`], and the rule that a store keeps.
//!
//! The database is the ledger. A node leases a slice of what is left of a key's budget ([`ledger`]) and serves
//! holds from it in memory ([`account`]): granted only while what was spent in the period, the leases of all
//! nodes and the slice are within the limit, so that the sum of what nodes let through is, too. What was settled
//! goes to the store with the usage, which charges the period and shrinks the lease in one transaction.

mod account;
mod layer;
pub(crate) mod ledger;
mod reservation;

pub(crate) use self::account::Accounts;
pub use self::{layer::BudgetLayer, reservation::Reservation};
