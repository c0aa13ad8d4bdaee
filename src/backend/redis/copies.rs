//! Copies of answers in Redis: how one is read, and how one is written.

use std::sync::Arc;

use deadpool_redis::redis::Value;

use super::{
    KEYS_LIFETIME, RedisCache, VERIFIED_LIFETIME,
    entry::{Entry, Kind, MAC, MAX_BYTES, Unreadable},
    keys::{Keys, keys_lifetime},
    names::Names,
    script::Put,
};
use crate::{
    coherence::{Age, Subject},
    runtime::Moment,
    store::{Answer, CacheSecret, Candidate, KeyStore, Lookup, Outcome, Proof, Read, Source},
    telemetry,
};

/// The data in Redis for a look-up.
#[derive(Default)]
pub(super) struct CacheRead {
    /// The answer and its age.
    pub(super) answer: Option<(Answer, Age)>,
    pub(super) proof: Option<Proof>,
    /// The last bytes of an entry that was rejected.
    pub(super) rejected_tail: Vec<u8>,
}

impl<S: KeyStore> RedisCache<S> {
    /// Reads the entries, in one round trip unless many reads wait.
    pub(super) async fn find(
        &self,
        lookup: &Lookup,
        names: &Names,
        secret: &CacheSecret,
    ) -> CacheRead {
        // Apart from its turn to send a command, which ends by itself.
        let waiting = lookup.hold_nothing();
        let values = self.0.reads.read(names).await;
        drop(waiting);
        let Some(values) = values else { return CacheRead::default() };
        let bytes = |at: usize| match values.get(at) {
            Some(Value::BulkString(bytes)) => Some(bytes.as_slice()),
            _ => None,
        };
        let now = lookup.clock().read();
        let database_now = lookup.view().freshness.database_now(now);
        let mut read = CacheRead::default();
        let end_of = |value: &[u8]| value[value.len().saturating_sub(MAC)..].to_vec();
        // Without its type, so that all values have one lifetime.
        let mut take = |name: &str, value| match Entry::decode(name, value, secret) {
            Ok(entry) if name == names.keys && lookup.view().is_ahead(entry.as_of, now) => {
                // A clock was set back: the age of the entry is unknown, and no other entry would be newer.
                read.rejected_tail = end_of(value);
                None
            }
            Ok(entry) if entry.expires_at > database_now => Some(entry),
            // The expiry of the entry was removed.
            Ok(_) => None,
            Err(Unreadable::UnknownSecret) => {
                self.0.secrets.refresh(self);
                None
            }
            // Its revisions are authentic: a newer answer replaces it.
            Err(Unreadable::OtherVersion) => None,
            Err(Unreadable::Retired) => {
                if name == names.keys {
                    read.rejected_tail = end_of(value);
                }
                None
            }
            Err(Unreadable::Forged) => {
                telemetry::redis_entry_invalid(name);
                if name == names.keys {
                    read.rejected_tail = end_of(value);
                }
                None
            }
        };
        let keys = bytes(0).and_then(|value| take(&names.keys, value));
        let verified = [
            (Some(&names.verified), 1, Some(secret)),
            (names.verified_before.as_ref(), 2, secret.previous()),
        ]
        .into_iter()
        .find_map(|(name, at, secret)| Some((take(name?, bytes(at)?)?, secret?)))
        .filter(|(entry, _)| entry.kind == Kind::Verified);
        if let Some((verified, secret)) = &verified
            && let Ok(mac) = <[u8; 32]>::try_from(verified.body)
        {
            // The entry identifies the hash by a MAC under the secret that it was made with.
            read.proof = Some(Proof::Shared(Box::new(((*secret).clone(), mac))));
        }
        let verified = verified.map(|(entry, _)| entry);
        match (keys, verified) {
            (Some(keys), _) if keys.kind == Kind::Tombstone => {
                let subject = Subject::Prefix(lookup.id().into());
                lookup.view().record_tombstone(
                    subject,
                    keys.key_revision,
                    keys.expires_at - KEYS_LIFETIME,
                    now,
                );
            }
            (Some(keys), Some(verified)) if keys.kind == Kind::Keys => {
                read.answer = answer(lookup, keys, (&verified, &read.proof), now);
            }
            _ => {}
        }
        read
    }

