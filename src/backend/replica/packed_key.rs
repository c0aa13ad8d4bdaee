//! A key in a compact form: [`PackedKey`].

use std::{collections::HashSet, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    backend::encoded_record::{EncodedId, EncodedRecord, OwnFields},
    key::KeyHash,
    record::{KeyId, Revision, Revisions, UserId},
    store::{ReadOwner, StoredKey},
};

/// A key under one of its lookup ids, without its owner. A [`StoredKey`] takes several times the memory.
///
/// `Debug` is not implemented, because the hashes are in the bytes.
pub(super) struct PackedKey {
    own: Box<[u8]>,
    /// The part that many keys have in common.
    shared: Arc<[u8]>,
}

/// The parts that keys have in common, each stored once.
#[derive(Default)]
pub(super) struct SharedParts {
    parts: HashSet<Arc<[u8]>>,
    /// Number of parts after the last removal of those that are no longer used.
    used: usize,
    /// Size of the parts, in bytes.
    bytes: usize,
}

/// The part of a key that differs from key to key.
#[derive(Serialize, Deserialize)]
struct OwnPart {
    /// Whether the lookup id is that of the current secret.
    is_current: bool,
    fields: OwnFields,
    hash: PackedHash,
    upgraded: Option<PackedHash>,
    previous: Option<(PackedHash, Option<PackedHash>)>,
}

#[derive(Serialize, Deserialize)]
struct PackedHash(Vec<u8>);

impl PackedKey {
    /// Packs a key that was found under `lookup_id`. Returns `None` if it can't be encoded.
    pub(super) fn new(key: &StoredKey, lookup_id: &str, parts: &mut SharedParts) -> Option<Self> {
        let StoredKey { record, hash, upgraded, revisions, previous } = key;
        let mut record = record.clone();
        record.revision = revisions.key;
        let is_current = record.prefix == lookup_id;
        let (EncodedRecord { own: fields, shared }, _) = EncodedRecord::new(record)?;
        let own = OwnPart {
            is_current,
            fields,
            hash: PackedHash::of(hash),
            upgraded: upgraded.as_ref().map(PackedHash::of),
            previous: previous.as_ref().map(|previous| {
                let upgraded = previous.upgraded.as_ref().map(PackedHash::of);
                (PackedHash::of(&previous.hash), upgraded)
            }),
        };
        Some(Self {
            own: postcard::to_allocvec(&own).ok()?.into(),
            shared: parts.intern(&postcard::to_allocvec(&shared).ok()?),
        })
    }

    /// Returns the key with its owner, which `owner_of` returns for the revision of the key. `None` if the owner is not
    /// known.
    pub(super) fn unpack(
        &self,
        owner_of: impl FnOnce(&UserId, Revision) -> Option<ReadOwner>,
    ) -> Option<StoredKey> {
        let OwnPart { is_current: _, fields, hash, upgraded, previous } =
            postcard::from_bytes(&self.own).ok()?;
        let shared = postcard::from_bytes(&self.shared).ok()?;
        let ReadOwner { user, revision, .. } = owner_of(&fields.owner(), fields.revision())?;
        let record = EncodedRecord { own: fields, shared }.decode(user)?;
        let revisions = Revisions { key: record.revision, owner: revision };
        let mut key = StoredKey::new(record, hash.hash()?).with_revisions(revisions);
        if let Some(upgraded) = upgraded {
            key = key.with_upgrade(upgraded.hash()?);
        }
        Some(match previous {
            Some((previous, None)) => key.with_previous(previous.hash()?, None),
            Some((previous, Some(upgraded))) => {
                key.with_previous(previous.hash()?, Some(upgraded.hash()?))
            }
            None => key,
        })
    }

    /// Returns the id of the key.
    pub(super) fn id(&self) -> Option<KeyId> {
        Some(self.start()?.1.into_key())
    }

    /// Returns the revision of the key.
    pub(super) fn revision(&self) -> Option<Revision> {
        Some(self.start()?.2)
    }

    /// Returns the first fields: whether the lookup id is current, the id, and the revision.
    fn start(&self) -> Option<(bool, EncodedId, Revision)> {
        postcard::from_bytes(&self.own).ok()
    }

    /// Returns whether the key is under the lookup id of its current secret.
    pub(super) fn is_current(&self) -> bool {
        postcard::from_bytes::<bool>(&self.own).unwrap_or_default()
    }

    /// Returns the size of the part that the key does not share, in bytes.
    pub(super) fn own_bytes(&self) -> usize {
        self.own.len()
    }
}

impl SharedParts {
    /// Returns the stored part that is equal to `part`.
    fn intern(&mut self, part: &[u8]) -> Arc<[u8]> {
        if let Some(shared) = self.parts.get(part) {
            return Arc::clone(shared);
        }
        if self.parts.len() > 2 * self.used + 1024 {
            self.parts.retain(|part| Arc::strong_count(part) > 1);
            self.used = self.parts.len();
            self.bytes = self.parts.iter().map(|part| size_of_part(part)).sum();
        }
        let shared: Arc<[u8]> = part.into();
        self.bytes += size_of_part(&shared);
        self.parts.insert(Arc::clone(&shared));
        shared
    }

    /// Returns the size of the parts, in bytes.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

fn size_of_part(part: &[u8]) -> usize {
    part.len() + size_of::<Arc<[u8]>>()
}

impl PackedHash {
    fn of(hash: &KeyHash) -> Self {
        Self(hash.to_bytes())
    }

    fn hash(&self) -> Option<KeyHash> {
        KeyHash::from_bytes(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::record::{GracePeriod, KeyRecord, User};

    fn hash(text: &str) -> KeyHash {
        text.parse().unwrap()
    }

    #[test]
    fn a_key_is_unpacked_as_it_was() {
        let bcrypt = "$2b$04$abcdefghijklmnopqrstuuWS2nq3e3Q3rSvdnxvYYVJbRBmcKqV2a";
        let sha256 = KeyHash::sha256("key");
        let hmac = hash(&format!("hmac-sha256$01020304${}", "ab".repeat(32)));
        let mut record = KeyRecord::new(7, "current", User::new("ada", "ada@example.com"));
        record.grace = Some(GracePeriod::new("previous", DateTime::UNIX_EPOCH));
        record.scopes = vec!["chat:write".to_owned()];
        let revisions = Revisions { key: Revision(3), owner: Revision(4) };
        let key = |of: KeyHash| StoredKey::new(record.clone(), of).with_revisions(revisions);
        let prehashed = hash(&format!("bcrypt-sha256${bcrypt}"));
        let mut parts = SharedParts::default();
        for key in [
            key(sha256.clone()),
            key(hash(bcrypt)).with_upgrade(hmac.clone()),
            key(hmac.clone()).with_previous(prehashed.clone(), None),
            key(prehashed).with_previous(hash(bcrypt), Some(sha256)),
        ] {
            for (id, is_current) in [("current", true), ("previous", false)] {
                let packed = PackedKey::new(&key, id, &mut parts).unwrap();
                let owner = ReadOwner::new(key.record().user.clone(), revisions.owner);
                let unpacked = packed.unpack(|id, revision| {
                    assert_eq!((id, revision), (&owner.user.id, revisions.key));
                    Some(owner.clone())
                });
                assert_eq!(unpacked, Some(key.clone()));
                assert_eq!((packed.id(), packed.revision()), (Some(7.into()), Some(Revision(3))));
                assert_eq!(packed.is_current(), is_current);
                assert!(packed.unpack(|_, _| None).is_none(), "without its owner");
            }
        }
        assert_eq!(parts.parts.len(), 1, "all keys have the same rules");
    }
}
