//! What a look-up is about: [`LookupKey`], and what makes a hash check superfluous: [`Proof`].

use std::{fmt, sync::Arc};

use subtle::ConstantTimeEq;

use super::account::CacheSecret;
use crate::key::{HashFingerprint, KeyDigest, PresentedKey};

/// The key that a look-up is about.
#[derive(Debug, Clone)]
pub(crate) enum LookupKey {
    /// A request presents it.
    Presented(Arc<PresentedKey>),
    /// This node has verified it before; its text is not kept. Proofs alone can match it.
    Verified(Arc<VerifiedKey>),
}

/// A key that this node has verified: enough to find its row again, and no part of the key's secret.
///
/// `Debug` shows the lookup id alone.
pub(crate) struct VerifiedKey {
    pub(crate) id: Box<str>,
    /// The digest under which the local cache has the key.
    pub(crate) digest: KeyDigest,
    /// `None` if the store verifies keys elsewhere.
    pub(crate) proof: Option<Proof>,
}

/// Knowledge that the key has matched a hash before. It is valid for that hash alone.
///
/// `Debug` shows neither the hash nor its MAC.
#[derive(Clone)]
pub(crate) enum Proof {
    /// This node checked the hash.
    Seen(HashFingerprint),
    /// A shared cache has it, under the secret that its entries are authenticated with.
    Shared(Box<(CacheSecret, [u8; 32])>),
}

impl LookupKey {
    /// The public lookup id.
    pub(crate) fn id(&self) -> &str {
        match self {
            Self::Presented(key) => key.id(),
            Self::Verified(key) => &key.id,
        }
    }

    /// The digest under which the local cache has the key.
    pub(crate) fn cache_digest(&self) -> KeyDigest {
        match self {
            Self::Presented(key) => key.digest,
            Self::Verified(key) => key.digest,
        }
    }

    /// The digest that names the look-up and its answer. It differs from the key's own where the key was not
    /// presented: such a look-up fails when the row's hash has changed, and one with the key may not.
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
            Self::Shared(shared) => shared.0.mac_of_hash(hash).ct_eq(&shared.1).into(),
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
