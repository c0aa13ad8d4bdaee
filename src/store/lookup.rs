//! A question to a store, and the only way to answer it: [`Lookup`].

use std::{future::Future, net::IpAddr, sync::Arc, time::SystemTime};

use super::{
    answer::{Answer, Candidate, HashUpgrade, Outcome, Read},
    lookup_key::{LookupKey, Proof},
    priority::Priority,
    stored_key::StoredKey,
    waiting::Waiting,
};
use crate::{
    coherence::View,
    error::StoreError,
    key::{FastCheck, KeyDigest, KeyScheme, PresentedKey, SlowCheck},
    record::{KeyRecord, Revision},
    runtime::Clock,
};

/// So many keys that share a lookup prefix are tried.
pub(crate) const MAX_CANDIDATES: usize = 8;

/// A question to a [`KeyStore`](super::KeyStore): the key that was presented, and what is known
/// above the store.
///
/// `Debug` shows the lookup id alone.
#[derive(Debug, Clone)]
pub struct Lookup {
    key: LookupKey,
    scheme: KeyScheme,
    address: Option<IpAddr>,
    asked_at: SystemTime,
    view: Arc<View>,
    proofs: Vec<Proof>,
    skips_copies: bool,
    #[cfg_attr(not(feature = "_sql"), expect(dead_code))]
    priority: Priority,
    #[cfg_attr(not(feature = "_sql"), expect(dead_code))]
    waiters: Option<Arc<dyn Waiting>>,
}

impl Lookup {
    pub(crate) fn new(
        key: LookupKey,
        scheme: KeyScheme,
        address: Option<IpAddr>,
        view: Arc<View>,
    ) -> Self {
        let asked_at = scheme.clock().now();
        Self {
            key,
            scheme,
            address,
            asked_at,
            view,
            proofs: Vec::new(),
            skips_copies: false,
            priority: Priority::Ordinary,
            waiters: None,
        }
    }

    /// Sets who waits for the answer, and whether others go first.
    #[must_use]
    pub(crate) fn with_waiters(self, priority: Priority, waiters: Arc<dyn Waiting>) -> Self {
        Self { priority, waiters: Some(waiters), ..self }
    }

    /// Whether others go first.
    #[cfg(feature = "_sql")]
    pub(crate) fn priority(&self) -> Priority {
        self.priority
    }

    /// The requests that wait for the answer.
    #[cfg(feature = "_sql")]
    pub(crate) fn waiting(&self) -> Option<&dyn Waiting> {
        self.waiters.as_deref()
    }

    /// Logs that a row under the lookup id can't be used.
    pub(crate) fn log_bad_row(&self, error: &StoreError) {
        self.view.bad_rows.log(self.id(), error, self.clock().monotonic());
    }

    /// Adds a proof.
    #[must_use]
    pub(crate) fn with_proof(mut self, proof: Proof) -> Self {
        self.proofs.push(proof);
        self
    }

    /// Asks for the truth alone: a copy was not good enough.
    #[must_use]
    pub(crate) fn without_copies(self) -> Self {
        Self { skips_copies: true, ..self }
    }

    /// Whether copies are of no use to this question.
    pub(crate) fn skips_copies(&self) -> bool {
        self.skips_copies
    }

    /// What this node knows of changes.
    pub(crate) fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// The clock of this node.
    pub(crate) fn clock(&self) -> &dyn Clock {
        self.scheme.clock()
    }

    /// The public lookup id, which is stored as `key_prefix`.
    pub fn id(&self) -> &str {
        self.key.id()
    }

    /// The whole key, for a store that verifies keys elsewhere. Never keep it. Empty in a look-up by
    /// [`AuthContext::recheck`](crate::AuthContext::recheck), where no key is presented: such a store has to
    /// answer it with [`Lookup::verify`] of no candidates, or an error.
    pub fn expose_secret(&self) -> &str {
        self.key.presented().map_or("", |key| key.expose_secret())
    }

    /// What this is about.
    pub(crate) fn key(&self) -> &LookupKey {
        &self.key
    }

