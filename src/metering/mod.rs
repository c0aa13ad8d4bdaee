//! Usage accounting and budgets of keys.

mod key_lease;
mod leases;
mod recorder;
mod reservation;
mod usage;
mod usage_counter;
mod usage_queue;

pub(crate) use self::{recorder::Recorder, usage_counter::UsageCounter};
pub use self::{reservation::Reservation, usage::Usage};
