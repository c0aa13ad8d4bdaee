//! What a store says to a question: [`Answer`].

use std::{fmt, time::SystemTime};

use subtle::ConstantTimeEq;

use super::{lookup::Lookup, lookup_key::Proof, stored_key::StoredKey};
use crate::{
    key::{HashFingerprint, KeyDigest, KeyHash},
    record::{KeyId, KeyRecord, Revision, Revisions},
};

/// What a store says to a [`Lookup`]: whose key it is, that it is unknown, or that it is wrong.
///
/// It carries the revisions of the rows behind it and the time of the read, its as-of, for "unknown"
/// too. Only a `Lookup` makes one.
pub struct Answer {
    outcome: Outcome,
    read: Read,
    as_of: SystemTime,
    source: Source,
    /// Of the key that was asked about: an answer to another question is refused.
    digest: KeyDigest,
    upgrade: Option<HashUpgrade>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing is stored under the lookup id.
    Unknown,
    /// Something is, but the key is not its.
    Mismatch,
    /// The key was proven to be this candidate's.
    Match(usize),
}

/// Where an answer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Store,
    /// A copy that somebody else may have made.
    Copy,
}

/// All the keys under a lookup prefix, as one read of the store found them.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) candidates: Vec<Candidate>,
    /// The highest revision under the prefix.
    pub(crate) key_revision: Revision,
    /// Whether there is nothing else under the prefix.
    pub(crate) is_whole: bool,
}

/// One of them, without its hash.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) record: KeyRecord,
    pub(crate) owner_revision: Revision,
    /// That the key has matched its hash, if it is the one that matched.
    pub(crate) proof: Option<Proof>,
}

impl Candidate {
    /// Of its hash, where the store was read.
    pub(crate) fn fingerprint(&self) -> Option<&HashFingerprint> {
        match &self.proof {
            Some(Proof::Seen(fingerprint)) => Some(fingerprint),
            _ => None,
        }
    }
}

impl Read {
    pub(crate) fn new(keys: Vec<StoredKey>, is_whole: bool) -> Self {
        let key_revision = keys.iter().map(|key| key.revisions.key).max().unwrap_or_default();
        let candidate = |key: StoredKey| Candidate {
            owner_revision: key.revisions.owner,
            proof: Some(Proof::Seen(key.hash.fingerprint())),
            record: key.record,
        };
        Self { candidates: keys.into_iter().map(candidate).collect(), key_revision, is_whole }
    }
}

impl Answer {
    pub(crate) fn new(outcome: Outcome, read: Read, as_of: SystemTime, digest: KeyDigest) -> Self {
        Self { outcome, read, as_of, source: Source::Store, digest, upgrade: None }
    }

    pub(crate) fn with_upgrade(self, upgrade: Option<HashUpgrade>) -> Self {
        Self { upgrade, ..self }
    }

    /// Sets the revision of what is stored under the lookup prefix, where the store knows of a later one
    /// than the rows have: that of a key which was deleted, of one which was never there.
    #[must_use]
    pub fn with_key_revision(mut self, revision: Revision) -> Self {
        self.read.key_revision = self.read.key_revision.max(revision);
        self
    }

    /// Sets the as-of: the database's time when the read was sent. Without it, it is the time at
    /// which the question was asked.
    #[must_use]
    pub fn with_as_of(self, as_of: SystemTime) -> Self {
        Self { as_of, ..self }
    }

    /// Marks the answer as made from a copy.
    pub(crate) fn into_copy(self) -> Self {
        Self { source: Source::Copy, ..self }
    }

    /// The record, if the key was proven.
    pub fn record(&self) -> Option<&KeyRecord> {
        self.matched().map(|candidate| &candidate.record)
    }

    pub(crate) fn matched(&self) -> Option<&Candidate> {
        if let Outcome::Match(at) = self.outcome { self.read.candidates.get(at) } else { None }
    }

    /// The revisions of the rows behind the answer.
    pub fn revisions(&self) -> Revisions {
        let owner = self.matched().map(|candidate| candidate.owner_revision).unwrap_or_default();
        Revisions { key: self.read.key_revision, owner }
    }

    /// The time of the read behind the answer.
    pub fn as_of(&self) -> SystemTime {
        self.as_of
    }

    /// A fast hash that the store should write beside the slow one that was just checked.
    pub fn upgrade(&self) -> Option<&HashUpgrade> {
        self.upgrade.as_ref()
    }

    /// Whether this is about the key that `lookup` presents.
    pub(crate) fn answers(&self, lookup: &Lookup) -> bool {
        self.digest.ct_eq(&lookup.digest()).into()
    }

    pub(crate) fn source(&self) -> Source {
        self.source
    }

    pub(crate) fn outcome(&self) -> Outcome {
        self.outcome
    }

    pub(crate) fn read(&self) -> &Read {
        &self.read
    }

    /// The candidate that the key was proven to be.
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
/// It counts only for the hash that it was derived from: write it only where `key_hash` is still
/// `checked`, together with `checked`, and hand it back
/// ([`StoredKey::with_upgrade`]) only while the two are equal. Then a rotation or a hand-written
/// `UPDATE` of `key_hash` voids it.
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
