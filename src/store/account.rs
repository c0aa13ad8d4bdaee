//! What passes between a node and its store beside questions: usage, budget leases, the cache secret.

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
    key::{HashFingerprint, hmac_sha256},
    record::KeyId,
    runtime::hex,
};

/// Usage that one writer gathered, to be counted once.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct UsageBatch {
    /// Names the writer, for as long as it lives.
    pub writer: String,
    /// Rises by one with each batch of that writer; a store that has seen it ignores the batch.
    pub sequence: u64,
    /// When the usage was gathered, by the clock of the writer.
    pub gathered_at: SystemTime,
    /// When the batch was sent, the last time that it was, by the same clock. How long that was after it was
    /// gathered says to which day of its own a store has to charge it.
    pub sent_at: SystemTime,
    /// At most one entry a key.
    pub entries: Vec<KeyUsage>,
}

impl UsageBatch {
    /// An empty batch.
    pub fn new(writer: impl Into<String>, sequence: u64) -> Self {
        let now = SystemTime::now();
        let writer = writer.into();
        Self { writer, sequence, gathered_at: now, sent_at: now, entries: Vec::new() }
    }

    /// The entries of keys with an integer for an id, in the order of their ids, as the SQL stores read them.
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
            })
        };
        entries.into_iter().map(encode).collect()
    }

    /// In UTC; with a zone or without one, columns take it for the same.
    #[cfg(feature = "_sql")]
    pub(crate) fn time(&self) -> String {
        DateTime::<Utc>::from(self.gathered_at).format("%Y-%m-%d %H:%M:%S%.3f").to_string()
    }

    /// The day on which it was gathered, by the clock of a store for which it is `now`.
    pub(crate) fn day(&self, now: SystemTime) -> NaiveDate {
        DateTime::<Utc>::from(now.checked_sub(self.age()).unwrap_or(now)).date_naive()
    }

    /// How long ago it was gathered.
    pub(crate) fn age(&self) -> Duration {
        self.sent_at.duration_since(self.gathered_at).unwrap_or_default()
    }
}

/// What was used on one key.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct KeyUsage {
    /// The key.
    pub key: KeyId,
    /// Requests.
    pub requests: u64,
    /// Tokens.
    pub tokens: u64,
    /// Cost in micro-cents.
    pub cost_micro_cents: i64,
    /// How much of the cost was settled from the writer's lease, which shrinks by it.
    pub settled_micro_cents: i64,
    /// The last use, where it is due to be written.
    pub last_used_at: Option<SystemTime>,
}

impl KeyUsage {
    /// No usage of `key` yet.
    pub fn new(key: KeyId) -> Self {
        Self {
            key,
            requests: 0,
            tokens: 0,
            cost_micro_cents: 0,
            settled_micro_cents: 0,
            last_used_at: None,
        }
    }
}

/// Asks for a slice of a key's budget.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LeaseRequest {
    /// The key.
    pub key: KeyId,
    /// Names the node that asks, as [`UsageBatch::writer`] does.
    pub holder: String,
    /// Rises with each ask of that holder, from 1. One that a store comes to late, after a newer one for the same
    /// key, changes nothing.
    pub sequence: u64,
    /// How much the node wants to hold from now on, in micro-cents, in place of what it holds; 0 hands the slice
    /// back.
    pub amount_micro_cents: i64,
    /// With less than this it can't do anything: if there is less left, it keeps what it holds.
    pub needed_micro_cents: i64,
    /// After this, by the store's clock, the slice goes back by itself: 30 s by default.
    pub lifetime: Duration,
}

impl LeaseRequest {
    /// Asks for `amount_micro_cents` of the budget of `key`, for `holder`.
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

/// A slice of a key's budget, which its holder may spend without asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lease {
    /// How much was granted, in micro-cents; may be less than was asked for, and 0.
    pub amount_micro_cents: i64,
    /// The database's time at which what was not settled goes back.
    pub expires_at: SystemTime,
    /// When the period of the budget ends; `None` for one that never does.
    pub resets_at: Option<SystemTime>,
}

