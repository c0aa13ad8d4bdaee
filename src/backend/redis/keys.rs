//! The body of an entry of keys, in postcard's format: [`Keys`].
//!
//! The format does not describe itself: it has no names of fields and no types. The letter of
//! [`Kind::Keys`](super::entry::Kind) says which fields a body has.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use crate::{
    record::{
        AllowedNetwork, Budget, EndpointRule, GracePeriod, KeyId, KeyRecord, RateLimits, Revision,
        Secret, UsageTotals, User, UserId,
    },
    store::{CacheSecret, Candidate, Read},
};

/// The keys under a lookup id.
#[derive(Serialize, Deserialize)]
pub(super) struct Keys(Vec<EncodedKey>);

#[derive(Serialize, Deserialize)]
struct EncodedKey {
    /// MAC of the hash, under the secret of the entry.
    hash: [u8; 32],
    secret: Secret,
    owner_revision: u64,
    record: EncodedRecord,
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
            Some(EncodedKey {
                hash: secret.mac_of_hash(it.fingerprint()?),
                secret: it.secret,
                owner_revision: it.owner_revision.0,
                record: EncodedRecord::new(it.record.clone())?,
            })
        };
        read.candidates.iter().map(key).collect::<Option<_>>().map(Self)
    }

    pub(super) fn encode(&self) -> Option<Vec<u8>> {
        postcard::to_allocvec(self).ok()
    }

    pub(super) fn decode(body: &[u8]) -> Option<Self> {
        let (keys, rest) = postcard::take_from_bytes(body).ok()?;
        rest.is_empty().then_some(keys)
    }

    /// Returns the key whose hash has this MAC.
    pub(super) fn into_key_with(self, hash: &[u8]) -> Option<CopiedKey> {
        let mut keys = self.0.into_iter();
        let key = keys.find(|key| bool::from(key.hash.as_slice().ct_eq(hash)))?;
        Some(CopiedKey {
            record: key.record.decode()?,
            secret: key.secret,
            owner_revision: Revision(key.owner_revision),
        })
    }
}

/// The fields of a [`KeyRecord`], with types that the format has.
#[derive(Serialize, Deserialize)]
struct EncodedRecord {
    id: EncodedId,
    name: String,
    description: String,
    prefix: String,
    is_active: bool,
    permissions: Vec<String>,
    scopes: Vec<String>,
    rate_limits: RateLimits,
    allowed_models: Vec<String>,
    allowed_endpoints: Vec<EndpointRule>,
    allowed_ips: Vec<AllowedNetwork>,
    is_unlimited: bool,
    budget: Option<Budget>,
    expires_at: Option<EncodedTime>,
    not_before: Option<EncodedTime>,
    usage: UsageTotals,
    last_used_at: Option<EncodedTime>,
    grace: Option<(String, EncodedTime, Option<EncodedTime>)>,
    created_by: Option<String>,
    created_by_key: Option<EncodedId>,
    revoked_at: Option<EncodedTime>,
    revoked_by: Option<String>,
    revoke_reason: Option<String>,
    created_at: EncodedTime,
    updated_at: EncodedTime,
    revision: Revision,
    /// JSON; empty for `null`.
    metadata: String,
    user: EncodedUser,
}

#[derive(Serialize, Deserialize)]
struct EncodedUser {
    id: EncodedId,
    email: String,
    role: String,
    is_active: bool,
}

/// An id. The form of ids in other formats tells the two by their types.
#[derive(Serialize, Deserialize)]
enum EncodedId {
    Integer(i64),
    Text(String),
}

/// Seconds since the Unix epoch, and nanoseconds.
#[derive(Serialize, Deserialize)]
struct EncodedTime(i64, u32);

