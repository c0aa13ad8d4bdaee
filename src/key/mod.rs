//! How keys look and how they are hashed: [`KeyFormat`], [`KeyHash`], and [`KeyScheme`], the one
//! value that holds both for a layer and a [`KeyManager`](crate::KeyManager) to share.

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
