//! Formats and hashes of keys: [`KeyScheme`].
//!
//! The default scheme mints and accepts keys like `tak_live_ID_SECRETCHECK`. Build a scheme with a brand of your own,
//! and give it to both the layer and the [`KeyManager`](crate::KeyManager):
//!
//! ```
//! use tower_api_key::{ApiKeyAuthLayer, KeyManager, KeyScheme, MemoryStore, key::KeyFormat};
//!
//! # fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let scheme = KeyScheme::builder().format(KeyFormat::structured("acme", "live")?).build()?;
//! let store = MemoryStore::new();
//! let manager = KeyManager::new(store.clone()).scheme(scheme.clone());
//! let layer = ApiKeyAuthLayer::new(store).scheme(scheme);
//! # Ok(())
//! # }
//! ```
//!
//! # Formats
//!
//! A structured key ([`KeyFormat::structured`]) has a public lookup id, which appears in lists and logs, a secret with
//! 131 random bits, and a check. The check is a CRC-32, or a MAC with [`KeyFormat::with_mint_secret`], so that a key
//! that was never issued costs no look-up. [`KeyFormat::first_chars`] accepts the keys of an existing service by their
//! first characters. [`KeyScheme::mint`] makes a key for a store of your own.
//!
//! # Hashes
//!
//! New keys are stored as SHA-256, or HMAC-SHA-256 with a [`pepper`](KeySchemeBuilder::pepper). That is enough for 131
//! random bits: NIST SP 800-63B §5.1.2.2 requires slow hashes only below 112.
//!
//! Existing keys keep their bcrypt hashes, cost 4 to 14. bcrypt reads 72 bytes: a longer key never matches.
//! [`upgrade_hashes`](KeySchemeBuilder::upgrade_hashes) stores a fast hash beside a slow one that has just matched. It
//! is ignored after `key_hash` changes. [`KeyHash`] lists the forms of stored hashes.
//!
//! # Limits of slow checks
//!
//! bcrypt runs off the async threads, on half of the cores, behind a bounded queue. Failed checks are limited per key
//! and address, and per network (IPv4 /32 and /24, IPv6 /64, /56, /48 and /32); past the limits the answer is 503,
//! never 401. A key that this node has verified is never limited. While one network guesses, an owner on another
//! network gets a check within 64 × the time of one check / slots: 16 s at cost 12 and one slot. Without the addresses
//! of clients, all callers count as one ([`ClientAddr`](crate::middleware::ClientAddr)). `cargo bench --bench
//! under_attack` measures four attackers.

mod base62;
mod digest;
mod failure_limiter;
mod format;
mod hash;
mod inspect;
mod mac;
mod mint;
mod pool;
mod presented;
mod scheme;

pub(crate) use self::{
    digest::KeyDigest,
    hash::{BcryptHash, HashFingerprint},
    mac::{MacKey, equal, hmac_sha256},
    pool::SlowCheck,
    presented::{PresentedKey, token},
    scheme::FastCheck,
};
pub use self::{
    format::{FormatError, KeyFormat},
    hash::{HashError, KeyHash},
    inspect::{InspectedFormat, KeyCheck, KeyInspection},
    mint::{MintError, MintedKey},
    scheme::{KeyScheme, KeySchemeBuilder, SchemeError},
};
