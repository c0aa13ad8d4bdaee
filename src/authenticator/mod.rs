//! The engine without HTTP: a key in, an [`AuthContext`](crate::AuthContext) or a [`Denial`](crate::Denial) out.
//!
//! [`ApiKeyAuthLayer::new`](crate::ApiKeyAuthLayer::new) creates an [`Authenticator`] with the default settings. Create
//! one yourself to change the settings ([`Authenticator::builder`]), to share its caches between layers, to check keys
//! that don't arrive in HTTP requests, or to shut down without losing usage.
//!
//! ```
//! use std::time::Duration;
//! use tower_api_key::{ApiKeyAuthLayer, Authenticator, MemoryStore, middleware::Credential};
//!
//! # async fn run() {
//! let authenticator = Authenticator::builder(MemoryStore::new())
//!     .cache_capacity(200_000)
//!     .max_staleness(Duration::from_secs(30))
//!     .build();
//! let api = ApiKeyAuthLayer::from(authenticator.clone());
//! let legacy = ApiKeyAuthLayer::from(authenticator.clone()).credentials([Credential::basic()]);
//! // When the server has stopped: writes the usage of the last second and returns the budget leases.
//! authenticator.shutdown().await;
//! # }
//! ```
//!
//! # The local cache
//!
//! Each node caches up to 100,000 keys ([`cache_capacity`](AuthenticatorBuilder::cache_capacity)), and concurrent
//! requests with one key share one look-up. The store reports changes of keys and owners
//! ([`KeyStore::changes`](crate::store::KeyStore::changes)). A node that has received a change serves nothing older,
//! from any tier.
//!
//! [`Authenticator::health`] reports whether the store fails, when the node was last in sync with the changes, and why
//! changes may not arrive. [`Authenticator::invalidate`] drops what is cached under a lookup id, for changes made
//! outside of the store's knowledge.

// `resolver` contains the path of a look-up; read it first. `local_cache` is the first tier, `single_flight` shares
// concurrent look-ups of one key, `lookup_work` decides what polls a look-up, `lookup_limiter` decides on the priority of
// look-ups, and `change_feed` follows the changes of the store.
mod admission;
mod authenticate;
mod change_feed;
mod health;
mod local_cache;
mod lookup_limiter;
mod lookup_work;
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
