//! Rate limits of a fleet: [`RedisRateLimiter`].

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool_redis::redis::{Cmd, Value};

use super::{RateLimiter, local::LocalRateLimiter};
use crate::{
    error::StoreError,
    record::{KeyId, Quota, RateLimits, RatePeriod, RateWindow},
    redis::{Connector, Fault, Link, RedisServers, RedisState, RedisUrlError, Script, slot},
    runtime::{Background, Clock, SystemClock, hex},
    telemetry,
};

/// Counts the requests of a fleet in Redis, with one script and one round trip per request.
///
/// For any number of nodes, at most as many requests as the limit pass in a window, by the clock of Redis. Clones share
/// their counters.
///
/// While Redis does not answer, [`OnRedisFailure`] decides: by default each node enforces its share of the limits by
/// itself. Each node counts all requests that it lets through. A node that has used up its share of a window
/// therefore lets no more through if Redis fails within the window.
///
/// # Guarantee
///
/// With a limit of L and N nodes, at most
///
/// ```text
/// (1 + r) × L + (N + k) × max(⌊L / N⌋, 1)
/// ```
///
/// requests pass in a window in which Redis loses its data r times (a restart without persistence, an eviction, a
/// failover to a replica that lacks the last writes) and k nodes are started: L for each data set of Redis, and one
/// share for each node and for each node that is started. Without data loss and starts, at most 2 × L + N requests
/// pass if Redis is unavailable for a part of the window, and at most L if it is available. With
/// [`OnRedisFailure::Deny`] the limit is (1 + r) × L.
///
/// N is set by [`nodes`](RedisRateLimiterBuilder::nodes). By default nodes count each other. A node that starts while
/// Redis is unavailable, or within the last 5 s before, counts only itself: its share is L. Set N if the incident
/// that makes Redis unavailable may also start nodes. The windows of shares are aligned to the node's own clock.
///
/// Services that share a Redis each need a [`namespace`](RedisRateLimiterBuilder::namespace).
///
/// ```
/// use tower_api_key::{RateLimitLayer, rate_limit::RedisRateLimiter};
///
/// let limiter = RedisRateLimiter::new("redis://redis.internal")?;
/// let layer = RateLimitLayer::new(limiter);
/// # Ok::<(), tower_api_key::redis::RedisUrlError>(())
/// ```
#[derive(Clone)]
pub struct RedisRateLimiter(Arc<RedisLimiterParts>);

struct RedisLimiterParts {
    link: Arc<Link>,
    on_redis_failure: OnRedisFailure,
    /// Requests that this node has let through.
    local: LocalRateLimiter,
    nodes: Arc<Nodes>,
    heartbeat: Background,
    /// Prefix of the names in Redis.
    names: String,
}

/// Number of nodes.
struct Nodes {
    /// Name of this node.
    name: String,
    /// At least one. Configured, or the number of nodes that have recently sent a heartbeat to Redis.
    count: AtomicU64,
    is_configured: bool,
}

/// Behaviour of a [`RedisRateLimiter`] while Redis does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnRedisFailure {
    /// Each node lets its share through: the limit divided by the number of nodes, at least one request.
    #[default]
    Share,
    /// Every request is let through.
    Allow,
    /// Every request of a key with a limit is answered with 503.
    Deny,
}

/// Builds a [`RedisRateLimiter`].
#[derive(Debug, Clone)]
pub struct RedisRateLimiterBuilder {
    servers: RedisServers,
    timeout: Duration,
    on_redis_failure: OnRedisFailure,
    nodes: Option<u64>,
    namespace: String,
    clock: Arc<dyn Clock>,
}

const TAKE: &str = include_str!("take.lua");
static TAKE_SCRIPT: Script = Script::new(TAKE, || Script::digest_of(TAKE));

const HEARTBEAT: &str = include_str!("heartbeat.lua");
static HEARTBEAT_SCRIPT: Script = Script::new(HEARTBEAT, || Script::digest_of(HEARTBEAT));

/// Interval between two heartbeats.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);
/// Time after its last heartbeat at which a node is no longer counted.
const NODE_LIFETIME: Duration = Duration::from_secs(15);
/// Largest integer up to which Lua counts exactly.
const MAX_LUA_INTEGER: u64 = 1 << 53;

