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
    runtime::{Background, hex},
    telemetry,
};

/// Counts the requests of a fleet, in Redis: one script and one round trip a request. At most as many as the
/// limit get through in a window by Redis's own clock, however many nodes there are. Clones count together.
///
/// While Redis does not answer, [`OnRedisFailure`] decides: by default each node keeps its share of the limits by
/// itself. It counts all that it lets through, so that a node which has used up its share of a window lets nothing more
/// through when Redis goes away in the middle of it.
///
/// # At most
///
/// With a limit of L and N nodes, at most
///
/// ```text
/// (1 + r) × L + (N + k) × max(⌊L / N⌋, 1)
/// ```
///
/// requests get through in a window in which Redis loses its memory r times (a restart without persistence, an eviction,
/// a failover to a replica that lacks the last writes) and k nodes are started: L for each memory of Redis, and one
/// share for each node and for each that replaces one. Without either it is 2 × L + N at most if Redis is away for a
/// part of the window, and L if it is not. With [`OnRedisFailure::Deny`] it is (1 + r) × L.
///
/// N is what [`nodes`](RedisRateLimiterBuilder::nodes) sets. Without that, nodes count each other, and a node that starts
/// while Redis is away, or in the last 5 s before, counts itself as alone: its share is L. Set it where nodes are
/// started by the same incident that takes Redis away. The windows of shares are those of the node's own clock.
///
/// Services that share a Redis need a [`namespace`](RedisRateLimiterBuilder::namespace) each.
///
/// ```
/// use tower_api_key::{RateLimitLayer, RedisRateLimiter};
///
/// let limiter = RedisRateLimiter::new("redis://redis.internal")?;
/// let layer = RateLimitLayer::new(limiter);
/// # Ok::<(), tower_api_key::RedisUrlError>(())
/// ```
#[derive(Clone)]
pub struct RedisRateLimiter(Arc<Inner>);

struct Inner {
    link: Arc<Link>,
    on_redis_failure: OnRedisFailure,
    /// What this node has let through.
    local: LocalRateLimiter,
    nodes: Arc<Nodes>,
    heartbeat: Background,
    /// What the names in Redis begin with.
    names: String,
}

/// How many nodes there are.
struct Nodes {
    /// Names this one.
    name: String,
    /// At least one. As configured, or as many as Redis has lately heard of.
    count: AtomicU64,
    is_configured: bool,
}

/// What a [`RedisRateLimiter`] does while Redis does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnRedisFailure {
    /// Each node lets through its share: the limit over the number of nodes, at least one request.
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
}

const TAKE: &str = include_str!("take.lua");
static TAKE_SCRIPT: Script = Script::new(TAKE, || Script::digest_of(TAKE));

const HEARTBEAT: &str = include_str!("heartbeat.lua");
static HEARTBEAT_SCRIPT: Script = Script::new(HEARTBEAT, || Script::digest_of(HEARTBEAT));

const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);
/// A node that was not heard of for so long is gone.
const NODE_LIFETIME: Duration = Duration::from_secs(15);
/// What Lua counts exactly.
const MOST: u64 = 1 << 53;

impl RedisRateLimiter {
    /// Counts on these servers, with the default settings. Connects at first use.
    ///
    /// # Errors
    ///
    /// If a URL can't be read.
    pub fn new(servers: impl Into<RedisServers>) -> Result<Self, RedisUrlError> {
        Self::builder(servers).build()
    }

    /// Settings of your own.
    pub fn builder(servers: impl Into<RedisServers>) -> RedisRateLimiterBuilder {
        RedisRateLimiterBuilder {
            servers: servers.into(),
            timeout: Duration::from_millis(100),
            on_redis_failure: OnRedisFailure::default(),
            nodes: None,
            namespace: String::new(),
        }
    }

    /// How Redis stands, for a health check.
    pub fn state(&self) -> RedisState {
        self.0.link.state()
    }

