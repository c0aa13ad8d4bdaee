//! How keys look and how they are hashed: [`KeyFormat`], [`KeyHash`], and [`KeyScheme`], the one
//! value that holds both for a layer and a [`KeyManager`](crate::KeyManager) to share.

mod base62;
mod format;
mod hash;
mod pool;
mod presented;
mod ration;
mod scheme;

pub use format::{FormatError, KeyFormat};
pub use hash::{HashError, KeyHash};
pub(crate) use pool::SlowCheck;
pub(crate) use presented::{KeyDigest, PresentedKey, token};
pub use presented::{MalformedCredential, UnrecognizedKey};
pub(crate) use scheme::FastCheck;
pub use scheme::{KeyScheme, KeySchemeBuilder, SchemeError};