impl RedisRateLimiter {
    /// Creates a limiter on these servers with the default settings. It connects at first use.
    ///
    /// # Errors
    ///
    /// Returns an error if a URL can't be parsed.
    pub fn new(servers: impl Into<RedisServers>) -> Result<Self, RedisUrlError> {
        Self::builder(servers).build()
    }

    /// Creates a builder of a limiter on these servers.
    pub fn builder(servers: impl Into<RedisServers>) -> RedisRateLimiterBuilder {
        RedisRateLimiterBuilder {
            servers: servers.into(),
            timeout: Duration::from_millis(100),
            on_redis_failure: OnRedisFailure::default(),
            nodes: None,
            namespace: String::new(),
            clock: Arc::new(SystemClock),
        }
    }

    /// Returns the state of Redis, for a health check.
    pub fn state(&self) -> RedisState {
        self.0.link.state()
    }

    /// Returns the number of nodes that share the limits while Redis is unavailable, as far as this node knows.
    pub fn nodes(&self) -> u64 {
        self.0.nodes.count.load(Ordering::Relaxed)
    }

    async fn take(&self, key: &KeyId, limits: RateLimits) -> Option<Quota> {
        // Distinguishes integer ids from text ids that look like integers.
        let id = key.as_i64().map_or_else(|| format!("t{key}"), |id| format!("i{id}"));
        let name = format!("{}{}", self.0.names, slot(&id));
        let arguments = |command: &mut Cmd| {
            command.arg(1).arg(&name);
            for period in RatePeriod::ALL {
                match period.limit(&limits) {
                    Some(limit) => command.arg(limit.min(MAX_LUA_INTEGER)),
                    None => command.arg(-1),
                };
            }
        };
        match TAKE_SCRIPT.run(&self.0.link, arguments).await {
            Ok(value) => quota(&value, &limits),
            Err(Fault::Refused(error)) => {
                telemetry::rate_limit_refused_by_redis(&error);
                None
            }
            Err(Fault::Open | Fault::Link) => None,
        }
    }

    fn without_redis(&self, key: &KeyId, limits: RateLimits) -> Result<Quota, StoreError> {
        match self.0.on_redis_failure {
            OnRedisFailure::Share => {
                let nodes = self.nodes();
                let share = |limit: Option<u64>| Some((limit? / nodes).max(limit?.min(1)));
                let shares = RateLimits {
                    per_minute: share(limits.per_minute),
                    per_hour: share(limits.per_hour),
                    per_day: share(limits.per_day),
                };
                self.0.local.count_now(key, shares).ok_or_else(redis_unavailable)
            }
            OnRedisFailure::Allow => Ok(Quota::new(true, [])),
            OnRedisFailure::Deny => Err(redis_unavailable()),
        }
    }

    fn ensure_heartbeat(&self) {
        if !self.0.nodes.is_configured {
            let (link, nodes) = (Arc::clone(&self.0.link), Arc::downgrade(&self.0.nodes));
            let name = format!("{}nodes", self.0.names);
            self.0.heartbeat.ensure(|| send_heartbeats(link, nodes, name));
        }
    }
}

impl RateLimiter for RedisRateLimiter {
    async fn count(&self, key: &KeyId, limits: RateLimits) -> Result<Quota, StoreError> {
        self.ensure_heartbeat();
        let Some(quota) = self.take(key, limits).await else {
            return self.without_redis(key, limits);
        };
        if quota.is_allowed() && self.0.on_redis_failure == OnRedisFailure::Share {
            self.0.local.count_allowed(key, limits);
        }
        Ok(quota)
    }
}

fn redis_unavailable() -> StoreError {
    StoreError::unavailable("the Redis server that counts requests does not respond")
}

