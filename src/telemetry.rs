//! Log messages and metrics. This module has no public items.
//!
//! Log messages are events of the `tracing` crate. A fault of the service is logged at WARN or ERROR, a denial that is
//! the caller's fault at DEBUG. The messages of this crate and its metrics contain no key and no hash. Lookup ids, which
//! are public, are logged. Dependencies have messages of their own: keep tokio-postgres, which logs the values of
//! statements at DEBUG, at INFO.
//!
//! With the feature `metrics`, the crate counts through the recorder of the `metrics` crate:
//!
//! | metric | type | what it counts |
//! |---|---|---|
//! | `api_key_denials_total` | counter | denied requests |
//! | `api_key_bad_rows_total` | counter | look-ups of a key whose row can't be decoded |
//! | `api_key_previous_secrets_total` | counter | requests with the previous secret of a rotated key |
//! | `api_key_changes_total` | counter | change events of keys and owners, and resets of the feed |
//! | `api_key_feed_complete` | gauge | 1 while the change feed is complete, 0 while changes may be missed |
//! | `api_key_feed_rows` | gauge | rows in the table of changes |
//! | `api_key_replica_hits_total` | counter | look-ups that a replica answered from memory |
//! | `api_key_replica_misses_total` | counter | look-ups that a replica passed on to its store |
//! | `api_key_replica_loaded` | gauge | 1 while the replica has all keys in memory |
//! | `api_key_replica_keys` | gauge | keys in the memory of the replica |
//! | `api_key_replica_bytes` | gauge | approximate size of these keys |
//! | `api_key_replica_last_sync_timestamp_seconds` | gauge | when the replica was last in sync with the change feed |
//! | `api_key_redis_hits_total` | counter | look-ups that Redis answered |
//! | `api_key_redis_misses_total` | counter | look-ups that Redis did not answer |
//! | `api_key_redis_invalid_entries_total` | counter | entries and messages in Redis that are forged, moved or damaged |
//! | `api_key_redis_up` | gauge | 1 while Redis is connected, 0 while it is bypassed |
//! | `api_key_rate_limit_errors_total` | counter | errors of the rate-limit script in Redis |
//! | `api_key_usage_failures_total` | counter | writes of usage that failed and are retried |
//! | `api_key_usage_dropped_total` | counter | usage that is lost, by keys or at the end of a process |
//! | `api_key_usage_of_deleted_keys_total` | counter | usage batches with keys that no longer exist |

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::{error::StoreError, runtime::RecentMap};

/// Times at which messages were last logged, by their subject: each message is logged again only after an interval.
#[derive(Debug)]
struct LoggedAt<K>(Mutex<RecentMap<K, Duration>>);

impl<K: std::hash::Hash + Eq> LoggedAt<K> {
    /// Tracks at most `capacity` subjects. Beyond it, a message may be logged more often.
    fn new(capacity: usize) -> Self {
        Self(Mutex::new(RecentMap::new(capacity)))
    }

    /// Returns whether the message about `subject` is due at the monotonic time `now`, and records that it is logged.
    fn is_due(&self, subject: K, every: Duration, now: Duration) -> bool {
        let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut is_new = false;
        let last = logged.entry(subject, || {
            is_new = true;
            now
        });
        let is_due = is_new || now.saturating_sub(*last) >= every;
        if is_due {
            *last = now;
        }
        is_due
    }
}

/// Logs rows that can't be decoded, each reason at most once a minute per lookup id. It is called for each request with
/// such a key.
#[derive(Debug)]
pub(crate) struct BadRowLog(LoggedAt<(Box<str>, String)>);

const BAD_ROW_LOGGED_EVERY: Duration = Duration::from_secs(60);
const BAD_ROWS_KEPT: usize = 2048;

impl Default for BadRowLog {
    fn default() -> Self {
        Self(LoggedAt::new(BAD_ROWS_KEPT))
    }
}

