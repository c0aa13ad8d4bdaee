//! The first tier: [`LocalCache`].

use std::fmt;

use quick_cache::sync::Cache;

use super::settings::Settings;
use crate::{
    coherence::{Age, CoherenceTag, View},
    context::AuthContext,
    denial::InvalidKey,
    key::{HashFingerprint, KeyDigest},
    runtime::Moment,
    store::Proof,
};

/// Resolver by the SHA-256 of the whole key, so that a hit has proven the key. Bounded: what is asked for
/// seldom makes room.
pub(crate) struct LocalCache {
    known: Cache<KeyDigest, AuthContext>,
    /// Keys that are not valid, apart and few, so that a flood of them drives out no valid one.
    refused: Cache<KeyDigest, NegativeEntry>,
}

/// A key that is not valid.
#[derive(Clone, Copy)]
pub(crate) struct NegativeEntry {
    pub(crate) reason: InvalidKey,
    pub(crate) tag: CoherenceTag,
    /// By the wall clock, as `expires_at` is: before this, the reason does not hold.
    pub(crate) from: u64,
    /// Of the hash that the key matched when it was valid: it spares one that comes back its slow check.
    pub(crate) proof: Option<HashFingerprint>,
}

/// So many keys that are not valid are remembered.
const MAX_REFUSED: usize = 10_000;

impl NegativeEntry {
    pub(crate) fn holds(&self, view: &View, now: Moment) -> bool {
        now.wall_nanos() >= self.from && self.tag.age(view, now) == Age::Fresh
    }
}

impl LocalCache {
    pub(crate) fn new(settings: &Settings) -> Self {
        let refused = settings.capacity.min(MAX_REFUSED);
        Self { known: Cache::new(settings.capacity), refused: Cache::new(refused) }
    }

    /// What is remembered of a valid key, however old.
    #[inline]
    pub(crate) fn known(&self, key: &KeyDigest) -> Option<AuthContext> {
        self.known.get(key)
    }

    /// What is remembered of a key that is not valid, however old.
    pub(crate) fn refused(&self, key: &KeyDigest) -> Option<NegativeEntry> {
        self.refused.get(key)
    }

    /// The hash that the key has matched, as far as that is remembered.
    pub(crate) fn proof(&self, key: &KeyDigest) -> Option<HashFingerprint> {
        match self.known.get(key) {
            // Not that of a shared cache: its entry may have lost its trust since, with the secret.
            Some(caller) => match caller.verified_key()?.proof {
                Some(Proof::Seen(fingerprint)) => Some(fingerprint),
                _ => None,
            },
            None => self.refused.get(key)?.proof,
        }
    }

    pub(crate) fn remember(&self, key: KeyDigest, caller: AuthContext) {
        self.known.insert(key, caller);
    }

    /// What was known of the key before is never served again, while the store fails either.
    pub(crate) fn refuse(&self, key: KeyDigest, refused: NegativeEntry) {
        let proof = self.proof(&key);
        self.known.remove(&key);
        self.refused.insert(key, NegativeEntry { proof, ..refused });
    }

    /// Removes what is cached of a valid key.
    pub(crate) fn forget(&self, key: &KeyDigest) {
        self.known.remove(key);
    }

    /// How many valid keys are remembered.
    pub(crate) fn len(&self) -> usize {
        self.known.len()
    }
}

impl fmt::Debug for LocalCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCache").field("known", &self.known.len()).finish_non_exhaustive()
    }
}