    /// Whether the key itself is presented. Without it, proofs alone decide, and nothing is hashed.
    pub(crate) fn is_presented(&self) -> bool {
        self.key.presented().is_some()
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
    #[cfg(feature = "_sql")]
    pub(crate) fn verify_rows(
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
        // Of those that are not tried, too.
        let latest = rows.iter().flatten().map(|key| key.revisions.key).max().unwrap_or_default();
        let mut candidates = Vec::with_capacity(rows.len().min(MAX_CANDIDATES));
        for row in rows.into_iter().take(MAX_CANDIDATES) {
            match row {
                Ok(candidate) => candidates.push(candidate),
                Err(error) => note_fault(&mut fault, error),
            }
        }
        let is_whole = fault.is_none();

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
        if matched.is_none()
            && !slow.is_empty()
            && let Some(key) = self.key.presented()
        {
            let check = SlowCheck { hashes, key: Arc::clone(key), address: self.address };
            matched = self.scheme.check_slowly(check).await?.map(|at| slow[at]);
            upgrade = matched.and_then(|at| self.upgrade(key, &candidates[at]));
        }

        if let Some(fault) = fault {
            if matched.is_none() {
                return Err(fault);
            }
            // The caller's own key is fine, so nobody else would hear of the row.
            self.log_bad_row(&fault);
        }
        let read = Read::new(candidates, is_whole);
        let outcome = match matched {
            Some(at) => Outcome::Match(at),
            None if read.candidates.is_empty() => Outcome::Unknown,
            None => Outcome::Mismatch,
        };
        Ok(self.answer(outcome, read).with_key_revision(latest).with_upgrade(upgrade))
    }

    /// The answer that `read` holds for this key.
    pub(crate) fn answer(&self, outcome: Outcome, read: Read) -> Answer {
        Answer::new(outcome, read, self.asked_at, self.digest())
    }

    /// Names the look-up, so that the answer to another one is not taken for this one's.
    pub(crate) fn digest(&self) -> KeyDigest {
        self.key.lookup_digest()
    }

    /// The proof that goes with a match of the key; `None` without a match, or where the store verifies keys
    /// elsewhere.
    ///
    /// # Errors
    ///
    /// `Unsupported` if the key was not presented and no proof made the match: nothing was verified then.
    pub(crate) fn proof_of(&self, answer: &Answer) -> Result<Option<Proof>, StoreError> {
        let Some(matched) = answer.matched() else { return Ok(None) };
        if self.is_presented() {
            return Ok(matched.proof.clone());
        }
        let fingerprint = matched.fingerprint().ok_or_else(needs_the_key)?;
        let proof = self.proofs.iter().find(|proof| proof.is_for(fingerprint));
        proof.map(|proof| Some(proof.clone())).ok_or_else(needs_the_key)
    }

    fn has_proof_for(&self, candidate: &StoredKey) -> bool {
        let fingerprint = candidate.hash.fingerprint();
        self.proofs.iter().any(|proof| proof.is_for(&fingerprint))
    }

    fn check_fast(&self, candidate: &StoredKey) -> FastCheck {
        let Some(key) = self.key.presented() else {
            // There is no text to compare: the hash is the one that the key has matched, or another one.
            return match self.has_proof_for(candidate) {
                true => FastCheck::Match,
                false => FastCheck::Mismatch,
            };
        };
        let upgraded = candidate.upgraded.as_ref().map(|fast| self.scheme.check_fast(fast, key));
        let verdict = match upgraded {
            // A valid fast hash decides alone, for a wrong key too.
            Some(verdict @ (FastCheck::Match | FastCheck::Mismatch)) => return verdict,
            _ => self.scheme.check_fast(&candidate.hash, key),
        };
        // A key already proven costs no slow check, and is never rationed.
        match verdict {
            FastCheck::Slow(_) if self.has_proof_for(candidate) => FastCheck::Match,
            verdict => verdict,
        }
    }

    fn upgrade(&self, key: &PresentedKey, found: &StoredKey) -> Option<HashUpgrade> {
        let fast = self.scheme.upgrade(key)?;
        Some(HashUpgrade { key: found.record.id.clone(), checked: found.hash.clone(), fast })
    }

    /// Makes the answer without a check, for a store that proves keys elsewhere: an identity
    /// provider, a hardware module. Call it only where the presented key was verified to be that record's.
    ///
    /// [`AuthContext::recheck`](crate::AuthContext::recheck) can't query such a store again, because there is no key
    /// to present: an answer made with this is then refused.
    pub fn assume_verified(&self, record: KeyRecord) -> Answer {
        let candidate = Candidate { record, owner_revision: Revision::default(), proof: None };
        // With no hash to tie a copy to, none is made.
        let read = Read { candidates: vec![candidate], key_revision: Revision(0), is_whole: false };
        self.answer(Outcome::Match(0), read)
    }
}

/// A store that verifies keys elsewhere can't check one again without the key.
pub(crate) fn needs_the_key() -> StoreError {
    StoreError::unsupported(
        "a recheck without the key: it verifies keys elsewhere (Lookup::assume_verified)",
    )
}

/// Keeps the first fault: one is enough to refuse, and to name in the log.
fn note_fault(fault: &mut Option<StoreError>, next: StoreError) {
    if fault.is_none() {
        *fault = Some(next);
    }
}
