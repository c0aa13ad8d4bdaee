//! The fields of a key, with types that the format of postcard has: [`EncodedRecord`].
//!
//! The format does not describe itself: it has no names of fields and no types.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::record::{
    AllowedNetwork, Budget, EndpointRule, GracePeriod, KeyId, KeyRecord, RateLimits, Revision,
    UsageTotals, User, UserId,
};

/// The fields of a [`KeyRecord`], and of its owner only the id.
#[derive(Serialize, Deserialize)]
pub(in crate::backend) struct EncodedRecord {
    pub(in crate::backend) own: OwnFields,
    pub(in crate::backend) shared: SharedFields,
}

/// The fields that differ from key to key. The replica reads the first two alone.
#[derive(Serialize, Deserialize)]
pub(in crate::backend) struct OwnFields {
    id: EncodedId,
    revision: Revision,
    owner: EncodedId,
    name: String,
    description: String,
    prefix: String,
    is_active: bool,
    expires_at: Option<EncodedTime>,
    not_before: Option<EncodedTime>,
    usage: UsageTotals,
    last_used_at: Option<EncodedTime>,
    grace: Option<(String, EncodedTime, Option<EncodedTime>)>,
    revoked_at: Option<EncodedTime>,
    created_at: EncodedTime,
    updated_at: EncodedTime,
    /// JSON; empty for `null`.
    metadata: String,
}

/// The fields that many keys have in common: rules, limits and names of actors.
#[derive(Serialize, Deserialize)]
pub(in crate::backend) struct SharedFields {
    permissions: Vec<String>,
    scopes: Vec<String>,
    rate_limits: RateLimits,
    allowed_models: Vec<String>,
    allowed_endpoints: Vec<EndpointRule>,
    allowed_ips: Vec<AllowedNetwork>,
    is_unlimited: bool,
    budget: Option<Budget>,
    created_by: Option<String>,
    created_by_key: Option<EncodedId>,
    revoked_by: Option<String>,
    revoke_reason: Option<String>,
}

/// An id. Formats that describe themselves need no tag for the two types.
#[derive(Serialize, Deserialize)]
pub(in crate::backend) enum EncodedId {
    Integer(i64),
    Text(String),
}

/// Seconds since the Unix epoch, and nanoseconds.
#[derive(Serialize, Deserialize)]
struct EncodedTime(i64, u32);

impl EncodedRecord {
    // Both directions name all fields, so that none is forgotten.
    /// Encodes a record, and returns its owner beside it. `None` if the metadata can't be encoded.
    pub(in crate::backend) fn new(record: KeyRecord) -> Option<(Self, User)> {
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
        let grace = grace.map(|GracePeriod { prefix, ends_at, last_used_at }| {
            (prefix, ends_at.into(), last_used_at.map(EncodedTime::from))
        });
        let own = OwnFields {
            id: EncodedId::new(id.as_i64(), &id),
            revision,
            owner: EncodedId::new(user.id.as_i64(), &user.id),
            name,
            description,
            prefix,
            is_active,
            expires_at: expires_at.map(EncodedTime::from),
            not_before: not_before.map(EncodedTime::from),
            usage,
            last_used_at: last_used_at.map(EncodedTime::from),
            grace,
            revoked_at: revoked_at.map(EncodedTime::from),
            created_at: created_at.into(),
            updated_at: updated_at.into(),
            metadata: match metadata {
                serde_json::Value::Null => String::new(),
                metadata => serde_json::to_string(&metadata).ok()?,
            },
        };
        let shared = SharedFields {
            permissions,
            scopes,
            rate_limits,
            allowed_models,
            allowed_endpoints,
            allowed_ips,
            is_unlimited,
            budget,
            created_by,
            created_by_key: created_by_key.map(|id| EncodedId::new(id.as_i64(), &id)),
            revoked_by,
            revoke_reason,
        };
        Some((Self { own, shared }, user))
    }

    /// Decodes the record of a key of `owner`. `None` if a value is out of its range.
    pub(in crate::backend) fn decode(self, owner: User) -> Option<KeyRecord> {
        let Self { own, shared } = self;
        let grace = match own.grace {
            Some((prefix, ends_at, last_used_at)) => Some(GracePeriod {
                prefix,
                ends_at: ends_at.decode()?,
                last_used_at: decode_all(last_used_at)?,
            }),
            None => None,
        };
        Some(KeyRecord {
            id: own.id.into_key(),
            name: own.name,
            description: own.description,
            prefix: own.prefix,
            is_active: own.is_active,
            permissions: shared.permissions,
            scopes: shared.scopes,
            rate_limits: shared.rate_limits,
            allowed_models: shared.allowed_models,
            allowed_endpoints: shared.allowed_endpoints,
            allowed_ips: shared.allowed_ips,
            is_unlimited: shared.is_unlimited,
            budget: shared.budget,
            expires_at: decode_all(own.expires_at)?,
            not_before: decode_all(own.not_before)?,
            usage: own.usage,
            last_used_at: decode_all(own.last_used_at)?,
            grace,
            created_by: shared.created_by,
            created_by_key: shared.created_by_key.map(EncodedId::into_key),
            revoked_at: decode_all(own.revoked_at)?,
            revoked_by: shared.revoked_by,
            revoke_reason: shared.revoke_reason,
            created_at: own.created_at.decode()?,
            updated_at: own.updated_at.decode()?,
            revision: own.revision,
            metadata: match own.metadata.as_str() {
                "" => serde_json::Value::Null,
                metadata => serde_json::from_str(metadata).ok()?,
            },
            user: owner,
        })
    }
}

impl OwnFields {
    /// Returns the id of the owner.
    pub(in crate::backend) fn owner(&self) -> UserId {
        self.owner.user()
    }

    /// Returns the revision of the key.
    pub(in crate::backend) fn revision(&self) -> Revision {
        self.revision
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

    pub(in crate::backend) fn into_key(self) -> KeyId {
        match self {
            Self::Integer(id) => id.into(),
            Self::Text(id) => id.into(),
        }
    }

    fn user(&self) -> UserId {
        match self {
            Self::Integer(id) => (*id).into(),
            Self::Text(id) => id.as_str().into(),
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
        let (encoded, user) = EncodedRecord::new(record).unwrap();
        let bytes = postcard::to_allocvec(&encoded).unwrap();
        let decoded: EncodedRecord = postcard::from_bytes(&bytes).unwrap();
        assert_eq!(decoded.own.owner(), user.id);
        decoded.decode(user).unwrap()
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
        let (mut record, user) = EncodedRecord::new(full()).unwrap();
        record.own.expires_at = Some(EncodedTime(i64::MAX, 0));
        assert!(record.decode(user).is_none());
    }
}
