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
// Some items are used by shared caches only.
#![cfg_attr(not(feature = "redis"), allow(dead_code))]

mod authenticator;
mod backend;
mod coherence;
mod context;
mod denial;
mod error;
mod key;
mod management;
mod metering;
mod middleware;
mod policy;
mod rate_limit;
mod record;
#[cfg(feature = "redis")]
mod redis;
mod runtime;
mod store;
mod telemetry;

/// The crate that defines the time stamp types of this API, such as [`KeyRecord::expires_at`], in the version that
/// this crate uses.
pub use chrono;

pub use authenticator::{Authenticator, AuthenticatorBuilder, Health};
pub use backend::MemoryStore;
#[cfg(feature = "_sql")]
pub use backend::{ColumnFault, FindingKind, KeyFinding, KeyReview, MigrateError, MigrationReport};
#[cfg(feature = "postgres")]
pub use backend::{PostgresStore, PostgresStoreBuilder, PostgresUrlError};
#[cfg(feature = "redis")]
pub use backend::{RedisCache, RedisCacheBuilder, RedisCacheError};
#[cfg(feature = "sqlite")]
pub use backend::{SqliteStore, SqliteStoreBuilder};
pub use context::AuthContext;
pub use denial::{
    BudgetExceeded, Denial, Forbidden, InvalidKey, MalformedCredential, UnrecognizedKey,
};
pub use error::{StoreError, StoreErrorKind};
pub use key::{
    FormatError, HashError, KeyFormat, KeyHash, KeyScheme, KeySchemeBuilder, MintError, MintedKey,
    SchemeError,
};
pub use management::{IssuedKey, KeyManager, ManageError, NewKey};
pub use metering::{Reservation, Usage};
pub use middleware::{
    ApiKeyAuth, ApiKeyAuthLayer, BudgetLayer, ClientAddr, Credential, DeniedRequest, Guard,
    GuardFuture, InvalidRealm, RateLimitLayer, RequestHead, RequireLayer, ResponseBody,
    ResponseFuture, TrustedProxies, openai_error,
};
pub use policy::CeilingField;
pub use rate_limit::{LocalRateLimiter, RateLimiter};
#[cfg(feature = "redis")]
pub use rate_limit::{OnRedisFailure, RedisRateLimiter, RedisRateLimiterBuilder};
pub use record::{
    AllowedNetwork, Budget, BudgetPeriod, EndpointRule, EndpointRuleError, KeyId, KeyRecord,
    NetworkError, Quota, RateLimits, RatePeriod, RateWindow, Revision, Revisions, UsageTotals,
    User, UserId,
};
#[cfg(feature = "redis")]
pub use redis::{RedisServers, RedisState, RedisUrlError};
pub use runtime::{Clock, ManualClock, Moment, SystemClock};
pub use store::{
    Answer, CacheSecret, Change, ChangeStream, DynKeyStore, FeedFault, FeedStatus, HashUpgrade,
    KeyPage, KeyRepository, KeyStore, KeyUsage, Lease, LeaseRequest, ListKeys, Lookup, StoredKey,
    UnreadableKey, UsageBatch,
};
