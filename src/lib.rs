// The examples of the README need every feature, and are doctests.
#![cfg_attr(feature = "full", doc = include_str!("../README.md"))]
#![cfg_attr(
    not(feature = "full"),
    doc = "API-key authentication for tower services: axum, tonic, hyper.\n\n\
           The layer is [`ApiKeyAuthLayer`]. With the feature `full`, this page is the README, which has examples \
           for all features."
)]
#![cfg_attr(docsrs, feature(doc_cfg))]
// Here and not in Cargo.toml, because tests may.
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic))]
// What serves shared caches alone.
#![cfg_attr(not(feature = "redis"), allow(dead_code))]

mod authenticate;
mod body;
mod budget;
mod cache;
mod client;
mod clock;
mod context;
mod credential;
mod deadline;
mod discard;
mod error;
#[cfg(feature = "axum")]
mod extract;
mod future;
mod gated_call;
mod guard;
mod key;
mod layer;
mod limit;
mod manage;
mod policy;
mod recent;
mod record;
#[cfg(feature = "redis")]
mod redis;
mod require;
mod respond;
mod service;
mod store;
mod telemetry;
mod usage;

/// The crate whose types stand for time stamps in this API, such as [`KeyRecord::expires_at`], in the version of those
/// types.
pub use chrono;

pub use authenticate::{Authenticator, AuthenticatorBuilder};
pub use body::ResponseBody;
pub use budget::{BudgetLayer, Reservation};
pub use cache::Health;
pub use client::{ClientAddr, TrustedProxies};
pub use clock::{Clock, ManualClock, SystemClock};
pub use context::AuthContext;
pub use credential::{Credential, RequestHead};
pub use error::{StoreError, StoreErrorKind};
pub use future::ResponseFuture;
pub use guard::{Guard, GuardFuture};
pub use key::{
    FormatError, HashError, KeyFormat, KeyHash, KeyScheme, KeySchemeBuilder, MalformedCredential,
    MintError, MintedKey, SchemeError, UnrecognizedKey,
};
pub use layer::{ApiKeyAuthLayer, InvalidRealm};
pub use limit::{LocalRateLimiter, Quota, RateLimitLayer, RateLimiter, RatePeriod, RateWindow};
#[cfg(feature = "redis")]
pub use limit::{RedisRateLimiter, RedisRateLimiterBuilder, WhenRedisIsAway};
pub use manage::{IssuedKey, KeyManager, ManageError, NewKey};
pub use policy::{AllowedNetwork, EndpointRule, EndpointRuleError, NetworkError};
pub use record::{
    Budget, BudgetPeriod, KeyId, KeyRecord, RateLimits, Revision, Revisions, StoredKey,
    UsageTotals, User, UserId,
};
#[cfg(feature = "redis")]
pub use redis::{RedisServers, RedisState, RedisUrlError};
pub use require::RequireLayer;
pub use respond::{BudgetExceeded, Denial, Forbidden, InvalidKey, Refusal, openai_error};
pub use service::ApiKeyAuth;
pub use store::{
    Answer, CacheSecret, Change, ChangeStream, DynKeyStore, FeedFault, FeedStatus, HashUpgrade,
    KeyPage, KeyRepository, KeyStore, KeyUsage, Lease, LeaseAsk, ListKeys, Lookup, MemoryStore,
    UnreadableKey, UsageBatch,
};
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub use store::{ColumnFault, FindingKind, KeyFinding, KeyReview, MigrateError, MigrationReport};
#[cfg(feature = "postgres")]
pub use store::{PostgresStore, PostgresStoreBuilder, PostgresUrlError};
#[cfg(feature = "redis")]
pub use store::{RedisCache, RedisCacheBuilder, RedisCacheError};
#[cfg(feature = "sqlite")]
pub use store::{SqliteStore, SqliteStoreBuilder};
pub use usage::Usage;
