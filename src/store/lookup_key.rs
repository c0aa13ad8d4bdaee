//! The key of a look-up: [`LookupKey`], and proof of an earlier match, which makes a hash check unnecessary: [`Proof`].

use std::{fmt, sync::Arc};

use super::account::CacheSecret;
use crate::key::{HashFingerprint, KeyDigest, PresentedKey, equal};

/// The key of a look-up.
#[derive(Debug, Clone)]
pub(crate) enum LookupKey {
    /// The request presents the key.
    Presented(Arc<PresentedKey>),
    /// This node has verified the key before, and does not keep its text. Only proofs match it.
    Verified(Arc<VerifiedKey>),
}

/// A key that this node has verified: enough to find its row again, without any part of the secret.
///
/// `Debug` shows only the lookup id.
pub(crate) struct VerifiedKey {
    pub(crate) id: Box<str>,
    /// Digest under which the local cache stores the key.
    pub(crate) digest: KeyDigest,
    /// `None` if the store verifies keys elsewhere.
    pub(crate) proof: Option<Proof>,
}

/// Proof that the key has matched a hash before. It is valid only for that hash.
///
/// `Debug` shows neither the hash nor its MAC.
#[derive(Clone)]
pub(crate) enum Proof {
    /// This node checked the hash.
    Seen(HashFingerprint),
    /// A shared cache holds the match, under the secret that authenticates its entries.
    #[cfg_attr(not(feature = "redis"), expect(dead_code))]
    Shared(Box<(CacheSecret, [u8; 32])>),
}

impl LookupKey {
    /// Returns the public lookup id.
    pub(crate) fn id(&self) -> &str {
        match self {
            Self::Presented(key) => key.id(),
            Self::Verified(key) => &key.id,
        }
    }

    /// Returns the digest under which the local cache stores the key.
    pub(crate) fn cache_digest(&self) -> KeyDigest {
        match self {
            Self::Presented(key) => key.digest,
            Self::Verified(key) => key.digest,
        }
    }

    /// Returns the digest that identifies the look-up and its answer. It differs from the key's own digest if the key
    /// was not presented: such a look-up fails after the row's hash has changed, and one with the key may succeed.
    pub(crate) fn lookup_digest(&self) -> KeyDigest {
        match self {
            Self::Presented(key) => key.digest,
            Self::Verified(key) => match &key.proof {
                Some(proof) => key.digest.for_recheck(proof.bytes()),
                None => key.digest.for_recheck(&[]),
            },
        }
    }

    pub(crate) fn presented(&self) -> Option<&Arc<PresentedKey>> {
        match self {
            Self::Presented(key) => Some(key),
            Self::Verified(_) => None,
        }
    }
}

impl Proof {
    pub(crate) fn is_for(&self, hash: &HashFingerprint) -> bool {
        match self {
            Self::Seen(fingerprint) => fingerprint.is(hash),
            Self::Shared(shared) => equal(&shared.0.mac_of_hash(hash), &shared.1),
        }
    }

    fn bytes(&self) -> &[u8; 32] {
        match self {
            Self::Seen(fingerprint) => &fingerprint.0,
            Self::Shared(shared) => &shared.1,
        }
    }
}

impl fmt::Debug for VerifiedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerifiedKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seen(_) => "Proof(seen)",
            Self::Shared(_) => "Proof(shared)",
        })
    }
}
