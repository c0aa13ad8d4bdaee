//! The body of an entry of keys, in postcard's format: [`Keys`].
//!
//! The format does not describe itself: it has no names of fields and no types. The letter of
//! [`Kind::Keys`](super::entry::Kind) identifies the fields of a body.

use std::time::{Duration, SystemTime};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{KEYS_LIFETIME, entry::MAC};
use crate::{
    backend::encoded_record::EncodedRecord,
    key::equal,
    record::{KeyRecord, Revision, Secret, User},
    store::{CacheSecret, Candidate, Read},
};

/// The keys under a lookup id.
#[derive(Serialize)]
pub(super) struct Keys(Vec<EncodedKey>);

#[derive(Serialize, Deserialize)]
struct EncodedKey {
    /// MAC of the hash, under the secret of the entry.
    hash: [u8; MAC],
    secret: Secret,
    owner_revision: u64,
    record: EncodedRecord,
    owner: EncodedOwner,
}

/// An owner without its id, which is in the record of the key.
#[derive(Serialize, Deserialize)]
struct EncodedOwner {
    email: String,
    role: String,
    is_active: bool,
}

/// A key that was read from an entry.
pub(super) struct CopiedKey {
    pub(super) record: KeyRecord,
    pub(super) secret: Secret,
    pub(super) owner_revision: Revision,
}

impl Keys {
    /// Returns `None` if a key can't be bound to a hash, or encoded.
    pub(super) fn new(read: &Read, secret: &CacheSecret) -> Option<Self> {
        let key = |it: &Candidate| {
            let hash = secret.mac_of_hash(it.fingerprint()?);
            EncodedKey::new(hash, it.secret, it.owner_revision, it.record.clone())
        };
        read.candidates.iter().map(key).collect::<Option<_>>().map(Self)
    }

    pub(super) fn encode(&self) -> Option<Vec<u8>> {
        postcard::to_allocvec(self).ok()
    }

    /// Decodes a body, and returns the key whose hash has this MAC. `None` if there is none, or the body is not one.
    pub(super) fn find(body: &[u8], hash: &[u8; MAC]) -> Option<CopiedKey> {
        // As a `Vec` of the keys is encoded. Almost always there is one, which needs no list.
        let (count, mut rest) = postcard::take_from_bytes::<usize>(body).ok()?;
        let mut found = None;
        for _ in 0..count {
            let (key, after) = postcard::take_from_bytes::<EncodedKey>(rest).ok()?;
            rest = after;
            if found.is_none() && equal(&key.hash, hash) {
                found = Some(key);
            }
        }
        found.filter(|_| rest.is_empty())?.decode()
    }
}

impl EncodedKey {
    fn new(
        hash: [u8; 32],
        secret: Secret,
        owner_revision: Revision,
        record: KeyRecord,
    ) -> Option<Self> {
        let (record, User { id: _, email, role, is_active }) = EncodedRecord::new(record)?;
        let owner = EncodedOwner { email, role, is_active };
        Some(Self { hash, secret, owner_revision: owner_revision.0, record, owner })
    }

    fn decode(self) -> Option<CopiedKey> {
        let EncodedOwner { email, role, is_active } = self.owner;
        let owner = User { id: self.record.own.owner(), email, role, is_active };
        Some(CopiedKey {
            record: self.record.decode(owner)?,
            secret: self.secret,
            owner_revision: Revision(self.owner_revision),
        })
    }
}

/// Returns the lifetime of an entry of keys. It ends when the first of the keys or previous secrets expires.
pub(super) fn keys_lifetime(read: &Read, as_of: SystemTime) -> Duration {
    let left = |expiry: DateTime<Utc>| SystemTime::from(expiry).duration_since(as_of).ok();
    let ends = |it: &Candidate| {
        let grace_end = it.record.grace.as_ref().map(|grace| grace.ends_at);
        it.record.expires_at.into_iter().chain(grace_end)
    };
    let shortest = read.candidates.iter().flat_map(ends).filter_map(left).min();
    shortest.unwrap_or(KEYS_LIFETIME).min(KEYS_LIFETIME)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::UserId;

    #[test]
    fn a_body_is_decoded_whole_or_not_at_all() {
        let mut user = User::new("ada", "ada@example.com");
        (user.role, user.is_active) = ("admin".to_owned(), false);
        let record = KeyRecord::new(i64::MIN, "prefix", user);
        let key = EncodedKey::new([7; 32], Secret::Previous, Revision(3), record.clone()).unwrap();
        let other = KeyRecord::new(1, "prefix", User::new("eve", "eve@example.com"));
        let other = EncodedKey::new([9; 32], Secret::Current, Revision(1), other).unwrap();
        let body = Keys(vec![key, other]).encode().unwrap();
        for hash in [[7; 32], [9; 32]] {
            for length in 0..body.len() {
                assert!(Keys::find(&body[..length], &hash).is_none(), "of {length} bytes");
            }
            let longer = [body.as_slice(), b"x"].concat();
            assert!(Keys::find(&longer, &hash).is_none(), "one byte more");
        }
        assert!(Keys::find(&body, &[8; 32]).is_none());
        assert_eq!(Keys::find(&body, &[9; 32]).unwrap().record.user.id, UserId::from("eve"));
        let key = Keys::find(&body, &[7; 32]).unwrap();
        assert_eq!((key.secret, key.owner_revision), (Secret::Previous, Revision(3)));
        assert_eq!(key.record, record);
    }
}
