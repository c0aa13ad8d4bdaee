//! What the crate says in logs. Nothing here ever gets a key, a hash or a credential.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::{error::StoreError, runtime::RecentMap};

/// Logs rows that can't be decoded, each reason at most once a minute for a lookup id. Each request with
/// such a key comes here.
#[derive(Debug)]
pub(crate) struct BadRowLog(Mutex<RecentMap<(Box<str>, String), Duration>>);

const BAD_ROW_LOGGED_EVERY: Duration = Duration::from_secs(60);
/// Number of bad rows past which one is logged more often.
const BAD_ROWS_KEPT: usize = 2048;

impl Default for BadRowLog {
    fn default() -> Self {
        Self(Mutex::new(RecentMap::new(BAD_ROWS_KEPT)))
    }
}

impl BadRowLog {
    /// A row under this lookup prefix could not be decoded; the error says which, where the store knows.
    /// `now` is a monotonic time.
    pub(crate) fn log(&self, prefix: &str, error: &StoreError, now: Duration) {
        count("api_key_bad_rows_total");
        let reason = error.to_string();
        {
            let mut logged = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let mut is_new = false;
            let last = logged.entry((prefix.into(), reason), || {
                is_new = true;
                now
            });
            if !is_new && now.saturating_sub(*last) < BAD_ROW_LOGGED_EVERY {
                return;
            }
            *last = now;
        }
        tracing::error!(key_prefix = prefix, error = %error, "an API key row can't be used");
    }
}

/// Whether something has been logged: the first time is loud.
#[derive(Debug, Default)]
pub(crate) struct FirstTime(AtomicBool);

impl FirstTime {
    fn is_now(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }
}

/// A key with address rules is denied, because the address of its caller is not known; `remedy` says what to do.
pub(crate) fn address_unknown(remedy: &'static str, warned: &FirstTime) {
    if warned.is_now() {
        tracing::warn!(
            remedy,
            "a key with allowed_ips is denied, because the address of the client is not known"
        );
    }
}

/// The store lacks a capability that a request needs.
pub(crate) fn unsupported(error: &StoreError, warned: &FirstTime) {
    if warned.is_now() {
        tracing::warn!(error = %error, "the key store lacks what a request needs: it is answered 500");
    } else {
        tracing::debug!(error = %error, "the key store lacks what a request needs");
    }
}

/// A budget can't be reserved with this store or these settings; `remedy` is what to do.
pub(crate) fn budget_unsupported(error: &StoreError, remedy: &str, warned: &FirstTime) {
    if warned.is_now() {
        tracing::warn!(error = %error, remedy, "no budget can be reserved: requests are answered 500");
    } else {
        tracing::debug!(error = %error, "no budget can be reserved");
    }
}

/// A fast hash could not be written beside a slow one; the key goes on working.
#[cfg(feature = "_sql")]
pub(crate) fn upgrade_failed(error: &StoreError) {
    tracing::warn!(error = %error, "the fast hash of an API key could not be stored");
}

/// Usage could not be written now; it is kept.
pub(crate) fn usage_not_written(error: &StoreError, waiting: usize) {
    count("api_key_usage_failures_total");
    tracing::warn!(error = %error, waiting, "the usage of API keys could not be written yet");
}

/// The store does not record usage, which ends the recording.
pub(crate) fn usage_unsupported(error: &StoreError) {
    tracing::warn!(
        error = %error,
        "the key store does not record usage, so that none is counted: implement KeyStore::record_usage, \
         or build the authenticator with AuthenticatorBuilder::without_usage()"
    );
}

/// The store did not take the last usage before the end.
pub(crate) fn usage_lost(keys: usize) {
    count("api_key_usage_dropped_total");
    tracing::error!(keys, "the last usage of API keys could not be written before the end");
}

/// Usage of keys that are no longer there counts for nothing.
#[cfg(feature = "_sql")]
pub(crate) fn usage_of_deleted_keys(keys: usize) {
    count("api_key_usage_of_deleted_keys_total");
    tracing::info!(keys, "usage of API keys that are no longer there is not counted");
}

/// The usage of one key can't be written, and is given up.
#[cfg(feature = "_sql")]
pub(crate) fn usage_of_bad_row(key: &serde_json::Value, error: &StoreError) {
    count("api_key_usage_dropped_total");
    tracing::error!(%key, error = %error, "the usage of an API key can't be written: it is lost");
}