impl Lease {
    /// A lease of `amount_micro_cents` until `expires_at`.
    pub fn new(amount_micro_cents: i64, expires_at: SystemTime) -> Self {
        Self { amount_micro_cents, expires_at, resets_at: None }
    }
}

#[cfg(feature = "_sql")]
impl Lease {
    /// Of a key that is not there.
    pub(crate) fn none(now: SystemTime) -> Self {
        Self::new(0, now)
    }

    /// Reads an array of the amount, and of two times in milliseconds.
    #[cfg(feature = "postgres")]
    pub(crate) fn from_row(row: Option<&str>) -> Result<Self, StoreError> {
        let bad = || StoreError::bad_row("a lease can't be read");
        let (amount, expires, resets): (i64, u64, Option<u64>) =
            row.and_then(|row| serde_json::from_str(row).ok()).ok_or_else(bad)?;
        let time = |millis| SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
        Ok(Self { resets_at: resets.map(time), ..Self::new(amount, time(expires)) })
    }
}

/// A secret that authenticates shared cache entries. `Debug` shows its id alone.
#[derive(Clone)]
pub struct CacheSecret {
    id: u64,
    bytes: Zeroizing<[u8; 32]>,
    previous: Option<Box<CacheSecret>>,
    /// A part of entries' names, the same for every secret of one scope; empty without one.
    tag: Arc<str>,
}

impl CacheSecret {
    /// The secret `bytes`, which entries name by `id`.
    pub fn new(id: u64, bytes: [u8; 32]) -> Self {
        Self { id, bytes: Zeroizing::new(bytes), previous: None, tag: Arc::default() }
    }

    /// Adds the secret from before, whose entries are still good.
    #[must_use]
    pub fn with_previous(self, previous: CacheSecret) -> Self {
        Self { previous: Some(Box::new(CacheSecret { previous: None, ..previous })), ..self }
    }

    /// Binds the secret, and the one from before, to where the keys are from: the names of entries carry a hash of
    /// `scope`, and what authenticates them is derived from the secret and from `scope`. A copy of a database has the
    /// same secret, and must neither read nor replace the entries of the original. Scopes add up.
    #[must_use]
    pub fn with_scope(self, scope: &str) -> Self {
        let Self { id, bytes, previous, tag } = self;
        let length = scope.len().to_string();
        let label = [b"scope:", length.as_bytes(), b":", scope.as_bytes()].concat();
        let name = hmac_sha256(&[0; 32], &[&label, tag.as_bytes()].concat());
        Self {
            id,
            bytes: Zeroizing::new(hmac_sha256(bytes.as_slice(), &label)),
            previous: previous.map(|previous| Box::new(previous.with_scope(scope))),
            tag: format!("{}:", hex(&name[..8])).into(),
        }
    }

    /// The part of names that the scope makes up, with the separator behind it.
    #[cfg(feature = "redis")]
    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    /// How entries name the secret.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The secret from before.
    pub fn previous(&self) -> Option<&CacheSecret> {
        self.previous.as_deref()
    }

    /// The secret itself.
    pub fn expose_secret(&self) -> &[u8; 32] {
        &self.bytes
    }

    /// Names a stored hash in a shared cache, where not even its fingerprint is to lie.
    pub(crate) fn mac_of_hash(&self, fingerprint: &HashFingerprint) -> [u8; 32] {
        hmac_sha256(self.expose_secret(), &[b"hash:".as_slice(), &fingerprint.0].concat())
    }

    /// Reads the rows of `api_key_cache_secrets`, the newest first: id, secret in hexadecimal, and scope.
    #[cfg(feature = "_sql")]
    pub(crate) fn from_rows<'a>(
        rows: impl Iterator<Item = &'a str>,
    ) -> Result<Option<Self>, StoreError> {
        let secret = |row: &str| {
            let (id, hex, scope) = serde_json::from_str::<(u64, &str, String)>(row).ok()?;
            Some(Self::new(id, crate::runtime::unhex(hex)?).with_scope(&scope))
        };
        let secrets: Option<Vec<_>> = rows.map(secret).collect();
        let bad = || StoreError::bad_row("a row of api_key_cache_secrets can't be read");
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
        f.debug_struct("CacheSecret").field("id", &self.id).finish_non_exhaustive()
    }
}
