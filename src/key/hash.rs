//! Stored hashes of keys: [`KeyHash`].

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::{
    digest::KeyDigest,
    mac::{MacKey, equal},
};
use crate::{
    error::StoreError,
    runtime::{hex_in, unhex},
};

/// A stored hash. Its text names the algorithm.
///
/// | text | what |
/// |---|---|
/// | `$2b$…`, `$2a$…`, `$2y$…` | bcrypt of the key, cost 4 to 14; a key over 72 bytes never matches |
/// | `bcrypt-sha256$$2b$…` | bcrypt of the base64 of the key's SHA-256, for keys of any length |
/// | `sha256$HEX` | SHA-256, only for structured keys |
/// | `hmac-sha256$PEPPER$HEX` | HMAC-SHA-256 under the pepper that `PEPPER` identifies |
///
/// A fast hash is sufficient for a structured key: a slow hash makes guessing expensive, and 131 random bits can't be
/// guessed. NIST SP 800-63B §5.1.2.2 sets the limit at 112 bits: random secrets above it need no salt and no slow hash.
/// Keys of unknown strength get bcrypt or a pepper.
///
/// `Debug` shows only the algorithm.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyHash(pub(super) Kind);

/// The SHA-256 of a stored hash. It identifies the hash that a key has matched. It never leaves the process unchanged.
#[derive(Clone, Copy)]
pub(crate) struct HashFingerprint(pub(crate) [u8; 32]);

impl HashFingerprint {
    pub(crate) fn is(&self, other: &Self) -> bool {
        equal(&self.0, &other.0)
    }
}

#[derive(Clone, PartialEq, Eq)]
pub(super) enum Kind {
    Bcrypt(BcryptHash),
    Sha256([u8; 32]),
    HmacSha256 { pepper: PepperId, mac: [u8; 32] },
}

#[derive(Clone, PartialEq, Eq)]
pub(crate) struct BcryptHash {
    text: Box<str>,
    is_prehashed: bool,
}

/// Identifies a pepper without showing it: the first bytes of its HMAC over a fixed text.
pub(super) type PepperId = [u8; 4];

/// First bytes of the compact forms. No text of a hash starts with one.
const SHA256_TAG: u8 = 1;
const HMAC_TAG: u8 = 2;

const PREHASHED: &str = "bcrypt-sha256$";
const SHA256: &str = "sha256$";
const HMAC_SHA256: &str = "hmac-sha256$";
const BCRYPT_VERSIONS: [&str; 3] = ["$2b$", "$2a$", "$2y$"];
const BCRYPT_COSTS: std::ops::RangeInclusive<u32> = 4..=14;
/// Maximum number of bytes of a key that bcrypt reads.
const BCRYPT_MAX_KEY_BYTES: usize = 72;

impl KeyHash {
    /// Hashes `key` with bcrypt at `cost`, as other services do; a key over 72 bytes is hashed with SHA-256 first.
    ///
    /// Takes 55 ms at cost 10 and four times that at cost 12. Do not call it in an async task.
    ///
    /// # Errors
    ///
    /// If the cost is not 4 to 14, or the operating system returns no random bytes.
    pub fn bcrypt(key: &str, cost: u32) -> Result<Self, HashError> {
        if !BCRYPT_COSTS.contains(&cost) {
            return Err(HashError("a bcrypt cost must be 4 to 14"));
        }
        let is_prehashed = key.len() > BCRYPT_MAX_KEY_BYTES;
        let input = bcrypt_input(key, is_prehashed).unwrap_or_default();
        let text = bcrypt::hash(input.as_bytes(), cost)
            .map_err(|_| HashError("the operating system returned no random bytes"))?;
        Ok(Self(Kind::Bcrypt(BcryptHash { text: text.into(), is_prehashed })))
    }

    /// Hashes `key` with SHA-256. Only for structured keys: a look-up by any other key never matches it.
    pub fn sha256(key: &str) -> Self {
        Self(Kind::Sha256(KeyDigest::of(key.as_bytes()).0))
    }

    /// Returns whether the hash is made for secrets of unknown strength, and checked slowly.
    pub(crate) fn is_slow(&self) -> bool {
        matches!(self.0, Kind::Bcrypt(_))
    }

    /// Returns a fingerprint that identifies the hash without showing it.
    pub(crate) fn fingerprint(&self) -> HashFingerprint {
        let mut hasher = Sha256::new();
        self.write_text(|part| hasher.update(part));
        HashFingerprint(hasher.finalize().into())
    }

    /// Returns a compact form, for the memory of this process only.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        match &self.0 {
            Kind::Bcrypt(_) => self.expose_hash().into_bytes(),
            Kind::Sha256(digest) => [&[SHA256_TAG], &digest[..]].concat(),
            Kind::HmacSha256 { pepper, mac } => [&[HMAC_TAG], &pepper[..], &mac[..]].concat(),
        }
    }

    /// Reads the form that [`KeyHash::to_bytes`] returns.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        match bytes.split_first()? {
            (&SHA256_TAG, digest) => Some(Self(Kind::Sha256(digest.try_into().ok()?))),
            (&HMAC_TAG, rest) => {
                let (pepper, mac) = rest.split_first_chunk()?;
                Some(Self(Kind::HmacSha256 { pepper: *pepper, mac: mac.try_into().ok()? }))
            }
            _ => std::str::from_utf8(bytes).ok()?.parse().ok(),
        }
    }

    /// Returns the stored text. It is less sensitive than a key, but must not be logged: a weak key can be guessed from
    /// it.
    pub fn expose_hash(&self) -> String {
        let mut text = String::new();
        self.write_text(|part| text.push_str(part));
        text
    }

    /// Passes the stored text to `write`, in parts.
    fn write_text(&self, mut write: impl FnMut(&str)) {
        let mut digits = [0; 64];
        match &self.0 {
            Kind::Bcrypt(BcryptHash { text, is_prehashed }) => {
                if *is_prehashed {
                    write(PREHASHED);
                }
                write(text);
            }
            Kind::Sha256(digest) => {
                write(SHA256);
                write(hex_in(digest, &mut digits));
            }
            Kind::HmacSha256 { pepper, mac } => {
                write(HMAC_SHA256);
                write(hex_in(pepper, &mut digits));
                write("$");
                write(hex_in(mac, &mut digits));
            }
        }
    }
}

