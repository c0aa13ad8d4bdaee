//! The engine without HTTP: takes a key and returns an [`AuthContext`](crate::AuthContext) or a
//! [`Denial`](crate::Denial).
//!
//! Read [`resolver`] first: it contains the path of a look-up. [`local_cache`] is the first tier, [`single_flight`]
//! shares concurrent look-ups of one key, [`lookup_limiter`] decides on the priority of look-ups, and [`change_feed`]
//! follows the changes of the store.

mod admission;
mod authenticate;
mod change_feed;
mod health;
mod local_cache;
mod lookup_limiter;
mod resolver;
mod settings;
mod single_flight;

pub(crate) use self::{
    authenticate::check_address,
    resolver::{Cached, LookupFuture},
};
pub use self::{
    authenticate::{Authenticator, AuthenticatorBuilder},
    health::Health,
};
