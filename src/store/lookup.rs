//! A look-up, and the only way to answer it: [`Lookup`].

use std::{future::Future, net::IpAddr, sync::Arc};

use chrono::DateTime;

#[cfg(any(feature = "_sql", feature = "redis"))]
use super::waiting::HoldsNothing;
use super::{
    answer::{Answer, Candidate, HashUpgrade, Outcome, Read},
    lookup_key::{LookupKey, Proof},
    priority::Priority,
    stored_key::{SecretHash, StoredKey, StoredSecret},
    waiting::Waiting,
};
use crate::{
    coherence::View,
    error::StoreError,
    key::{BcryptHash, FastCheck, KeyDigest, KeyScheme, PresentedKey, SlowCheck},
    policy,
    record::{KeyRecord, Revision, Secret},
    runtime::{Clock, Moment},
};

/// Maximum number of candidates per lookup id.
pub(crate) const MAX_CANDIDATES: usize = 8;

/// A request to a [`KeyStore`](super::KeyStore): the presented key, and the change state of the node.
///
/// `Debug` shows only the lookup id.
#[derive(Debug, Clone)]
pub struct Lookup {
    key: LookupKey,
    scheme: KeyScheme,
    address: Option<IpAddr>,
    clock: Arc<dyn Clock>,
    asked_at: Moment,
    view: Arc<View>,
    proofs: Vec<Proof>,
    skips_copies: bool,
    #[cfg_attr(not(feature = "_sql"), expect(dead_code))]
    priority: Priority,
    #[cfg_attr(not(any(feature = "_sql", feature = "redis")), expect(dead_code))]
    waiters: Option<Arc<dyn Waiting>>,
}

impl Lookup {
    /// Creates a look-up by a node with this clock, which is read now.
    pub(crate) fn new(
        key: LookupKey,
        scheme: KeyScheme,
        clock: Arc<dyn Clock>,
        address: Option<IpAddr>,
        view: Arc<View>,
    ) -> Self {
        let asked_at = clock.read();
        Self {
            key,
            scheme,
            address,
            clock,
            asked_at,
            view,
            proofs: Vec::new(),
            skips_copies: false,
            priority: Priority::Ordinary,
            waiters: None,
        }
    }

    /// Sets the waiters of the look-up, and its priority.
    #[must_use]
    pub(crate) fn with_waiters(self, priority: Priority, waiters: Arc<dyn Waiting>) -> Self {
        Self { priority, waiters: Some(waiters), ..self }
    }

    /// Returns the priority of the look-up.
    #[cfg(feature = "_sql")]
    pub(crate) fn priority(&self) -> Priority {
        self.priority
    }

    /// Returns the requests that wait for the answer.
    #[cfg(feature = "_sql")]
    pub(crate) fn waiting(&self) -> Option<&Arc<dyn Waiting>> {
        self.waiters.as_ref()
    }

