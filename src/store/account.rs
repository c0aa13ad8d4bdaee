//! Data that a node and its store exchange beside look-ups: usage, budget leases, the cache secret.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use chrono::{DateTime, NaiveDate, Utc};
use zeroize::Zeroizing;

#[cfg(feature = "_sql")]
use crate::error::StoreError;
use crate::{
    key::{HashFingerprint, MacKey, hmac_sha256},
    record::KeyId,
    runtime::hex,
};

/// A batch of usage of one writer. A store counts each batch once.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct UsageBatch {
    /// Identifies the writer for its lifetime.
    pub writer: String,
    /// Sequence number, one higher for each batch of that writer. A store ignores a batch that it has already counted.
    pub sequence: u64,
    /// When the usage was gathered, by the clock of the writer.
    pub gathered_at: SystemTime,
    /// When the batch was last sent, by the same clock. A store computes from the time since `gathered_at` which day of
    /// its own calendar it charges.
    pub sent_at: SystemTime,
    /// Usage by key: at most one entry per key.
    pub entries: Vec<KeyUsage>,
}

impl UsageBatch {
    /// Creates an empty batch that is gathered and sent at `now`, by the clock of the writer.
    pub fn new(writer: impl Into<String>, sequence: u64, now: SystemTime) -> Self {
        let writer = writer.into();
        Self { writer, sequence, gathered_at: now, sent_at: now, entries: Vec::new() }
    }

    /// Returns the entries whose key id is an integer, ordered by id, in the form that the SQL stores read.
    #[cfg(feature = "_sql")]
    pub(crate) fn encoded(&self) -> Vec<serde_json::Value> {
        let fits = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let mut entries: Vec<_> =
            self.entries.iter().filter_map(|usage| Some((usage.key.as_i64()?, usage))).collect();
        entries.sort_by_key(|(id, _)| *id);
        let encode = |(id, usage): (i64, &KeyUsage)| {
            serde_json::json!({
                "id": id,
                "requests": fits(usage.requests),
                "tokens": fits(usage.tokens),
                "cost": usage.cost_micro_cents.max(0),
                "settled": usage.settled_micro_cents.max(0),
                "is_last_used": usage.last_used_at.is_some(),
                "is_previous_used": usage.previous_last_used_at.is_some(),
            })
        };
        entries.into_iter().map(encode).collect()
    }

    /// Returns the time of the batch in UTC. Columns with and without a time zone read it as the same time.
    #[cfg(feature = "_sql")]
    pub(crate) fn time(&self) -> String {
        DateTime::<Utc>::from(self.gathered_at).format("%Y-%m-%d %H:%M:%S%.3f").to_string()
    }

    /// Returns the day on which the usage was gathered, by the clock of a store at which it is `now`.
    pub(crate) fn day(&self, now: SystemTime) -> NaiveDate {
        DateTime::<Utc>::from(now.checked_sub(self.age()).unwrap_or(now)).date_naive()
    }

    /// Returns the time between gathering and sending.
    pub(crate) fn age(&self) -> Duration {
        self.sent_at.duration_since(self.gathered_at).unwrap_or_default()
    }
}

/// Usage of one key.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct KeyUsage {
    /// The key.
    pub key: KeyId,
    /// Number of requests.
    pub requests: u64,
    /// Number of tokens.
    pub tokens: u64,
    /// Cost in micro-cents.
    pub cost_micro_cents: i64,
    /// The part of the cost that was settled from the writer's lease, which shrinks by this amount.
    pub settled_micro_cents: i64,
    /// The part of the requests that presented the previous secret of a rotated key.
    pub previous_requests: u64,
    /// Time of the last use of the current secret; `None` while it is not due to be written.
    pub last_used_at: Option<SystemTime>,
    /// Time of the last use of the previous secret; `None` while it is not due to be written.
    pub previous_last_used_at: Option<SystemTime>,
}

impl KeyUsage {
    /// Creates an entry for `key` without usage.
    pub fn new(key: KeyId) -> Self {
        Self {
            key,
            requests: 0,
            tokens: 0,
            cost_micro_cents: 0,
            settled_micro_cents: 0,
            previous_requests: 0,
            last_used_at: None,
            previous_last_used_at: None,
        }
    }
}

/// A request for a lease on a key's budget.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeaseRequest {
    /// The key.
    pub key: KeyId,
    /// Identifies the node that requests the lease, as [`UsageBatch::writer`] does.
    pub holder: String,
    /// Sequence number of the holder's requests, from 1. A store ignores a request that arrives after a newer one for
    /// the same key.
    pub sequence: u64,
    /// Amount that the node holds after the request, in micro-cents. It replaces the amount held before; 0 returns the
    /// lease.
    pub amount_micro_cents: i64,
    /// Smallest useful amount, in micro-cents. If less is left, the node keeps what it holds.
    pub needed_micro_cents: i64,
    /// Time after which the lease expires, by the store's clock: 30 s by default.
    pub lifetime: Duration,
}

impl LeaseRequest {
    /// Creates a request of `holder` for `amount_micro_cents` of the budget of `key`.
    pub fn new(
        key: KeyId,
        holder: impl Into<String>,
        sequence: u64,
        amount_micro_cents: i64,
    ) -> Self {
        let (holder, lifetime) = (holder.into(), Duration::from_secs(30));
        Self { key, holder, sequence, amount_micro_cents, needed_micro_cents: 0, lifetime }
    }
}

/// A part of a key's budget that its holder may spend without a further request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lease {
    /// Amount that was granted, in micro-cents. It may be less than was requested, and 0.
    pub amount_micro_cents: i64,
    /// Time of the database at which the unsettled part is returned to the budget.
    pub expires_at: SystemTime,
    /// When the period of the budget ends; `None` for [`BudgetPeriod::Total`](crate::record::BudgetPeriod::Total).
    pub resets_at: Option<SystemTime>,
}