impl BadRowLog {
    /// Logs that a row under this lookup id could not be decoded. The error names the row, if the store knows it. `now`
    /// is a monotonic time.
    pub(crate) fn log(&self, prefix: &str, error: &StoreError, now: Duration) {
        count("api_key_bad_rows_total");
        if self.0.is_due((prefix.into(), error.to_string()), BAD_ROW_LOGGED_EVERY, now) {
            tracing::error!(key_prefix = prefix, error = %error, "an API key row can't be decoded or checked");
        }
    }
}

/// Logs the use of previous secrets of rotated keys, once a day per key, and counts it.
#[derive(Debug)]
pub(crate) struct PreviousSecretLog(LoggedAt<String>);

const PREVIOUS_SECRET_LOGGED_EVERY: Duration = Duration::from_secs(24 * 3600);
const PREVIOUS_SECRETS_KEPT: usize = 16_384;

impl Default for PreviousSecretLog {
    fn default() -> Self {
        Self(LoggedAt::new(PREVIOUS_SECRETS_KEPT))
    }
}

impl PreviousSecretLog {
    /// Logs that a request presented the previous secret of the key with this id. `now` is a monotonic time.
    pub(crate) fn log(&self, key: String, ends_at: &dyn std::fmt::Display, now: Duration) {
        count("api_key_previous_secrets_total");
        if self.0.is_due(key.clone(), PREVIOUS_SECRET_LOGGED_EVERY, now) {
            tracing::warn!(
                key,
                %ends_at,
                "the previous secret of a rotated API key is still in use: replace it before its grace period ends"
            );
        }
    }
}

/// Whether a message was logged before: the first one is logged at a higher level.
#[derive(Debug, Default)]
pub(crate) struct FirstTime(AtomicBool);

impl FirstTime {
    fn is_now(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }
}

/// Logs that a key with address rules is denied, because the client's address is not known. `remedy` is what to do.
pub(crate) fn address_unknown(remedy: &'static str, warned: &FirstTime) {
    if warned.is_now() {
        tracing::warn!(
            remedy,
            "a key with allowed_ips is denied, because the address of the client is not known"
        );
    }
}

/// Logs that the store lacks a capability that a request needs.
pub(crate) fn unsupported(error: &StoreError, warned: &FirstTime) {
    if warned.is_now() {
        tracing::warn!(error = %error, "the key store does not support what a request needs: the request is answered 500");
    } else {
        tracing::debug!(error = %error, "the key store does not support what a request needs");
    }
}

/// Logs that a budget can't be reserved with this store or these settings. `remedy` is what to do.
pub(crate) fn budget_unsupported(error: &StoreError, remedy: &str, warned: &FirstTime) {
    if warned.is_now() {
        tracing::warn!(error = %error, remedy, "no budget can be reserved: requests are answered 500");
    } else {
        tracing::debug!(error = %error, "no budget can be reserved");
    }
}

/// Logs that a fast hash could not be written beside a slow one. The key remains usable.
#[cfg(feature = "_sql")]
pub(crate) fn upgrade_failed(error: &StoreError) {
    tracing::warn!(error = %error, "the fast hash of an API key could not be stored; its slow hash remains in use");
}

/// Logs that usage could not be written. It stays in the queue.
pub(crate) fn usage_not_written(error: &StoreError, waiting: usize) {
    count("api_key_usage_failures_total");
    tracing::warn!(error = %error, waiting, "the usage of API keys could not be written; retrying");
}

/// Logs that the store does not record usage, which ends the recording.
pub(crate) fn usage_unsupported(error: &StoreError) {
    tracing::warn!(
        error = %error,
        "the key store does not record usage, so no usage is counted: implement KeyStore::record_usage, \
         or build the authenticator with AuthenticatorBuilder::without_usage()"
    );
}

/// Logs that the store did not accept the last usage before the shutdown.
pub(crate) fn usage_lost(keys: usize) {
    count("api_key_usage_dropped_total");
    tracing::error!(
        keys,
        "the last usage of API keys could not be written before the shutdown and is lost"
    );
}

