//! A question to a store, and the only way to answer it: [`Lookup`] and [`Answer`].

use std::{fmt, future::Future, net::IpAddr, sync::Arc, time::SystemTime};

use subtle::ConstantTimeEq;

use crate::{
    error::StoreError,
    key::{FastCheck, KeyDigest, KeyHash, KeyScheme, PresentedKey, SlowCheck},
    record::{KeyId, KeyRecord, Revisions, StoredKey},
    telemetry,
};

/// So many keys that share a lookup prefix are tried.
pub(crate) const MAX_CANDIDATES: usize = 8;

/// A question to a [`KeyStore`](super::KeyStore): the key that was presented, and what is known
/// above the store.
///
/// `Debug` shows the lookup id alone.
#[derive(Debug, Clone)]
pub struct Lookup {
    key: Arc<PresentedKey>,
    scheme: KeyScheme,
    address: Option<IpAddr>,
    asked_at: SystemTime,
}

impl Lookup {
    pub(crate) fn new(key: PresentedKey, scheme: KeyScheme, address: Option<IpAddr>) -> Self {
        let asked_at = scheme.clock().now();
        Self { key: Arc::new(key), scheme, address, asked_at }
    }

    /// The public lookup id, which is stored as `key_prefix`.
    pub fn id(&self) -> &str {
        self.key.id()
    }

    /// The whole key, for a store that proves keys elsewhere. Never keep it.
    pub fn expose_secret(&self) -> &str {
        self.key.expose_secret()
    }

    /// When the question was asked, by the clock of this node.
    pub fn asked_at(&self) -> SystemTime {
        self.asked_at
    }

    /// Checks the presented key against the keys that are stored under its lookup id, at most 8, and
    /// makes the answer; with no candidates, the answer "unknown". Fast hashes are compared first, in
    /// constant time; bcrypt runs on the scheme's pool.
    ///
    /// # Errors
    ///
    /// `Overloaded` past the pool's queue or ration; `BadRow` if there are more than 8 candidates, or
    /// one whose hash this scheme can't check, and no other one matches.
    pub fn verify(
        &self,
        candidates: impl IntoIterator<Item = StoredKey>,
    ) -> impl Future<Output = Result<Answer, StoreError>> + Send {
        self.verify_all(candidates.into_iter().map(Ok).collect())
    }

    /// Like [`Lookup::verify`], with rows some of which could not be decoded: such a row fails the
    /// question only if no other one matches.
    ///
    /// # Errors
    ///
    /// Those of [`Lookup::verify`], and the first row's that could not be decoded.
    pub fn verify_rows(
        &self,
        rows: impl IntoIterator<Item = Result<StoredKey, StoreError>>,
    ) -> impl Future<Output = Result<Answer, StoreError>> + Send {
        self.verify_all(rows.into_iter().collect())
    }

    async fn verify_all(
        &self,
        rows: Vec<Result<StoredKey, StoreError>>,
    ) -> Result<Answer, StoreError> {
        let mut fault = (rows.len() > MAX_CANDIDATES).then(|| {
            let message =
                format!("more than {MAX_CANDIDATES} keys share the lookup prefix {:?}", self.id());
            StoreError::bad_row(message)
        });
        let mut candidates = Vec::with_capacity(rows.len().min(MAX_CANDIDATES));
        for row in rows.into_iter().take(MAX_CANDIDATES) {
            match row {
                Ok(candidate) => candidates.push(candidate),
                Err(error) => note_fault(&mut fault, error),
            }
        }
        let key_revision = candidates.iter().map(|key| key.revisions.key).max().unwrap_or_default();
        let answer = |outcome, revisions: Revisions, upgrade| Answer {
            outcome,
            revisions: Revisions { key: key_revision, ..revisions },
            as_of: self.asked_at,
            digest: self.key.digest,
            upgrade,
        };

        let mut matched = None;
        let (mut slow, mut hashes) = (Vec::new(), Vec::new());
        for (at, candidate) in candidates.iter().enumerate() {
            match self.check_fast(candidate) {
                FastCheck::Match => {
                    matched = Some(at);
                    break;
                }
                FastCheck::Mismatch => {}
                FastCheck::Slow(hash) => {
                    slow.push(at);
                    hashes.push(hash);
                }
                FastCheck::Impossible(reason) => {
                    let row = StoreError::bad_row(format!("key {}: {reason}", candidate.record.id));
                    note_fault(&mut fault, row);
                }
            }
        }
        let mut upgrade = None;
        if matched.is_none() && !slow.is_empty() {
            let check = SlowCheck { hashes, key: Arc::clone(&self.key), address: self.address };
            matched = self.scheme.check_slowly(check).await?.map(|at| slow[at]);
            upgrade = matched.and_then(|at| self.upgrade(&candidates[at]));
        }

        let Some(at) = matched else {
            let outcome = if candidates.is_empty() { Outcome::Unknown } else { Outcome::Mismatch };
            let owner = candidates.iter().map(|key| key.revisions.owner).max().unwrap_or_default();
            let revisions = Revisions { owner, ..Revisions::default() };
            return fault.map_or_else(|| Ok(answer(outcome, revisions, None)), Err);
        };
        if let Some(fault) = fault {
            // The caller's own key is fine, so nobody else would hear of the row.
            telemetry::bad_row(self.id(), &fault);
        }
        let found = candidates.swap_remove(at);
        Ok(answer(Outcome::Match(Box::new(found.record)), found.revisions, upgrade))
    }