impl Lease {
    /// Creates a lease of `amount_micro_cents` until `expires_at`.
    pub fn new(amount_micro_cents: i64, expires_at: SystemTime) -> Self {
        Self { amount_micro_cents, expires_at, resets_at: None }
    }
}

#[cfg(feature = "_sql")]
impl Lease {
    /// Returns the lease for a key that does not exist.
    pub(crate) fn none(now: SystemTime) -> Self {
        Self::new(0, now)
    }

    /// Decodes an array of the amount and two times in milliseconds.
    #[cfg(feature = "postgres")]
    pub(crate) fn from_row(row: Option<&str>) -> Result<Self, StoreError> {
        let bad = || StoreError::bad_row("a lease can't be decoded");
        let (amount, expires, resets): (i64, u64, Option<u64>) =
            row.and_then(|row| serde_json::from_str(row).ok()).ok_or_else(bad)?;
        let time = |millis| SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
        Ok(Self { resets_at: resets.map(time), ..Self::new(amount, time(expires)) })
    }
}

/// A secret that authenticates shared cache entries. `Debug` shows only its id.
#[derive(Clone)]
pub struct CacheSecret(Arc<SecretParts>);

#[derive(Clone)]
struct SecretParts {
    id: u64,
    bytes: Zeroizing<[u8; 32]>,
    mac: MacKey,
    previous: Option<CacheSecret>,
    /// A part of the names of entries, the same for every secret of one scope; empty without a scope.
    tag: Box<str>,
}

impl CacheSecret {
    /// Creates a secret of `bytes`. Entries refer to it by `id`.
    pub fn new(id: u64, bytes: [u8; 32]) -> Self {
        Self::from_parts(id, bytes, None, Box::default())
    }

    fn from_parts(id: u64, bytes: [u8; 32], previous: Option<Self>, tag: Box<str>) -> Self {
        let (bytes, mac) = (Zeroizing::new(bytes), MacKey::new(&bytes));
        Self(Arc::new(SecretParts { id, bytes, mac, previous, tag }))
    }

    /// Adds the previous secret, whose entries are still valid.
    #[must_use]
    pub fn with_previous(self, previous: CacheSecret) -> Self {
        let previous = SecretParts { previous: None, ..Arc::unwrap_or_clone(previous.0) };
        let previous = Some(Self(Arc::new(previous)));
        Self(Arc::new(SecretParts { previous, ..Arc::unwrap_or_clone(self.0) }))
    }

    /// Binds the secret and the previous one to the database that the keys come from. The names of entries carry a hash
    /// of `scope`, and the MAC key is derived from the secret and `scope`. A copy of a database has the same secret,
    /// and must neither read nor replace the entries of the original. Scopes accumulate.
    #[must_use]
    pub fn with_scope(self, scope: &str) -> Self {
        let SecretParts { id, mac, previous, tag, .. } = &*self.0;
        let length = scope.len().to_string();
        let label = [b"scope:", length.as_bytes(), b":", scope.as_bytes()].concat();
        let name = hmac_sha256(&[0; 32], &[&label, tag.as_bytes()].concat());
        Self::from_parts(
            *id,
            mac.mac_of(&[&label]),
            previous.clone().map(|previous| previous.with_scope(scope)),
            format!("{}:", hex(&name[..8])).into(),
        )
    }

    /// Returns the part of the names that depends on the scope, with the separator after it.
    #[cfg(feature = "redis")]
    pub(crate) fn tag(&self) -> &str {
        &self.0.tag
    }

    /// Returns the id by which entries refer to the secret.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Returns the previous secret.
    pub fn previous(&self) -> Option<&CacheSecret> {
        self.0.previous.as_ref()
    }

    /// Returns the bytes of the secret.
    pub fn expose_secret(&self) -> &[u8; 32] {
        &self.0.bytes
    }

    /// Returns the MAC of a message that consists of these parts.
    #[cfg(feature = "redis")]
    pub(crate) fn mac_of(&self, message: &[&[u8]]) -> [u8; 32] {
        self.0.mac.mac_of(message)
    }

    /// Returns the MAC that identifies a stored hash in a shared cache, where not even its fingerprint is stored.
    pub(crate) fn mac_of_hash(&self, fingerprint: &HashFingerprint) -> [u8; 32] {
        self.0.mac.mac_of(&[b"hash:", &fingerprint.0])
    }

    /// Decodes the rows of `api_key_cache_secrets`, newest first: id, secret in hexadecimal, and scope.
    #[cfg(feature = "_sql")]
    pub(crate) fn from_rows<'a>(
        rows: impl Iterator<Item = &'a str>,
    ) -> Result<Option<Self>, StoreError> {
        let secret = |row: &str| {
            let (id, hex, scope) = serde_json::from_str::<(u64, &str, String)>(row).ok()?;
            Some(Self::new(id, crate::runtime::unhex(hex)?).with_scope(&scope))
        };
        let secrets: Option<Vec<_>> = rows.map(secret).collect();
        let bad = || StoreError::bad_row("a row of api_key_cache_secrets can't be decoded");
        let mut secrets = secrets.ok_or_else(bad)?.into_iter();
        let Some(newest) = secrets.next() else { return Ok(None) };
        Ok(Some(match secrets.next() {
            Some(previous) => newest.with_previous(previous),
            None => newest,
        }))
    }
}

impl fmt::Debug for CacheSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheSecret").field("id", &self.0.id).finish_non_exhaustive()
    }
}
