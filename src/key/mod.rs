//! How keys look and how they are hashed: [`KeyFormat`], [`KeyHash`], and [`KeyScheme`], the one
//! value that holds both for a layer and a [`KeyManager`](crate::KeyManager) to share.

mod base62;
mod digest;
mod format;
mod hash;
mod mint;
mod pool;
mod presented;
mod ration;
mod scheme;

pub(crate) use digest::KeyDigest;
pub(crate) use format::hmac_sha256;
pub use format::{FormatError, KeyFormat};
pub(crate) use hash::HashFingerprint;
pub(crate) use hash::hex;
#[cfg(any(feature = "postgres", feature = "redis", feature = "sqlite"))]
pub(crate) use hash::unhex;
pub use hash::{HashError, KeyHash};
pub use mint::{MintError, MintedKey};
pub(crate) use pool::SlowCheck;
pub use presented::{MalformedCredential, UnrecognizedKey};
pub(crate) use presented::{PresentedKey, token};
pub(crate) use scheme::FastCheck;
pub use scheme::{KeyScheme, KeySchemeBuilder, SchemeError};