/// Logs that usage of deleted keys is ignored.
#[cfg(feature = "_sql")]
pub(crate) fn usage_of_deleted_keys(keys: usize) {
    count("api_key_usage_of_deleted_keys_total");
    tracing::info!(keys, "usage of deleted API keys is not counted");
}

/// Logs that the row of a key rejects its totals. Its usage is counted in `api_key_usage` and charged.
#[cfg(feature = "_sql")]
pub(crate) fn usage_of_bad_row(key: &serde_json::Value, error: &StoreError) {
    count("api_key_usage_dropped_total");
    tracing::error!(%key, error = %error, "the database rejects the totals of an API key: its usage is counted by day only");
}

/// Logs that a table of keys was adopted, but its keys could not be read.
#[cfg(feature = "_sql")]
pub(crate) fn not_reviewed(error: &StoreError) {
    tracing::warn!(error = %error, "adopted API keys could not be reviewed; call review_keys() of the store");
}

/// Logs that a change feed has ended.
pub(crate) fn feed_ended() {
    tracing::warn!("the API key change feed has ended; restarting it");
}

/// Logs that the feed lost its connection, or could not connect.
#[cfg(feature = "_sql")]
pub(crate) fn feed_disconnected(error: &StoreError) {
    tracing::warn!(error = %error, "the API key change feed is disconnected; reconnecting");
}

/// Logs whether notifications arrive.
#[cfg(feature = "postgres")]
pub(crate) fn feed_notified(is_notified: bool) {
    if is_notified {
        tracing::info!("notifications of API key changes arrive again");
    } else {
        tracing::warn!(
            "notifications of API key changes don't arrive, possibly because of a connection pooler; polling only"
        );
    }
}

/// Logs the parts of the schema that were missing, disabled or outdated, and were created.
#[cfg(feature = "_sql")]
pub(crate) fn schema_made(missing: &[String]) {
    tracing::info!(made = missing.join("; "), "the API key schema was brought up to date");
}

/// Logs that the schema is older than this crate. A service that calls migrate() next needs no warning.
#[cfg(feature = "_sql")]
pub(crate) fn schema_is_older() {
    tracing::info!(
        "the API key schema was made by an older version of this crate; migrate() of the store brings it up to date"
    );
}

/// Logs that the schema is newer than this crate.
#[cfg(feature = "_sql")]
pub(crate) fn schema_is_newer() {
    tracing::warn!(
        "the API key schema was made by a newer version of this crate; deploy that version to every node"
    );
}

/// Logs that old rows could not be deleted.
#[cfg(feature = "_sql")]
pub(crate) fn not_pruned(error: &StoreError) {
    tracing::warn!(error = %error, "old rows of api_key_changes, api_key_usage_writers or api_key_leases can't be deleted");
}

/// Counts a look-up that a replica answered, or passed on.
pub(crate) fn replica_hit(hit: bool) {
    count(if hit { "api_key_replica_hits_total" } else { "api_key_replica_misses_total" });
}

/// Updates the metrics of a replica.
pub(crate) fn replica_size(is_loaded: bool, keys: usize, bytes: usize) {
    gauge("api_key_replica_loaded", if is_loaded { 1.0 } else { 0.0 });
    gauge("api_key_replica_keys", keys as f64);
    gauge("api_key_replica_bytes", bytes as f64);
}

/// Updates the time of the last sync of a replica.
pub(crate) fn replica_synced(at: SystemTime) {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    gauge("api_key_replica_last_sync_timestamp_seconds", since.as_secs_f64());
}

/// Logs that a replica has loaded all keys.
pub(crate) fn replica_loaded(keys: usize, bytes: usize, took: Duration) {
    let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    tracing::info!(keys, bytes, took_ms, "all API keys are loaded into memory");
}

/// Logs the first of several reads of a replica that failed.
pub(crate) fn replica_read_failed(error: &StoreError) {
    tracing::warn!(
        error = %error,
        "API keys can't be loaded into memory: look-ups are passed on to the store until a retry succeeds"
    );
}

