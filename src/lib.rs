// The examples of the README need every feature, and are doctests.
#![cfg_attr(feature = "full", doc = include_str!("../README.md"))]
#![cfg_attr(
    not(feature = "full"),
    doc = "API-key authentication for tower services: axum, tonic, hyper.\n\n\
           The layer is [`ApiKeyAuthLayer`]. With the feature `full`, this page is the README, which has examples \
           for all features."
)]
#![cfg_attr(docsrs, feature(doc_cfg))]
// Set here and not in Cargo.toml, because tests may use these.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod authenticator;
pub mod backend;
pub mod clock;
mod coherence;
mod context;
pub mod denial;
pub mod error;
pub mod key;
pub mod management;
pub mod metering;
pub mod middleware;
mod policy;
pub mod rate_limit;
pub mod record;
#[cfg(feature = "redis")]
pub mod redis;
mod runtime;
pub mod store;
pub mod telemetry;

/// The crate that defines the time stamp types of this API, such as
/// [`KeyRecord::expires_at`](record::KeyRecord::expires_at), in the version that this crate uses.
pub use chrono;

#[doc(inline)]
pub use authenticator::Authenticator;
#[cfg(feature = "postgres")]
#[doc(inline)]
pub use backend::PostgresStore;
#[cfg(feature = "redis")]
#[doc(inline)]
pub use backend::RedisCache;
#[cfg(feature = "sqlite")]
#[doc(inline)]
pub use backend::SqliteStore;
#[doc(inline)]
pub use backend::{MemoryStore, Replica};
pub use context::AuthContext;
#[doc(inline)]
pub use denial::Denial;
#[doc(inline)]
pub use error::StoreError;
#[doc(inline)]
pub use key::KeyScheme;
#[doc(inline)]
pub use management::{KeyManager, NewKey};
#[doc(inline)]
pub use middleware::{ApiKeyAuthLayer, RateLimitLayer, RequireLayer};
