//! Reasons for which a request is denied.

mod credential;
mod log;
mod reason;

pub use self::{
    credential::{MalformedCredential, UnrecognizedKey},
    reason::{BudgetExceeded, Denial, Forbidden, InvalidKey},
};