/// A table of keys was adopted, but its keys could not be read.
#[cfg(feature = "_sql")]
pub(crate) fn not_reviewed(error: &StoreError) {
    tracing::warn!(error = %error, "adopted API keys could not be reviewed");
}

/// A feed of changes has ended.
pub(crate) fn feed_ended() {
    tracing::warn!("the feed of API key changes has ended; it is listened to again");
}

/// The feed lost its connection, or could not get one.
#[cfg(feature = "_sql")]
pub(crate) fn feed_broken(error: &StoreError) {
    tracing::warn!(error = %error, "the feed of API key changes is disconnected; reconnecting");
}

/// Whether notifications arrive.
#[cfg(feature = "postgres")]
pub(crate) fn feed_notified(is_notified: bool) {
    if is_notified {
        tracing::info!("notifications of API key changes arrive again");
    } else {
        tracing::warn!("notifications of API key changes don't arrive (a pooler?): polling alone");
    }
}

/// Parts of the schema were missing, disabled or outdated, and were made.
#[cfg(feature = "_sql")]
pub(crate) fn schema_made(missing: &[String]) {
    tracing::info!(made = missing.join("; "), "the schema of API keys was brought up to date");
}

/// Rows that are not needed any more could not be deleted.
#[cfg(feature = "_sql")]
pub(crate) fn not_pruned(error: &StoreError) {
    tracing::warn!(error = %error, "old rows of changes, writers or leases can't be deleted");
}

/// Redis answered, or not, in place of the store.
#[cfg(feature = "redis")]
pub(crate) fn redis_hit(hit: bool) {
    count(if hit { "api_key_redis_hits_total" } else { "api_key_redis_misses_total" });
}

/// The breaker on Redis has opened.
#[cfg(feature = "redis")]
pub(crate) fn redis_is_down() {
    gauge("api_key_redis_up", 0.0);
    tracing::warn!("Redis fails: the store below answers, and Redis is probed in the background");
}

/// There is a connection to Redis.
#[cfg(feature = "redis")]
pub(crate) fn redis_is_up() {
    gauge("api_key_redis_up", 1.0);
    tracing::info!("Redis is there");
}

/// A probe has failed. The first of a row is loud.
#[cfg(feature = "redis")]
pub(crate) fn redis_is_out_of_reach(reason: &str, is_news: bool) {
    gauge("api_key_redis_up", 0.0);
    if is_news {
        tracing::warn!(reason, "Redis can't be reached: the store below answers");
    } else {
        tracing::debug!(reason, "Redis can't be reached");
    }
}

/// Redis answered the script that counts requests with an error.
#[cfg(feature = "redis")]
pub(crate) fn rate_limit_refused_by_redis(error: &dyn std::fmt::Display) {
    count("api_key_rate_limit_errors_total");
    tracing::warn!(%error, "Redis can't count requests: this node keeps rate limits by itself");
}

/// A value in Redis, or a message, is not what a node of ours has written.
#[cfg(feature = "redis")]
pub(crate) fn redis_entry_not_believed(name: &str) {
    count("api_key_redis_entries_not_believed_total");
    tracing::warn!(name, "an entry in Redis is forged, moved or damaged; the store is asked");
}

/// A change could not be carried to Redis yet.
#[cfg(feature = "redis")]
pub(crate) fn not_deleted_in_redis(reason: &str) {
    tracing::debug!(reason, "a delete in Redis is tried again");
}

/// The store has no secret for Redis, though it had not said so at once.
#[cfg(feature = "redis")]
pub(crate) fn no_cache_secret() {
    tracing::error!("the key store has no cache secret: Redis is not used");
}

/// The store could not be asked for the secret.
#[cfg(feature = "redis")]
pub(crate) fn cache_secret_unknown(error: &StoreError) {
    tracing::debug!(error = %error, "the cache secret can't be read yet; Redis is not used");
}

/// A table of keys was adopted.
#[cfg(feature = "_sql")]
pub(crate) fn adopted_keys(failing: u64, changed: u64) {
    if failing + changed > 0 {
        tracing::warn!(failing, changed, "API keys were adopted that fail or change their meaning");
    }
}

/// Counts one in the recorder of the `metrics` crate, if the feature is on.
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
