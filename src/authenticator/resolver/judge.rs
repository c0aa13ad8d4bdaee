//! Judges the store's answer, and caches the outcome.

use std::sync::{Arc, Weak};

use chrono::{DateTime, Utc};

use super::Resolver;
use crate::{
    authenticator::{
        local_cache::{NegativeEntry, ValidEntry},
        single_flight::Outcome,
    },
    coherence::{CoherenceTag, Seen, Standing, Subject},
    context::{AuthContext, Engine, Provenance, Verified},
    denial::InvalidKey,
    policy,
    record::Secret,
    store::{self, Answer, Candidate, Lookup, LookupKey, Proof, Source},
};

impl Resolver {
    /// Returns the outcome of the answer; `None` if it is older than a known change.
    pub(super) fn judge(
        self: &Arc<Self>,
        answer: Answer,
        lookup: &Lookup,
        prefix: &Subject,
        seen: Seen,
    ) -> Option<Outcome> {
        let now = self.now();
        let minimums = &self.view.minimum_revisions;
        let owner = answer.record().map(|record| Subject::Owner(record.user.id.clone()));
        let revisions = answer.revisions();
        // The generations are read first: a later change then invalidates the cached entry.
        let generation = minimums.generation(prefix);
        let mut tag = CoherenceTag {
            as_of: match answer.source() {
                Source::Store => lookup.asked_at(),
                _ => self.view.freshness.moment_of(answer.as_of(), now),
            },
            prefix: generation,
            owner: owner.as_ref().map_or(generation, |owner| minimums.generation(owner)),
            applies_from: 0,
            expires_at: u64::MAX,
        };
        let of_owner = owner.as_ref().map(|owner| (owner, revisions.owner));
        let subjects = [(prefix, revisions.key)].into_iter().chain(of_owner);
        let standing = minimums.judge(subjects, seen, now);
        // A copy may be older than a reset that arrived in the meantime, even if it was read just now.
        let is_overtaken_copy = standing == Standing::Overtaken && answer.source().is_copy();
        if standing == Standing::Below || is_overtaken_copy {
            return None;
        }
        let proof = match lookup.proof_of(&answer) {
            Ok(proof) => proof,
            Err(error) => return Some(Err(error.into())),
        };
        let result = answer.outcome();
        let outcome = match (result, answer.into_matched()) {
            (store::Outcome::Match(_), Some(matched)) => {
                // Checked at the time after the look-up, which may have taken a while.
                let validity =
                    policy::validity(&matched.record, matched.secret, DateTime::from(now.wall()));
                (tag.applies_from, tag.expires_at) = time_of(validity, &matched);
                validity.map(|()| self.context(matched, lookup.key(), proof))
            }
            (store::Outcome::Unknown, _) => Err(InvalidKey::Unknown),
            _ => Err(InvalidKey::WrongSecret),
        };
        let is_kept = standing == Standing::Current;
        let digest = lookup.key().cache_digest();
        Some(match outcome {
            Ok(caller) => {
                if is_kept {
                    let caller = caller.clone();
                    self.cache.insert_valid(digest, ValidEntry { tag, caller });
                }
                Ok(caller)
            }
            Err(reason) => {
                match lookup.key() {
                    LookupKey::Presented(_) if is_kept => {
                        let entry = NegativeEntry { reason, tag, proof: None };
                        self.cache.insert_negative(digest, entry);
                    }
                    // No negative entry is inserted: the key may match a hash that the proof does not match.
                    LookupKey::Verified(_) if is_kept => self.cache.remove_valid(&digest),
                    _ => {}
                }
                Err(reason.into())
            }
        })
    }

    fn context(
        self: &Arc<Self>,
        matched: Candidate,
        key: &LookupKey,
        proof: Option<Proof>,
    ) -> AuthContext {
        let provenance = Provenance {
            origin: self.origin.clone(),
            counter: self.usage.counter(&matched.record.id),
        };
        let engine: Weak<Self> = Arc::downgrade(self);
        let id = (key.id() != matched.record.prefix).then(|| key.id().into());
        let engine = engine as Weak<dyn Engine>;
        let verified = Verified { id, digest: key.cache_digest(), proof, engine };
        AuthContext::new(matched.record, matched.secret, provenance, verified)
    }
}

/// Returns the time in which the validity applies, from the first value on and before the second, by the wall clock.
/// It is limited at both ends, because the clock may have been ahead or behind, and may be corrected.
fn time_of(validity: Result<(), InvalidKey>, matched: &Candidate) -> (u64, u64) {
    let Candidate { record, secret, .. } = matched;
    let start = record.not_before.map_or(0, wall_nanos);
    let expiry = record.expires_at.map_or(u64::MAX, wall_nanos);
    let grace_end = match secret {
        Secret::Current => u64::MAX,
        Secret::Previous => record.grace.as_ref().map_or(0, |grace| wall_nanos(grace.ends_at)),
    };
    match validity {
        Ok(()) => (start, expiry.min(grace_end)),
        Err(InvalidKey::Rotated) => (grace_end, u64::MAX),
        Err(InvalidKey::Expired) => (expiry, u64::MAX),
        // A key that expires before it starts becomes expired.
        Err(InvalidKey::NotYetValid) => (0, start.min(expiry)),
        Err(_) => (0, u64::MAX),
    }
}

/// Returns the time in nanoseconds since the Unix epoch. A time before 1970 is 0, one after 2554 is the maximum.
fn wall_nanos(time: DateTime<Utc>) -> u64 {
    let nanos =
        i128::from(time.timestamp()) * 1_000_000_000 + i128::from(time.timestamp_subsec_nanos());
    u64::try_from(nanos.max(0)).unwrap_or(u64::MAX)
}