    /// Writes the answer of the store to Redis, in the background.
    pub(super) fn fill(
        &self,
        lookup: &Lookup,
        names: &Names,
        secret: &CacheSecret,
        answer: &Answer,
        rejected_tail: Vec<u8>,
    ) {
        let read = answer.read();
        let (Outcome::Match(at), Source::Store) = (answer.outcome(), answer.source()) else {
            return;
        };
        if !read.is_whole {
            return;
        }
        let Some(fingerprint) = read.candidates.get(at).and_then(|it| it.fingerprint()) else {
            return;
        };
        let Some(body) = Keys::new(read, secret).and_then(|keys| keys.encode()) else { return };
        let Ok(permit) = Arc::clone(&self.0.fills).try_acquire_owned() else { return };
        let owner_revision =
            read.candidates.iter().map(|it| it.owner_revision).max().unwrap_or_default();
        let entry = |kind, lifetime, body| Entry {
            kind,
            key_revision: read.key_revision,
            owner_revision,
            as_of: answer.as_of(),
            expires_at: answer.as_of() + lifetime,
            body,
        };
        let keys = entry(Kind::Keys, keys_lifetime(read, answer.as_of()), &body);
        let mac = secret.mac_of_hash(fingerprint);
        let verified = entry(Kind::Verified, VERIFIED_LIFETIME, &mac);
        let now = lookup.clock().read();
        let database_now = lookup.view().freshness.database_now(now);
        let left =
            |entry: &Entry| entry.expires_at.duration_since(database_now).unwrap_or_default();
        // The database's time is known to within the delay of its notification.
        let keys_left = left(&keys).min(KEYS_LIFETIME);
        let verified_left = left(&verified).min(VERIFIED_LIFETIME);
        if keys_left.is_zero() {
            return;
        }
        let keys = keys.encode(&names.keys, secret);
        let verified = verified.encode(&names.verified, secret);
        if keys.len() > MAX_BYTES {
            return;
        }
        let (link, keys_name, verified_name) =
            (Arc::clone(&self.0.link), names.keys.clone(), names.verified.clone());
        let writes = Arc::clone(&self.0.writes);
        tokio::spawn(async move {
            let Ok(_turn) = writes.acquire().await else { return };
            let put = Put {
                name: &keys_name,
                value: &keys,
                lifetime: keys_left,
                rejected_tail: &rejected_tail,
                verified: Some((&verified_name, &verified, verified_left)),
            };
            // After a failed write, the answer is read from the store again.
            let _ = put.run(&link).await;
            drop(permit);
        });
    }
}

/// Returns the answer in a copy, and its age; `None` if a change came after it.
fn answer(
    lookup: &Lookup,
    keys: Entry<'_>,
    (verified, proof): (&Entry<'_>, &Option<Proof>),
    now: Moment,
) -> Option<(Answer, Age)> {
    let key = Keys::find(keys.body, verified.body.try_into().ok()?)?;
    let owner_revision = key.owner_revision;
    let subjects = [
        (Subject::Prefix(lookup.id().into()), keys.key_revision),
        (Subject::Owner(key.record.user.id.clone()), owner_revision),
    ];
    let age = lookup.view().judge_copy(&subjects, keys.as_of, now)?;
    let candidate =
        Candidate { record: key.record, secret: key.secret, owner_revision, proof: proof.clone() };
    let read =
        Read { candidates: vec![candidate], key_revision: keys.key_revision, is_whole: false };
    Some((
        lookup.answer(Outcome::Match(0), read).with_as_of(keys.as_of).with_source(Source::Copy),
        age,
    ))
}