impl EncodedRecord {
    // Both directions name all fields, so that none is forgotten.
    fn new(record: KeyRecord) -> Option<Self> {
        let KeyRecord {
            id,
            name,
            description,
            prefix,
            is_active,
            permissions,
            scopes,
            rate_limits,
            allowed_models,
            allowed_endpoints,
            allowed_ips,
            is_unlimited,
            budget,
            expires_at,
            not_before,
            usage,
            last_used_at,
            grace,
            created_by,
            created_by_key,
            revoked_at,
            revoked_by,
            revoke_reason,
            created_at,
            updated_at,
            revision,
            metadata,
            user,
        } = record;
        let User { id: user_id, email, role, is_active: is_user_active } = user;
        let grace = grace.map(|GracePeriod { prefix, ends_at, last_used_at }| {
            (prefix, ends_at.into(), last_used_at.map(EncodedTime::from))
        });
        Some(Self {
            id: EncodedId::new(id.as_i64(), &id),
            name,
            description,
            prefix,
            is_active,
            permissions,
            scopes,
            rate_limits,
            allowed_models,
            allowed_endpoints,
            allowed_ips,
            is_unlimited,
            budget,
            expires_at: expires_at.map(EncodedTime::from),
            not_before: not_before.map(EncodedTime::from),
            usage,
            last_used_at: last_used_at.map(EncodedTime::from),
            grace,
            created_by,
            created_by_key: created_by_key.map(|id| EncodedId::new(id.as_i64(), &id)),
            revoked_at: revoked_at.map(EncodedTime::from),
            revoked_by,
            revoke_reason,
            created_at: created_at.into(),
            updated_at: updated_at.into(),
            revision,
            metadata: match metadata {
                serde_json::Value::Null => String::new(),
                metadata => serde_json::to_string(&metadata).ok()?,
            },
            user: EncodedUser {
                id: EncodedId::new(user_id.as_i64(), &user_id),
                email,
                role,
                is_active: is_user_active,
            },
        })
    }

    /// Returns `None` if a value is out of its range.
    fn decode(self) -> Option<KeyRecord> {
        let EncodedUser { id, email, role, is_active } = self.user;
        let user = User { id: id.into_user(), email, role, is_active };
        let grace = match self.grace {
            Some((prefix, ends_at, last_used_at)) => Some(GracePeriod {
                prefix,
                ends_at: ends_at.decode()?,
                last_used_at: decode_all(last_used_at)?,
            }),
            None => None,
        };
        Some(KeyRecord {
            id: self.id.into_key(),
            name: self.name,
            description: self.description,
            prefix: self.prefix,
            is_active: self.is_active,
            permissions: self.permissions,
            scopes: self.scopes,
            rate_limits: self.rate_limits,
            allowed_models: self.allowed_models,
            allowed_endpoints: self.allowed_endpoints,
            allowed_ips: self.allowed_ips,
            is_unlimited: self.is_unlimited,
            budget: self.budget,
            expires_at: decode_all(self.expires_at)?,
            not_before: decode_all(self.not_before)?,
            usage: self.usage,
            last_used_at: decode_all(self.last_used_at)?,
            grace,
            created_by: self.created_by,
            created_by_key: self.created_by_key.map(EncodedId::into_key),
            revoked_at: decode_all(self.revoked_at)?,
            revoked_by: self.revoked_by,
            revoke_reason: self.revoke_reason,
            created_at: self.created_at.decode()?,
            updated_at: self.updated_at.decode()?,
            revision: self.revision,
            metadata: match self.metadata.as_str() {
                "" => serde_json::Value::Null,
                metadata => serde_json::from_str(metadata).ok()?,
            },
            user,
        })
    }
}

/// Decodes a time that may be absent. The outer `None` is a time that can't be decoded: an expiry must not be lost.
#[expect(clippy::option_option, reason = "an absent time is not one that can't be decoded")]
fn decode_all(time: Option<EncodedTime>) -> Option<Option<DateTime<Utc>>> {
    match time {
        Some(time) => time.decode().map(Some),
        None => Some(None),
    }
}

impl EncodedId {
    fn new(integer: Option<i64>, text: &impl ToString) -> Self {
        integer.map_or_else(|| Self::Text(text.to_string()), Self::Integer)
    }

