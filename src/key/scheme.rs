//! Formats, hashing, pool and failure limiter in one value: [`KeyScheme`].

use std::{
    fmt, net::IpAddr, num::NonZero, sync::Arc, thread::available_parallelism, time::Duration,
};

use zeroize::Zeroizing;

use super::{
    digest::KeyDigest,
    format::{FormatError, KeyFormat, Verdict},
    hash::{BcryptHash, KeyHash, Kind, Pepper},
    mac::equal,
    pool::{BcryptPool, SlowCheck},
    presented::{PresentedKey, check_length},
};
use crate::{denial::UnrecognizedKey, error::StoreError};

/// Formats and hashes of keys, to be shared by a layer and a [`KeyManager`](crate::KeyManager).
///
/// The default accepts and mints structured keys with the brand `tak` and the environment `live`, hashed with SHA-256.
/// Use a brand of your own for a product:
///
/// ```
/// use tower_api_key::{KeyScheme, key::KeyFormat};
///
/// let scheme = KeyScheme::builder()
///     .format(KeyFormat::structured("acme", "live")?)
///     // Existing keys, whose first 8 characters are in the column `key_prefix`.
///     .format(KeyFormat::first_chars(8)?)
///     .pepper("read this from the environment")
///     .upgrade_hashes()
///     .build()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A clone shares the pool and the failure limiter. Use one scheme for all layers in a process. Their authenticators need
/// the same clock, because the failure limiter compares the times at which their checks fail.
#[derive(Clone)]
pub struct KeyScheme(Arc<Inner>);

struct Inner {
    formats: Vec<KeyFormat>,
    /// The current pepper, followed by the retired ones.
    peppers: Vec<Pepper>,
    upgrades_hashes: bool,
    pool: Arc<BcryptPool>,
}

/// Result of checking a stored key without bcrypt.
pub(crate) enum FastCheck {
    Match,
    Mismatch,
    /// The key has a bcrypt hash, which a slow check must compare.
    Slow(BcryptHash),
    /// This scheme can't check the hash.
    Impossible(&'static str),
}

impl KeyScheme {
    /// Creates a builder.
    pub fn builder() -> KeySchemeBuilder {
        KeySchemeBuilder {
            formats: Vec::new(),
            pepper: None,
            retired_peppers: Vec::new(),
            upgrades_hashes: false,
            slots: None,
            queue: None,
        }
    }

    /// Parses visible ASCII. A key with the brand of a structured format is parsed only by the formats of that brand,
    /// in any order of formats, so that a forged key is never accepted by a less strict format.
    ///
    /// `digest` is that of the token.
    pub(crate) fn parse(
        &self,
        token: &str,
        digest: KeyDigest,
    ) -> Result<PresentedKey, UnrecognizedKey> {
        check_length(token)?;
        let mut claimed = None;
        for format in self.0.formats.iter().filter(|format| format.is_structured()) {
            match format.judge(token) {
                Verdict::Key(shape) => return Ok(PresentedKey::new(token, shape, digest)),
                // A wrong check is more specific than a wrong environment.
                Verdict::Claimed(UnrecognizedKey::WrongCheck) => {
                    claimed = Some(UnrecognizedKey::WrongCheck);
                }
                Verdict::Claimed(reason) => claimed = claimed.or(Some(reason)),
                Verdict::Foreign => {}
            }
        }
        if let Some(reason) = claimed {
            return Err(reason);
        }
        let lax = self.0.formats.iter().filter(|format| !format.is_structured());
        lax.map(|format| format.judge(token))
            .find_map(|verdict| if let Verdict::Key(shape) = verdict { Some(shape) } else { None })
            .map(|shape| PresentedKey::new(token, shape, digest))
            .ok_or(UnrecognizedKey::UnknownFormat)
    }

    pub(super) fn formats(&self) -> &[KeyFormat] {
        &self.0.formats
    }

    /// Generates a key in the first structured format, if there is one. `id` is the lookup id; without it, a new one is
    /// generated.
    pub(super) fn generate(
        &self,
        id: Option<&str>,
    ) -> Option<Result<PresentedKey, getrandom::Error>> {
        self.0.formats.iter().find_map(|format| format.generate(id))
    }