/// Logs a row that a replica can't decode.
pub(crate) fn replica_bad_row(error: &StoreError) {
    tracing::error!(error = %error, "an API key row can't be decoded: requests with this key fail");
}

/// Logs that a replica is turned off.
pub(crate) fn replica_is_off(reason: &str) {
    tracing::warn!(
        reason,
        "the replica of the API keys is turned off: all look-ups are passed on to the store \
         (ReplicaBuilder::max_keys)"
    );
}

/// Counts a hit or a miss in Redis.
#[cfg(feature = "redis")]
pub(crate) fn redis_hit(hit: bool) {
    count(if hit { "api_key_redis_hits_total" } else { "api_key_redis_misses_total" });
}

/// Logs that the circuit breaker of Redis has opened.
#[cfg(feature = "redis")]
pub(crate) fn redis_is_down() {
    gauge("api_key_redis_up", 0.0);
    tracing::warn!("Redis fails and is bypassed; it is probed in the background");
}

/// Logs that Redis is connected.
#[cfg(feature = "redis")]
pub(crate) fn redis_is_up() {
    gauge("api_key_redis_up", 1.0);
    tracing::info!("Redis is connected");
}

/// Logs that a probe has failed. The first failure of a series is a warning.
#[cfg(feature = "redis")]
pub(crate) fn redis_is_unreachable(reason: &str, is_first: bool) {
    gauge("api_key_redis_up", 0.0);
    if is_first {
        tracing::warn!(reason, "Redis can't be reached and is bypassed");
    } else {
        tracing::debug!(reason, "Redis can't be reached");
    }
}

/// Logs that Redis returned an error for the script that counts requests.
#[cfg(feature = "redis")]
pub(crate) fn rate_limit_refused_by_redis(error: &dyn std::fmt::Display) {
    count("api_key_rate_limit_errors_total");
    tracing::warn!(%error, "Redis can't count requests; this node enforces rate limits locally");
}

/// Logs that a value in Redis, or a message, was not written by a node with the secret.
#[cfg(feature = "redis")]
pub(crate) fn redis_entry_invalid(name: &str) {
    count("api_key_redis_invalid_entries_total");
    tracing::warn!(name, "an entry in Redis is forged, moved or damaged; using the store");
}

/// Logs that a tombstone could not be written to Redis yet.
#[cfg(feature = "redis")]
pub(crate) fn tombstone_not_written(reason: &str) {
    tracing::debug!(reason, "a tombstone could not be written to Redis; retrying");
}

/// Logs that the store has no secret for Redis, although it did not report this when the cache was built.
#[cfg(feature = "redis")]
pub(crate) fn no_cache_secret() {
    tracing::error!("the key store has no cache secret; Redis is not used");
}

/// Logs that the secret could not be read from the store.
#[cfg(feature = "redis")]
pub(crate) fn cache_secret_unknown(error: &StoreError) {
    tracing::debug!(error = %error, "the cache secret can't be read yet; Redis is not used");
}

/// Logs that a table of keys was adopted.
#[cfg(feature = "_sql")]
pub(crate) fn adopted_keys(failing: u64, changed: u64) {
    if failing + changed > 0 {
        tracing::warn!(
            failing,
            changed,
            "some adopted API keys fail or change their meaning: review_keys() of the store lists them"
        );
    }
}

/// Increments a counter of the `metrics` crate, if the feature is enabled.
pub(crate) fn count(name: &'static str) {
    #[cfg(feature = "metrics")]
    metrics::counter!(name).increment(1);
    #[cfg(not(feature = "metrics"))]
    let _ = name;
}

pub(crate) fn gauge(name: &'static str, value: f64) {
    #[cfg(feature = "metrics")]
    metrics::gauge!(name).set(value);
    #[cfg(not(feature = "metrics"))]
    let _ = (name, value);
}