/// Parses the result of the script; `None` if it is malformed.
fn quota(value: &Value, limits: &RateLimits) -> Option<Quota> {
    let Value::Array(values) = value else { return None };
    let mut numbers = values.iter().map(|value| match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    });
    let is_allowed = numbers.next()?? == 1;
    let mut windows = Vec::with_capacity(3);
    for period in RatePeriod::ALL {
        if let Some(limit) = period.limit(limits) {
            let (count, left) = (numbers.next()??, numbers.next()??);
            let resets_in = Duration::from_millis(left);
            let remaining = limit.saturating_sub(count);
            windows.push(RateWindow { period, limit, remaining, resets_in });
        }
    }
    Some(Quota::new(is_allowed, windows))
}

/// Sends heartbeats of this node and updates the number of nodes, until the limiter is dropped.
async fn send_heartbeats(link: Arc<Link>, nodes: Weak<Nodes>, name: String) {
    // After data loss, Redis has all nodes again after one round of heartbeats. Until then an earlier count is
    // correct, so the maximum of the last three counts is used.
    let mut latest = [0; 3];
    while let Some(nodes) = nodes.upgrade() {
        let arguments = |command: &mut Cmd| {
            command.arg(1).arg(&name).arg(&nodes.name).arg(NODE_LIFETIME.as_millis() as u64);
        };
        // While Redis is unavailable, the last count is kept.
        if let Ok(Value::Int(count)) = HEARTBEAT_SCRIPT.run(&link, arguments).await {
            latest = [latest[1], latest[2], u64::try_from(count).unwrap_or(1)];
            let count = latest.into_iter().max().unwrap_or(1).max(1);
            nodes.count.store(count, Ordering::Relaxed);
        }
        drop(nodes);
        tokio::time::sleep(HEARTBEAT_EVERY).await;
    }
}

impl RedisRateLimiterBuilder {
    /// Sets the maximum time that a request waits for Redis: 100 ms by default.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Sets the behaviour while Redis does not answer.
    #[must_use]
    pub fn on_redis_failure(self, on_redis_failure: OnRedisFailure) -> Self {
        Self { on_redis_failure, ..self }
    }

    /// Sets the number of nodes that share the limits while Redis is unavailable, at least one. By default nodes are
    /// counted: each node writes its name to Redis every 5 s, and a node that has not written it for 15 s is no
    /// longer counted.
    #[must_use]
    pub fn nodes(self, nodes: u64) -> Self {
        Self { nodes: Some(nodes.max(1)), ..self }
    }

    /// Sets the namespace, which separates counters and nodes from those of other services on the same Redis. All
    /// nodes of a service use the same namespace; the default is none. Counters are named by the ids of keys, and
    /// databases assign ids from 1: without a namespace, the key 2 of one service and the key 2 of another service
    /// share their limits.
    #[must_use]
    pub fn namespace(self, namespace: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), ..self }
    }

    /// Sets the clock, to which the windows of shares are aligned while Redis is unavailable:
    /// [`SystemClock`] by default. Otherwise windows are those of Redis.
    #[must_use]
    pub fn clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    /// Builds the limiter. No runtime is required; it connects at first use.
    ///
    /// # Errors
    ///
    /// Returns an error if a URL can't be parsed.
    pub fn build(self) -> Result<RedisRateLimiter, RedisUrlError> {
        let mut name = [0; 16];
        // Without randomness, all nodes have the same name and count as one, which is also the initial count.
        let _ = getrandom::fill(&mut name);
        Ok(RedisRateLimiter(Arc::new(RedisLimiterParts {
            link: Link::new(Connector::new(self.servers)?, self.timeout),
            on_redis_failure: self.on_redis_failure,
            local: LocalRateLimiter::with_clock(self.clock),
            nodes: Arc::new(Nodes {
                name: hex(&name),
                count: AtomicU64::new(self.nodes.unwrap_or(1)),
                is_configured: self.nodes.is_some(),
            }),
            heartbeat: Background::default(),
            // In hexadecimal, because a namespace may contain braces.
            names: match self.namespace.as_str() {
                "" => "api_key:rate:".to_owned(),
                namespace => format!("api_key:rate:{}:", hex(namespace.as_bytes())),
            },
        })))
    }
}

impl fmt::Debug for RedisRateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisRateLimiter")
            .field("servers", self.0.link.connector())
            .field("state", &self.state())
            .field("nodes", &self.nodes())
            .finish_non_exhaustive()
    }
}