    /// Reports that the look-up holds nothing that other look-ups wait for, until the guard is dropped.
    #[cfg(any(feature = "_sql", feature = "redis"))]
    #[must_use]
    pub(crate) fn hold_nothing(&self) -> HoldsNothing<'_> {
        HoldsNothing::begin(self.waiters.as_deref())
    }

    /// Logs a row under the lookup id that can't be used.
    pub(crate) fn log_bad_row(&self, error: &StoreError) {
        self.view.bad_rows.log(self.id(), error, self.clock.read().monotonic());
    }

    /// Adds a proof of an earlier match.
    #[must_use]
    pub(crate) fn with_proof(mut self, proof: Proof) -> Self {
        self.proofs.push(proof);
        self
    }

    /// Restricts the look-up to the store itself, because a copy was not sufficient.
    #[must_use]
    pub(crate) fn without_copies(self) -> Self {
        Self { skips_copies: true, ..self }
    }

    /// Returns whether the look-up must not be answered from a copy.
    pub(crate) fn skips_copies(&self) -> bool {
        self.skips_copies
    }

    /// Returns the change state of this node.
    pub(crate) fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Returns the clock of this node.
    pub(crate) fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// Returns the time at which the look-up was created, by the clock of this node.
    pub(crate) fn asked_at(&self) -> Moment {
        self.asked_at
    }

    /// Returns the public lookup id, which is stored as `key_prefix`.
    pub fn id(&self) -> &str {
        self.key.id()
    }

    /// Returns the whole key, for a store that verifies keys elsewhere. Never store it. It is empty in a look-up by
    /// [`AuthContext::recheck`](crate::AuthContext::recheck), where no key is presented. Such a store must answer that
    /// look-up with [`Lookup::verify`] of no candidates, or with an error.
    pub fn expose_secret(&self) -> &str {
        self.key.presented().map_or("", |key| key.expose_secret())
    }

    /// Returns the key that the look-up is for.
    pub(crate) fn key(&self) -> &LookupKey {
        &self.key
    }

    /// Returns whether the key itself is presented. Without it, only proofs match, and nothing is hashed.
    pub(crate) fn is_presented(&self) -> bool {
        self.key.presented().is_some()
    }

    /// Verifies the presented key against the keys that are stored under its lookup id, at most 8, and returns the
    /// answer. With no candidates, the answer is "unknown". Fast hashes are compared first, in constant time; bcrypt
    /// runs on the scheme's pool.
    ///
    /// # Errors
    ///
    /// `Overloaded` if the pool's queue is full or the failure limiter rejects the check. `BadRow` if there are more
    /// than 8 candidates, or a candidate has a hash that this scheme can't check, and no other candidate matches.
    pub fn verify(
        &self,
        candidates: impl IntoIterator<Item = StoredKey>,
    ) -> impl Future<Output = Result<Answer, StoreError>> + Send {
        self.verify_all(candidates.into_iter().map(Ok).collect())
    }

    /// Verifies like [`Lookup::verify`], with rows some of which could not be decoded. Such a row fails the look-up
    /// only if no other row matches.
    ///
    /// # Errors
    ///
    /// The errors of [`Lookup::verify`], and that of the first row that could not be decoded.
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
        let mut checked = self.check(rows);
        let mut upgrade = None;
        if checked.needs_slow_check()
            && let Some(key) = self.key.presented()
        {
            // Boxed, because few look-ups need it.
            let matched = Box::pin(self.check_slowly(key, std::mem::take(&mut checked.hashes)));
            checked.matched = matched.await?.and_then(|at| checked.slow.get(at).copied());
            let candidate = checked.matched.and_then(|at| checked.candidates.get(at));
            upgrade = candidate.and_then(|candidate| self.upgrade(key, candidate));
        }
        Ok(self.conclude(checked)?.with_upgrade(upgrade))
    }

    /// Returns the index of the hash that matches.
    async fn check_slowly(
        &self,
        key: &Arc<PresentedKey>,
        hashes: Vec<BcryptHash>,
    ) -> Result<Option<usize>, StoreError> {
        let (key, clock) = (Arc::clone(key), Arc::clone(&self.clock));
        self.scheme.check_slowly(SlowCheck { hashes, key, address: self.address, clock }).await
    }

    /// Verifies like [`Lookup::verify_all`], without slow checks. Returns `None` if one is required.
    pub(crate) fn verify_fast(
        &self,
        rows: Vec<Result<StoredKey, StoreError>>,
    ) -> Option<Result<Answer, StoreError>> {
        let checked = self.check(rows);
        (!checked.needs_slow_check()).then(|| self.conclude(checked))
    }

    /// Compares the fast hashes of the rows.
    fn check(&self, rows: Vec<Result<StoredKey, StoreError>>) -> Checked {
        let mut fault = (rows.len() > MAX_CANDIDATES).then(|| {
            let message =
                format!("more than {MAX_CANDIDATES} keys share the lookup prefix {:?}", self.id());
            StoreError::bad_row(message)
        });
        // The rows that are not tried count too.
        let latest = rows.iter().flatten().map(|key| key.revisions.key).max().unwrap_or_default();
        // Almost always one. `collect` would reserve four, which exceeds the small sizes of allocators.
        let mut candidates = Vec::with_capacity(rows.len().min(MAX_CANDIDATES));
        for row in rows.into_iter().take(MAX_CANDIDATES) {
            match row {
                Ok(key) => candidates.extend(key.secrets_under(self.id(), self.asked_at.wall())),
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
        Checked { candidates, matched, slow, hashes, fault, is_whole, latest }
    }

    /// Returns the answer after all checks.
    fn conclude(&self, checked: Checked) -> Result<Answer, StoreError> {
        let Checked { candidates, matched, fault, is_whole, latest, .. } = checked;
        if let Some(fault) = fault {
            if matched.is_none() {
                return Err(fault);
            }
            // The request succeeds, so no other log line reports the row.
            self.log_bad_row(&fault);
        }
        let read = Read::new(candidates, is_whole);
        let outcome = match matched {
            Some(at) => Outcome::Match(at),
            None if read.candidates.is_empty() => Outcome::Unknown,
            None => Outcome::Mismatch,
        };
        Ok(self.answer(outcome, read).with_key_revision(latest))
    }

    /// Returns the answer that `read` contains for this key.
    pub(crate) fn answer(&self, outcome: Outcome, read: Read) -> Answer {
        Answer::new(outcome, read, self.asked_at.wall(), self.digest())
    }

    /// Returns the digest of the look-up, so that the answer to another look-up is not accepted for this one.
    pub(crate) fn digest(&self) -> KeyDigest {
        self.key.lookup_digest()
    }

    /// Returns the proof of a match; `None` without a match, or if the store verifies keys elsewhere.
    ///
    /// # Errors
    ///
    /// `Unsupported` if the key was not presented and no proof made the match, because nothing was verified then.
    pub(crate) fn proof_of(&self, answer: &Answer) -> Result<Option<Proof>, StoreError> {
        let Some(matched) = answer.matched() else { return Ok(None) };
        if self.is_presented() {
            return Ok(matched.proof.clone());
        }
        let fingerprint = matched.fingerprint().ok_or_else(needs_the_key)?;
        let proof = self.proofs.iter().find(|proof| proof.is_for(fingerprint));
        proof.map(|proof| Some(proof.clone())).ok_or_else(needs_the_key)
    }

    /// Returns whether an answer grants access now. While the store fails, only such an answer may be served although it
    /// is stale.
    pub(crate) fn grants_access(&self, answer: &Answer) -> bool {
        let now = DateTime::from(self.clock.now());
        answer.matched().is_some_and(|it| policy::validity(&it.record, it.secret, now).is_ok())
    }

    fn has_proof_for(&self, candidate: &StoredSecret) -> bool {
        let fingerprint = candidate.hashes.hash.fingerprint();
        self.proofs.iter().any(|proof| proof.is_for(&fingerprint))
    }

    fn check_fast(&self, candidate: &StoredSecret) -> FastCheck {
        let Some(key) = self.key.presented() else {
            // The key is not presented: only the hash that it matched before can match.
            return match self.has_proof_for(candidate) {
                true => FastCheck::Match,
                false => FastCheck::Mismatch,
            };
        };
        let SecretHash { hash, upgraded } = &candidate.hashes;
        let upgraded = upgraded.as_ref().map(|fast| self.scheme.check_fast(fast, key));
        let verdict = match upgraded {
            // A valid fast hash is decisive, for a wrong key too.
            Some(verdict @ (FastCheck::Match | FastCheck::Mismatch)) => return verdict,
            _ => self.scheme.check_fast(hash, key),
        };
        // A key with a proof needs no slow check, and is never limited.
        match verdict {
            FastCheck::Slow(_) if self.has_proof_for(candidate) => FastCheck::Match,
            verdict => verdict,
        }
    }

    fn upgrade(&self, key: &PresentedKey, found: &StoredSecret) -> Option<HashUpgrade> {
        let fast = self.scheme.upgrade(key)?;
        Some(HashUpgrade { key: found.record.id.clone(), checked: found.hashes.hash.clone(), fast })
    }

    /// Creates an answer without a check, for a store that verifies keys elsewhere, such as an identity provider or a
    /// hardware module. Call it only after the presented key was verified to be the key of that record.
    ///
    /// [`AuthContext::recheck`](crate::AuthContext::recheck) can't query such a store again, because no key is
    /// presented. An answer that is made with this function is then rejected.
    pub fn assume_verified(&self, record: KeyRecord) -> Answer {
        let candidate = Candidate {
            record,
            secret: Secret::Current,
            owner_revision: Revision::default(),
            proof: None,
        };
        // A copy must be bound to a hash. There is none, so no copy is made.
        let read = Read { candidates: vec![candidate], key_revision: Revision(0), is_whole: false };
        self.answer(Outcome::Match(0), read)
    }
}

/// Result of the fast checks of the rows under a lookup id.
struct Checked {
    candidates: Vec<StoredSecret>,
    /// Index of the candidate that matches.
    matched: Option<usize>,
    /// Indexes of the candidates that need a slow check, and their hashes.
    slow: Vec<usize>,
    hashes: Vec<BcryptHash>,
    fault: Option<StoreError>,
    /// Whether every row could be decoded.
    is_whole: bool,
    latest: Revision,
}

impl Checked {
    fn needs_slow_check(&self) -> bool {
        self.matched.is_none() && !self.slow.is_empty()
    }
}

/// Returns the error for a store that verifies keys elsewhere and is queried without the key.
pub(crate) fn needs_the_key() -> StoreError {
    StoreError::unsupported(
        "a recheck without the key, because it verifies keys elsewhere (Lookup::assume_verified)",
    )
}

/// Keeps the first fault. One fault fails the look-up, and the log names it.
fn note_fault(fault: &mut Option<StoreError>, next: StoreError) {
    if fault.is_none() {
        *fault = Some(next);
    }
}
