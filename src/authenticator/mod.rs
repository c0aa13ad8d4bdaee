//! The engine, free of HTTP: a key in, an [`AuthContext`](crate::AuthContext) or a [`Denial`](crate::Denial) out.
//!
//! Read [`resolver`] first, which has the way down and up again; [`local_cache`] is the first tier, [`single_flight`] is
//! what is under way for a key that is not in it, [`lookup_limiter`] decides whose look-ups go first, and
//! [`change_feed`] follows the changes of the store.

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