    /// Returns the fast hash of a key for storage: under the pepper if there is one, otherwise plain SHA-256 for a
    /// structured key, and none for a key of unknown strength.
    pub(crate) fn fast_hash(&self, key: &PresentedKey) -> Option<KeyHash> {
        match self.0.peppers.first() {
            Some(pepper) => Some(pepper.hash(key.expose_secret())),
            None if key.is_structured => Some(KeyHash(Kind::Sha256(key.digest.0))),
            None => None,
        }
    }

    /// Returns the fast hash to store beside the bcrypt hash that `key` has just matched.
    pub(crate) fn upgrade(&self, key: &PresentedKey) -> Option<KeyHash> {
        if self.0.upgrades_hashes { self.fast_hash(key) } else { None }
    }

    /// Checks a key without running bcrypt.
    pub(crate) fn check_fast(&self, hash: &KeyHash, key: &PresentedKey) -> FastCheck {
        let matches = match &hash.0 {
            Kind::Bcrypt(hash) if hash.takes(key.expose_secret()) => {
                return FastCheck::Slow(hash.clone());
            }
            Kind::Bcrypt(_) => false,
            // A key of unknown strength can be guessed from a plain digest in a stolen table.
            Kind::Sha256(_) if !key.is_structured => {
                return FastCheck::Impossible(
                    "a plain sha256$ hash is allowed only for structured keys",
                );
            }
            Kind::Sha256(digest) => equal(digest, &key.digest.0),
            Kind::HmacSha256 { pepper: id, mac } => {
                let Some(pepper) = self.0.peppers.iter().find(|pepper| pepper.id == *id) else {
                    return FastCheck::Impossible(
                        "the hash was made under a pepper that this scheme does not have",
                    );
                };
                pepper.matches(mac, key.expose_secret())
            }
        };
        if matches { FastCheck::Match } else { FastCheck::Mismatch }
    }

    /// Runs slow checks on the pool. See [`BcryptPool::run`].
    pub(crate) async fn check_slowly(&self, check: SlowCheck) -> Result<Option<usize>, StoreError> {
        self.0.pool.run(check).await
    }

    /// Returns the error with which a slow check of `key` would be rejected at the monotonic time `now`, as far as that
    /// is known before the look-up.
    pub(crate) fn turns_away(
        &self,
        key: &PresentedKey,
        address: Option<IpAddr>,
        now: Duration,
    ) -> Option<StoreError> {
        self.0.pool.turns_away(key.id(), address, now)
    }
}

impl Default for KeyScheme {
    fn default() -> Self {
        let Ok(scheme) = Self::builder().build() else {
            unreachable!("the defaults are within the bounds")
        };
        scheme
    }
}

impl fmt::Debug for KeyScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyScheme")
            .field("formats", &self.0.formats)
            .field("peppers", &self.0.peppers.len())
            .field("upgrade_hashes", &self.0.upgrades_hashes)
            .finish_non_exhaustive()
    }
}

/// Builds a [`KeyScheme`].
#[derive(Clone)]
pub struct KeySchemeBuilder {
    formats: Vec<KeyFormat>,
    pepper: Option<Zeroizing<Vec<u8>>>,
    retired_peppers: Vec<Zeroizing<Vec<u8>>>,
    upgrades_hashes: bool,
    slots: Option<usize>,
    queue: Option<usize>,
}

impl KeySchemeBuilder {
    /// Accepts keys of `format`. New keys are minted in the first structured format. Without any format, the scheme
    /// uses the default format.
    #[must_use]
    pub fn format(mut self, format: KeyFormat) -> Self {
        self.formats.push(format);
        self
    }

    /// Hashes new keys with HMAC-SHA-256 under `pepper`, which has at least 16 bytes and is never stored with the
    /// hashes.
    #[must_use]
    pub fn pepper(mut self, pepper: impl AsRef<[u8]>) -> Self {
        self.pepper = Some(pepper.as_ref().to_vec().into());
        self
    }

    /// Continues to check hashes that were made under `pepper`, and makes none with it.
    #[must_use]
    pub fn retired_pepper(mut self, pepper: impl AsRef<[u8]>) -> Self {
        self.retired_peppers.push(pepper.as_ref().to_vec().into());
        self
    }

    /// Stores a fast hash beside the slow one after a successful bcrypt check, so that the next look-up of that key
    /// runs no bcrypt. Off by default. Requires a pepper if there are formats of unknown strength.
    #[must_use]
    pub fn upgrade_hashes(mut self) -> Self {
        self.upgrades_hashes = true;
        self
    }

