//! Key formats and hashes: [`KeyFormat`], [`KeyHash`], and [`KeyScheme`], which combines both, to be shared by a layer
//! and a [`KeyManager`](crate::KeyManager).

mod base62;
mod digest;
mod failure_limiter;
mod format;
mod hash;
mod mint;
mod pool;
mod presented;
mod scheme;

pub(crate) use self::{
    digest::KeyDigest,
    format::hmac_sha256,
    hash::HashFingerprint,
    pool::SlowCheck,
    presented::{PresentedKey, token},
    scheme::FastCheck,
};
pub use self::{
    format::{FormatError, KeyFormat},
    hash::{HashError, KeyHash},
    mint::{MintError, MintedKey},
    scheme::{KeyScheme, KeySchemeBuilder, SchemeError},
};