    fn into_key(self) -> KeyId {
        match self {
            Self::Integer(id) => id.into(),
            Self::Text(id) => id.into(),
        }
    }

    fn into_user(self) -> UserId {
        match self {
            Self::Integer(id) => id.into(),
            Self::Text(id) => id.into(),
        }
    }
}

impl From<DateTime<Utc>> for EncodedTime {
    fn from(time: DateTime<Utc>) -> Self {
        Self(time.timestamp(), time.timestamp_subsec_nanos())
    }
}

impl EncodedTime {
    fn decode(self) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp(self.0, self.1)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn round_trip(record: KeyRecord) -> KeyRecord {
        let key = EncodedKey {
            hash: [7; 32],
            secret: Secret::Previous,
            owner_revision: 3,
            record: EncodedRecord::new(record).unwrap(),
        };
        let body = Keys(vec![key]).encode().unwrap();
        for length in 0..body.len() {
            assert!(Keys::decode(&body[..length]).is_none(), "of {length} bytes");
        }
        assert!(Keys::decode(&[body.as_slice(), b"x"].concat()).is_none(), "one byte more");
        assert!(Keys::decode(&body).unwrap().into_key_with(&[8; 32]).is_none());
        let key = Keys::decode(&body).unwrap().into_key_with(&[7; 32]).unwrap();
        assert_eq!((key.secret, key.owner_revision), (Secret::Previous, Revision(3)));
        key.record
    }

    fn full() -> KeyRecord {
        let time = |seconds| DateTime::from_timestamp(seconds, 123_456_789);
        let mut record = KeyRecord::new(i64::MIN, "prefix", User::new("ada", "ada@example.com"));
        record.name = "name".into();
        record.description = "description".into();
        record.is_active = false;
        record.permissions = vec!["read".into(), String::new()];
        record.scopes = vec!["chat:write".into()];
        record.rate_limits =
            RateLimits { per_minute: Some(0), per_hour: None, per_day: Some(u64::MAX) };
        record.allowed_models = vec!["model".into()];
        record.allowed_endpoints = vec!["POST /v1/chat".parse().unwrap(), "/a/*".parse().unwrap()];
        record.allowed_ips = vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        record.is_unlimited = true;
        record.budget =
            Some(Budget { limit_cents: 5, period: crate::record::BudgetPeriod::Weekly });
        record.expires_at = Some(DateTime::<Utc>::MAX_UTC);
        record.not_before = Some(DateTime::<Utc>::MIN_UTC);
        record.usage = UsageTotals { requests: 1, tokens: 2, cost_micro_cents: -3 };
        record.last_used_at = time(-1);
        record.grace = Some(GracePeriod {
            last_used_at: time(5),
            ..GracePeriod::new("previous", time(6).unwrap())
        });
        record.created_by = Some("ada".into());
        record.created_by_key = Some("a text".into());
        record.revoked_at = time(7);
        record.revoked_by = Some("bob".into());
        record.revoke_reason = Some(String::new());
        record.created_at = time(8).unwrap();
        record.updated_at = time(9).unwrap();
        record.revision = Revision(10);
        record.metadata = json!({"a": [1, null, "b"], "c": 1.5});
        record.user.role = "admin".into();
        record.user.is_active = false;
        record
    }

    #[test]
    fn every_field_of_a_record_is_decoded_as_it_was() {
        let record = full();
        assert_eq!(round_trip(record.clone()), record);
        let empty = KeyRecord::new("", "", User::new(-1, ""));
        assert_eq!(round_trip(empty.clone()), empty);
        let text = KeyRecord { metadata: json!(""), ..full() };
        assert_eq!(round_trip(text.clone()), text);
    }

    #[test]
    fn a_time_that_is_out_of_range_is_not_an_absent_one() {
        let mut record = EncodedRecord::new(full()).unwrap();
        record.expires_at = Some(EncodedTime(i64::MAX, 0));
        assert!(record.decode().is_none());
    }
}