    fn check_fast(&self, candidate: &StoredKey) -> FastCheck {
        let upgraded =
            candidate.upgraded.as_ref().map(|fast| self.scheme.check_fast(fast, &self.key));
        match upgraded {
            // A valid fast hash decides alone, for a wrong key too.
            Some(verdict @ (FastCheck::Match | FastCheck::Mismatch)) => verdict,
            _ => self.scheme.check_fast(&candidate.hash, &self.key),
        }
    }

    fn upgrade(&self, found: &StoredKey) -> Option<HashUpgrade> {
        let fast = self.scheme.upgrade(&self.key)?;
        Some(HashUpgrade { key: found.record.id.clone(), checked: found.hash.clone(), fast })
    }

    /// Makes the answer without a check, for a store that proves keys elsewhere: an identity
    /// provider, a hardware module. Whoever calls this says that the presented key is that record's.
    pub fn vouch(&self, record: KeyRecord) -> Answer {
        Answer {
            outcome: Outcome::Match(Box::new(record)),
            revisions: Revisions::default(),
            as_of: self.asked_at,
            digest: self.key.digest,
            upgrade: None,
        }
    }
}

/// Keeps the first fault: one is enough to refuse, and to name in the log.
fn note_fault(fault: &mut Option<StoreError>, next: StoreError) {
    if fault.is_none() {
        *fault = Some(next);
    }
}

/// What a store says to a [`Lookup`]: whose key it is, that it is unknown, or that it is wrong.
///
/// It carries the revisions of the rows behind it and the time of the read, its as-of, for "unknown"
/// too. Only a `Lookup` makes one.
pub struct Answer {
    outcome: Outcome,
    revisions: Revisions,
    as_of: SystemTime,
    /// Of the key that was asked about: an answer to another question is refused.
    digest: KeyDigest,
    upgrade: Option<HashUpgrade>,
}

#[derive(Debug)]
pub(crate) enum Outcome {
    /// Nothing is stored under the lookup id.
    Unknown,
    /// Something is, but the key is not its.
    Mismatch,
    /// The key was proven. Boxed, because the other outcomes are empty.
    Match(Box<KeyRecord>),
}

impl Answer {
    /// Sets the revisions: for "unknown", the last one that the store gave before the read.
    #[must_use]
    pub fn with_revisions(self, revisions: Revisions) -> Self {
        Self { revisions, ..self }
    }

    /// Sets the as-of: the database's time when the read was sent. Without it, it is the time at
    /// which the question was asked.
    #[must_use]
    pub fn with_as_of(self, as_of: SystemTime) -> Self {
        Self { as_of, ..self }
    }

    /// The record, if the key was proven.
    pub fn record(&self) -> Option<&KeyRecord> {
        if let Outcome::Match(record) = &self.outcome { Some(record) } else { None }
    }

    /// The revisions of the rows behind the answer.
    pub fn revisions(&self) -> Revisions {
        self.revisions
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
        self.digest.ct_eq(&lookup.key.digest).into()
    }

    pub(crate) fn into_outcome(self) -> Outcome {
        self.outcome
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("outcome", &self.outcome)
            .field("revisions", &self.revisions)
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