    /// Sets the number of concurrent bcrypt checks: half of the cores by default, at least one.
    #[must_use]
    pub fn bcrypt_slots(mut self, slots: usize) -> Self {
        self.slots = Some(slots);
        self
    }

    /// Sets the maximum number of waiting bcrypt checks: 32 per slot by default. Beyond it, requests are answered 503.
    #[must_use]
    pub fn bcrypt_queue(mut self, queue: usize) -> Self {
        self.queue = Some(queue);
        self
    }

    /// Builds the scheme.
    ///
    /// # Errors
    ///
    /// If two formats accept the same keys, a pepper is too short, hashes are to be upgraded without a pepper for keys
    /// of unknown strength, or a bound is out of range.
    pub fn build(mut self) -> Result<KeyScheme, SchemeError> {
        if self.formats.is_empty() {
            self.formats.push(KeyFormat::structured(DEFAULT_BRAND, DEFAULT_ENVIRONMENT)?);
        }
        for (at, format) in self.formats.iter().enumerate() {
            if self.formats[..at].iter().any(|earlier| earlier.clashes_with(format)) {
                return Err(SchemeError::SameFormat);
            }
        }
        if self.pepper.is_none() && !self.retired_peppers.is_empty() {
            return Err(SchemeError::NoCurrentPepper);
        }
        let peppers: Vec<_> = self.pepper.iter().chain(&self.retired_peppers).collect();
        if peppers.iter().any(|pepper| pepper.len() < MIN_PEPPER_BYTES) {
            return Err(SchemeError::ShortPepper);
        }
        let all_structured = self.formats.iter().all(KeyFormat::is_structured);
        if self.upgrades_hashes && peppers.is_empty() && !all_structured {
            return Err(SchemeError::UpgradeWithoutPepper);
        }
        let cores = available_parallelism().map_or(1, NonZero::get);
        let slots = self.slots.unwrap_or((cores / 2).max(1));
        let queue = self.queue.unwrap_or(QUEUE_PER_SLOT.saturating_mul(slots));
        if slots == 0 || slots > MAX_SLOTS || queue > MAX_QUEUE {
            return Err(SchemeError::Bounds);
        }
        Ok(KeyScheme(Arc::new(Inner {
            peppers: peppers.into_iter().map(|pepper| Pepper::new(pepper)).collect(),
            upgrades_hashes: self.upgrades_hashes,
            pool: Arc::new(BcryptPool::new(slots, queue)),
            formats: self.formats,
        })))
    }
}

const DEFAULT_BRAND: &str = "tak";
const DEFAULT_ENVIRONMENT: &str = "live";
const MIN_PEPPER_BYTES: usize = 16;
const QUEUE_PER_SLOT: usize = 32;
const MAX_SLOTS: usize = 1024;
const MAX_QUEUE: usize = 1 << 20;

impl fmt::Debug for KeySchemeBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeySchemeBuilder").field("formats", &self.formats).finish_non_exhaustive()
    }
}

/// The reason why a [`KeyScheme`] can't be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SchemeError {
    /// Two formats have the same brand and environment, or both use the first characters.
    SameFormat,
    /// A pepper has fewer than 16 bytes.
    ShortPepper,
    /// A retired pepper was given, and no current one.
    NoCurrentPepper,
    /// Hashes are to be upgraded without a pepper, but a plain fast hash of a key of unknown strength can be guessed.
    UpgradeWithoutPepper,
    /// The number of bcrypt slots is 0 or more than 1,024, or the queue is longer than 1,048,576.
    Bounds,
    /// A format can't be built.
    Format(FormatError),
}

impl From<FormatError> for SchemeError {
    fn from(error: FormatError) -> Self {
        Self::Format(error)
    }
}

impl fmt::Display for SchemeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SameFormat => "two formats of the key scheme accept the same keys",
            Self::ShortPepper => "a pepper must have at least 16 bytes",
            Self::NoCurrentPepper => "a retired pepper requires a current one",
            Self::UpgradeWithoutPepper => {
                "upgrading the hashes of keys of unknown strength requires a pepper"
            }
            Self::Bounds => {
                "the bcrypt slots must be 1 to 1,024, and the waiting checks at most 1,048,576"
            }
            Self::Format(error) => return error.fmt(f),
        })
    }
}

impl std::error::Error for SchemeError {}