    /// How many nodes share the limits while Redis is away, as far as this one knows.
    pub fn nodes(&self) -> u64 {
        self.0.nodes.count.load(Ordering::Relaxed)
    }

    async fn take(&self, key: &KeyId, limits: RateLimits) -> Option<Quota> {
        // A text id can look like an integer.
        let id = key.as_i64().map_or_else(|| format!("t{key}"), |id| format!("i{id}"));
        let name = format!("{}{}", self.0.names, slot(&id));
        let arguments = |command: &mut Cmd| {
            command.arg(1).arg(&name);
            for period in RatePeriod::ALL {
                match period.limit(&limits) {
                    Some(limit) => command.arg(limit.min(MOST)),
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
                self.0.local.count_now(key, shares).ok_or_else(away)
            }
            OnRedisFailure::Allow => Ok(Quota::new(true, [])),
            OnRedisFailure::Deny => Err(away()),
        }
    }

    fn ensure_heartbeat(&self) {
        if !self.0.nodes.is_configured {
            let (link, nodes) = (Arc::clone(&self.0.link), Arc::downgrade(&self.0.nodes));
            let name = format!("{}nodes", self.0.names);
            self.0.heartbeat.ensure(|| beat(link, nodes, name));
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
            self.0.local.note(key, limits);
        }
        Ok(quota)
    }
}

fn away() -> StoreError {
    StoreError::unavailable("Redis, which counts the requests, does not answer")
}

/// Reads what the script has returned; `None` if it is nothing of the kind.
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

/// Counts this node in, and the others, until the limiter is dropped.
async fn beat(link: Arc<Link>, nodes: Weak<Nodes>, name: String) {
    // A Redis that has lost its memory has all nodes again after one round of heartbeats. Until then an older answer is
    // the right one.
    let mut latest = [0; 3];
    while let Some(nodes) = nodes.upgrade() {
        let arguments = |command: &mut Cmd| {
            command.arg(1).arg(&name).arg(&nodes.name).arg(NODE_LIFETIME.as_millis() as u64);
        };
        // While Redis is away, the count stays what it was.
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
    /// The longest that a request waits for Redis: 100 ms by default.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// What happens while Redis does not answer.
    #[must_use]
    pub fn on_redis_failure(self, on_redis_failure: OnRedisFailure) -> Self {
        Self { on_redis_failure, ..self }
    }

    /// How many nodes share the limits while Redis is away, at least one. By default they are counted: each one
    /// writes its name to Redis every 5 s, and one that has not for 15 s no longer counts.
    #[must_use]
    pub fn nodes(self, nodes: u64) -> Self {
        Self { nodes: Some(nodes.max(1)), ..self }
    }

    /// Keeps counters and nodes apart from those of other services on the same Redis; all nodes of a service have the same
    /// namespace. None by default. Counters go by the ids of keys, and databases count those from 1: without a namespace,
    /// the key 2 of one service and the key 2 of another share their limits.
    #[must_use]
    pub fn namespace(self, namespace: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), ..self }
    }

    /// Builds the limiter. Needs no runtime; connects at first use.
    ///
    /// # Errors
    ///
    /// If a URL can't be read.
    pub fn build(self) -> Result<RedisRateLimiter, RedisUrlError> {
        let mut name = [0; 16];
        // Without randomness nodes count as one, which is where they begin.
        let _ = getrandom::fill(&mut name);
        Ok(RedisRateLimiter(Arc::new(Inner {
            link: Link::new(Connector::new(self.servers)?, self.timeout),
            on_redis_failure: self.on_redis_failure,
            local: LocalRateLimiter::new(),
            nodes: Arc::new(Nodes {
                name: hex(&name),
                count: AtomicU64::new(self.nodes.unwrap_or(1)),
                is_configured: self.nodes.is_some(),
            }),
            heartbeat: Background::default(),
            // In hexadecimal, because a namespace may have braces in it.
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