impl BcryptHash {
    /// Returns whether `key` matches the hash. Runs for tens to hundreds of milliseconds.
    pub(super) fn matches(&self, key: &str) -> bool {
        // The hash was parsed when it was read, so that an error here means a wrong key.
        bcrypt_input(key, self.is_prehashed)
            .is_some_and(|input| bcrypt::verify(input.as_bytes(), &self.text).unwrap_or(false))
    }

    /// Returns whether the hash can match `key`: plain bcrypt would truncate a longer one.
    pub(super) fn takes(&self, key: &str) -> bool {
        self.is_prehashed || key.len() <= BCRYPT_MAX_KEY_BYTES
    }
}

fn bcrypt_input(key: &str, is_prehashed: bool) -> Option<Zeroizing<String>> {
    if is_prehashed {
        // Base64 is needed, because bcrypt would stop at a zero byte of the digest.
        return Some(Zeroizing::new(STANDARD_NO_PAD.encode(Sha256::digest(key))));
    }
    (key.len() <= BCRYPT_MAX_KEY_BYTES).then(|| Zeroizing::new(key.to_owned()))
}

/// A secret that is mixed into fast hashes and is never stored with them.
#[derive(Clone)]
pub(super) struct Pepper {
    pub(super) id: PepperId,
    secret: MacKey,
}

impl Pepper {
    pub(super) fn new(secret: &[u8]) -> Self {
        let secret = MacKey::new(secret);
        let [a, b, c, d, ..] = secret.mac_of(&[b"tower-api-key pepper id"]);
        Self { id: [a, b, c, d], secret }
    }

    pub(super) fn hash(&self, key: &str) -> KeyHash {
        KeyHash(Kind::HmacSha256 { pepper: self.id, mac: self.mac(key) })
    }

    pub(super) fn matches(&self, mac: &[u8; 32], key: &str) -> bool {
        equal(&self.mac(key), mac)
    }

    fn mac(&self, key: &str) -> [u8; 32] {
        self.secret.mac_of(&[key.as_bytes()])
    }
}

impl FromStr for KeyHash {
    type Err = HashError;

    fn from_str(text: &str) -> Result<Self, HashError> {
        let kind = if let Some(digest) = text.strip_prefix(SHA256) {
            Kind::Sha256(
                unhex(digest).ok_or(HashError("sha256$ must be followed by 64 hex digits"))?,
            )
        } else if let Some(rest) = text.strip_prefix(HMAC_SHA256) {
            rest.split_once('$')
                .and_then(|(pepper, mac)| Some((unhex(pepper)?, unhex(mac)?)))
                .map(|(pepper, mac)| Kind::HmacSha256 { pepper, mac })
                .ok_or(HashError(
                    "hmac-sha256$ must be followed by 8 hex digits, $ and 64 hex digits",
                ))?
        } else if let Some(hash) = text.strip_prefix(PREHASHED) {
            Kind::Bcrypt(BcryptHash { text: bcrypt_text(hash)?, is_prehashed: true })
        } else {
            Kind::Bcrypt(BcryptHash { text: bcrypt_text(text)?, is_prehashed: false })
        };
        Ok(Self(kind))
    }
}

fn bcrypt_text(text: &str) -> Result<Box<str>, HashError> {
    if !BCRYPT_VERSIONS.iter().any(|version| text.starts_with(version)) {
        return Err(HashError("the algorithm of the hash is unknown"));
    }
    let parts =
        text.parse::<bcrypt::HashParts>().map_err(|_| HashError("the bcrypt hash is malformed"))?;
    // The parser accepts `+4` as a cost; other implementations do not.
    let has_digits = text.bytes().skip(4).take(2).all(|byte| byte.is_ascii_digit());
    if !has_digits || !BCRYPT_COSTS.contains(&parts.get_cost()) {
        return Err(HashError("the bcrypt cost is not 4 to 14"));
    }
    Ok(text.into())
}

impl fmt::Debug for HashFingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashFingerprint")
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Kind::Bcrypt(_) => "KeyHash(bcrypt, …)",
            Kind::Sha256(_) => "KeyHash(sha256, …)",
            Kind::HmacSha256 { .. } => "KeyHash(hmac-sha256, …)",
        })
    }
}

/// The error for a text that is not a [`KeyHash`], or for a hash that can't be made. It describes the fault and never
/// shows the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashError(&'static str);

impl fmt::Display for HashError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for HashError {}

/// A hash that can't be parsed means that the row can't be decoded.
impl From<HashError> for StoreError {
    fn from(error: HashError) -> Self {
        Self::bad_row("the stored hash of the key can't be used").caused_by(error)
    }
}
