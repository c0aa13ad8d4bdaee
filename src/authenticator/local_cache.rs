//! The local cache, which is the first tier: [`LocalCache`].

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

/// Entries by the SHA-256 of the whole key, so that a hit proves the key. Bounded: entries that are rarely used are
/// evicted.
pub(crate) struct LocalCache {
    valid: Cache<KeyDigest, ValidEntry>,
    /// Negative entries. They have a cache of their own, which is small, so that a flood of invalid keys evicts no
    /// valid ones.
    negative: Cache<KeyDigest, NegativeEntry>,
}

/// Entry of a valid key. The tag is in the slot of the cache, beside the digest, so that a hit decides before it touches
/// the memory of the context.
#[derive(Clone)]
pub(crate) struct ValidEntry {
    pub(crate) tag: CoherenceTag,
    pub(crate) caller: AuthContext,
}

/// Negative entry of a key that is not valid.
#[derive(Clone, Copy)]
pub(crate) struct NegativeEntry {
    pub(crate) reason: InvalidKey,
    pub(crate) tag: CoherenceTag,
    /// Fingerprint of the hash that the key matched when it was valid. If the key becomes valid again, it needs no
    /// slow check.
    pub(crate) proof: Option<HashFingerprint>,
}

/// Entry of the local cache, of any age.
#[derive(Clone)]
pub(crate) enum CacheEntry {
    Valid(ValidEntry),
    Negative(NegativeEntry),
}

impl CacheEntry {
    /// Returns whether this node has verified the key before.
    pub(crate) fn was_verified(&self) -> bool {
        match self {
            Self::Valid(_) => true,
            Self::Negative(entry) => entry.proof.is_some(),
        }
    }

    /// Returns the fingerprint of the hash that the key has matched, if it is cached.
    pub(crate) fn proof(&self) -> Option<HashFingerprint> {
        match self {
            // The proof of a shared cache is not used: the entry may have become untrusted since, by a change of the
            // cache secret.
            Self::Valid(entry) => match entry.caller.verified_by() {
                Some(Proof::Seen(fingerprint)) => Some(*fingerprint),
                _ => None,
            },
            Self::Negative(entry) => entry.proof,
        }
    }
}

/// Maximum number of negative entries.
const MAX_NEGATIVE_ENTRIES: usize = 10_000;

impl ValidEntry {
    /// Returns the age of the entry.
    #[inline]
    pub(crate) fn age(&self, view: &View, now: Moment) -> Age {
        self.tag.age(view, now)
    }
}

impl NegativeEntry {
    /// Returns whether the entry may be served.
    #[inline]
    pub(crate) fn is_servable(&self, view: &View, now: Moment) -> bool {
        self.tag.age(view, now) == Age::Fresh
    }
}

impl LocalCache {
    pub(crate) fn new(settings: &Settings) -> Self {
        let max_negative = settings.capacity.min(MAX_NEGATIVE_ENTRIES);
        Self { valid: Cache::new(settings.capacity), negative: Cache::new(max_negative) }
    }

    /// Returns the entry of a valid key, of any age.
    #[inline]
    pub(crate) fn valid(&self, key: &KeyDigest) -> Option<ValidEntry> {
        self.valid.get(key)
    }

    /// Returns the negative entry of a key, of any age.
    pub(crate) fn negative(&self, key: &KeyDigest) -> Option<NegativeEntry> {
        self.negative.get(key)
    }

    /// Returns the entry of a key, of any age.
    pub(crate) fn entry(&self, key: &KeyDigest) -> Option<CacheEntry> {
        match self.valid.get(key) {
            Some(entry) => Some(CacheEntry::Valid(entry)),
            None => self.negative(key).map(CacheEntry::Negative),
        }
    }

    /// Inserts the entry of a valid key.
    pub(crate) fn insert_valid(&self, key: KeyDigest, entry: ValidEntry) {
        self.valid.insert(key, entry);
    }

    /// Inserts a negative entry, and removes the entry of the valid key, which is never served again, even while the
    /// store fails.
    pub(crate) fn insert_negative(&self, key: KeyDigest, entry: NegativeEntry) {
        let proof = self.entry(&key).as_ref().and_then(CacheEntry::proof);
        self.valid.remove(&key);
        self.negative.insert(key, NegativeEntry { proof, ..entry });
    }

    /// Removes the entry of a valid key.
    pub(crate) fn remove_valid(&self, key: &KeyDigest) {
        self.valid.remove(key);
    }

    /// Returns the number of valid keys in the cache.
    pub(crate) fn len(&self) -> usize {
        self.valid.len()
    }
}

impl fmt::Debug for LocalCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalCache").field("valid", &self.valid.len()).finish_non_exhaustive()
    }
}
