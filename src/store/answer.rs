//! The result of a look-up: [`Answer`].

use std::{fmt, time::SystemTime};

use super::{lookup::Lookup, lookup_key::Proof, stored_key::StoredSecret};
use crate::{
    key::{HashFingerprint, KeyDigest, KeyHash},
    record::{KeyId, KeyRecord, Revision, Revisions, Secret},
};

/// The result of a [`Lookup`]: the matching record, "unknown", or "mismatch".
///
/// An answer carries the revisions of the rows behind it and the time of the read, its as-of; so does "unknown". Only a
/// `Lookup` makes one.
pub struct Answer {
    outcome: Outcome,
    read: Read,
    as_of: SystemTime,
    source: Source,
    /// Digest of the look-up. An answer to another look-up is rejected.
    digest: KeyDigest,
    upgrade: Option<HashUpgrade>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing is stored under the lookup id.
    Unknown,
    /// A key is stored under the lookup id, but the presented key does not match it.
    Mismatch,
    /// The presented key matches the candidate at this index.
    Match(usize),
}

/// Where an answer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Store,
    /// A copy that another node may have made.
    #[cfg_attr(not(feature = "redis"), expect(dead_code))]
    Copy,
    /// The memory of this node, which is in sync with the store.
    Replica,
    /// A copy that is stale, because the store failed.
    Fallback,
}

impl Source {
    /// Returns whether the answer may be from before the look-up.
    pub(crate) fn is_copy(self) -> bool {
        self != Self::Store
    }
}

/// All keys under a lookup id, as one read of the store returned them.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) candidates: Vec<Candidate>,
    /// The highest revision under the lookup id that was read: of the rows, or of the last change as well.
    pub(crate) key_revision: Revision,
    /// Whether the read returned every key under the lookup id.
    #[cfg_attr(not(feature = "redis"), expect(dead_code))]
    pub(crate) is_whole: bool,
}

/// One of the secrets of these keys, without its hash.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) record: KeyRecord,
    pub(crate) secret: Secret,
    pub(crate) owner_revision: Revision,
    /// Proof of the match, for the candidate that matched.
    pub(crate) proof: Option<Proof>,
}

impl Candidate {
    /// Returns the fingerprint of the hash, if the answer was read from the store.
    pub(crate) fn fingerprint(&self) -> Option<&HashFingerprint> {
        match &self.proof {
            Some(Proof::Seen(fingerprint)) => Some(fingerprint),
            _ => None,
        }
    }
}

impl Read {
    pub(crate) fn new(secrets: Vec<StoredSecret>, is_whole: bool) -> Self {
        let key_revision = secrets.iter().map(|it| it.revisions.key).max().unwrap_or_default();
        let candidate = |it: StoredSecret| Candidate {
            owner_revision: it.revisions.owner,
            proof: Some(Proof::Seen(it.hashes.hash.fingerprint())),
            record: it.record,
            secret: it.secret,
        };
        Self { candidates: secrets.into_iter().map(candidate).collect(), key_revision, is_whole }
    }
}

impl Answer {
    pub(crate) fn new(outcome: Outcome, read: Read, as_of: SystemTime, digest: KeyDigest) -> Self {
        Self { outcome, read, as_of, source: Source::Store, digest, upgrade: None }
    }

    pub(crate) fn with_upgrade(self, upgrade: Option<HashUpgrade>) -> Self {
        Self { upgrade, ..self }
    }

    /// Sets the revision of the lookup id, where the store has a later one than the rows: of a deleted key, or of a
    /// lookup id that was never used.
    #[must_use]
    pub fn with_key_revision(mut self, revision: Revision) -> Self {
        self.read.key_revision = self.read.key_revision.max(revision);
        self
    }

    /// Sets the as-of: the database's time when the read was sent. The default is the start of the look-up.
    #[must_use]
    pub fn with_as_of(self, as_of: SystemTime) -> Self {
        Self { as_of, ..self }
    }

    /// Marks the answer as made from a copy.
    pub(crate) fn with_source(self, source: Source) -> Self {
        Self { source, ..self }
    }

    /// Returns the record, if the key matched.
    pub fn record(&self) -> Option<&KeyRecord> {
        self.matched().map(|candidate| &candidate.record)
    }

    pub(crate) fn matched(&self) -> Option<&Candidate> {
        if let Outcome::Match(at) = self.outcome { self.read.candidates.get(at) } else { None }
    }

    /// Returns the revisions of the rows behind the answer.
    pub fn revisions(&self) -> Revisions {
        let owner = self.matched().map(|candidate| candidate.owner_revision).unwrap_or_default();
        Revisions { key: self.read.key_revision, owner }
    }

    /// Returns the time of the read behind the answer.
    pub fn as_of(&self) -> SystemTime {
        self.as_of
    }

    /// Returns the fast hash that the store should write beside the slow hash that was just checked.
    pub fn upgrade(&self) -> Option<&HashUpgrade> {
        self.upgrade.as_ref()
    }

    /// Returns whether this is an answer to `lookup`.
    pub(crate) fn answers(&self, lookup: &Lookup) -> bool {
        self.digest.is(&lookup.digest())
    }

    pub(crate) fn source(&self) -> Source {
        self.source
    }

    pub(crate) fn outcome(&self) -> Outcome {
        self.outcome
    }

    #[cfg(feature = "redis")]
    pub(crate) fn read(&self) -> &Read {
        &self.read
    }

    /// Returns the candidate that the key matched.
    pub(crate) fn into_matched(mut self) -> Option<Candidate> {
        match self.outcome {
            Outcome::Match(at) if at < self.read.candidates.len() => {
                Some(self.read.candidates.swap_remove(at))
            }
            _ => None,
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("outcome", &self.outcome)
            .field("record", &self.record())
            .field("revisions", &self.revisions())
            .field("as_of", &self.as_of)
            .finish_non_exhaustive()
    }
}

/// A fast hash to store beside a bcrypt hash, so that the next look-up of that key runs no bcrypt.
///
/// It is valid only for the hash that it was derived from. Write it only where `key_hash` still equals `checked`, store
/// `checked` with it, and return it ([`StoredKey::with_upgrade`](crate::store::StoredKey::with_upgrade)) only while the two are equal. A rotation or a
/// hand-written `UPDATE` of `key_hash` then invalidates it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct HashUpgrade {
    /// The key.
    pub key: KeyId,
    /// The slow hash that was checked.
    pub checked: KeyHash,
    /// The fast hash of the same key.
    pub fast: KeyHash,
}
