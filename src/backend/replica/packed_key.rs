//! A key in a compact form: [`PackedKey`].

use std::{collections::HashSet, sync::Arc};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::{
    key::KeyHash,
    record::{
        AllowedNetwork, Budget, EndpointRule, GracePeriod, KeyId, KeyRecord, RateLimits, Revision,
        Revisions, UsageTotals, User, UserId,
    },
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
    id: PackedId,
    owner: PackedId,
    name: String,
    description: String,
    prefix: String,
    is_active: bool,
    expires_at: Option<Time>,
    not_before: Option<Time>,
    requests: u64,
    tokens: u64,
    cost_micro_cents: i64,
    last_used_at: Option<Time>,
    grace: Option<PackedGrace>,
    revoked_at: Option<Time>,
    created_at: Time,
    updated_at: Time,
    revision: u64,
    /// JSON text; `None` for `null`.
    metadata: Option<String>,
    hash: PackedHash,
    upgraded: Option<PackedHash>,
    previous: Option<(PackedHash, Option<PackedHash>)>,
}

/// The part that many keys have in common: rules, limits and names of actors.
#[derive(Serialize, Deserialize)]
struct SharedPart {
    permissions: Vec<String>,
    scopes: Vec<String>,
    rate_limits: RateLimits,
    allowed_models: Vec<String>,
    allowed_endpoints: Vec<EndpointRule>,
    allowed_ips: Vec<AllowedNetwork>,
    is_unlimited: bool,
    budget: Option<Budget>,
    created_by: Option<String>,
    created_by_key: Option<PackedId>,
    revoked_by: Option<String>,
    revoke_reason: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct PackedGrace {
    prefix: String,
    ends_at: Time,
    last_used_at: Option<Time>,
}

#[derive(Serialize, Deserialize)]
enum PackedId {
    Integer(i64),
    Text(String),
}

/// Seconds since the Unix epoch, and nanoseconds.
#[derive(Serialize, Deserialize)]
struct Time(i64, u32);

#[derive(Serialize, Deserialize)]
struct PackedHash(Vec<u8>);

impl PackedKey {
    /// Packs a key that was found under `lookup_id`. Returns `None` if it can't be encoded.
    pub(super) fn new(key: &StoredKey, lookup_id: &str, parts: &mut SharedParts) -> Option<Self> {
        let StoredKey { record, hash, upgraded, revisions, previous } = key;
        // Without `..`, so that a new field is not forgotten.
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
            // Equal to that in `revisions`.
            revision: _,
            metadata,
            user,
        } = record.clone();
        let own = OwnPart {
            is_current: prefix == lookup_id,
            id: PackedId::of(id.as_i64(), &id),
            owner: PackedId::of(user.id.as_i64(), &user.id),
            name,
            description,
            prefix,
            is_active,
            expires_at: expires_at.map(Time::of),
            not_before: not_before.map(Time::of),
            requests: usage.requests,
            tokens: usage.tokens,
            cost_micro_cents: usage.cost_micro_cents,
            last_used_at: last_used_at.map(Time::of),
            grace: grace.map(|grace| PackedGrace {
                prefix: grace.prefix,
                ends_at: Time::of(grace.ends_at),
                last_used_at: grace.last_used_at.map(Time::of),
            }),
            revoked_at: revoked_at.map(Time::of),
            created_at: Time::of(created_at),
            updated_at: Time::of(updated_at),
            revision: revisions.key.0,
            metadata: (!metadata.is_null()).then(|| metadata.to_string()),
            hash: PackedHash::of(hash),
            upgraded: upgraded.as_ref().map(PackedHash::of),
            previous: previous.as_ref().map(|previous| {
                let upgraded = previous.upgraded.as_ref().map(PackedHash::of);
                (PackedHash::of(&previous.hash), upgraded)
            }),
        };
        let shared = SharedPart {
            permissions,
            scopes,
            rate_limits,
            allowed_models,
            allowed_endpoints,
            allowed_ips,
            is_unlimited,
            budget,
            created_by,
            created_by_key: created_by_key.map(|id| PackedId::of(id.as_i64(), &id)),
            revoked_by,
            revoke_reason,
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
        let own: OwnPart = postcard::from_bytes(&self.own).ok()?;
        let shared: SharedPart = postcard::from_bytes(&self.shared).ok()?;
        let ReadOwner { user, revision, .. } = owner_of(&own.owner.into(), Revision(own.revision))?;
        let mut record = KeyRecord::new(KeyId::from(own.id), own.prefix, User::new(0, ""));
        record.name = own.name;
        record.description = own.description;
        record.is_active = own.is_active;
        record.permissions = shared.permissions;
        record.scopes = shared.scopes;
        record.rate_limits = shared.rate_limits;
        record.allowed_models = shared.allowed_models;
        record.allowed_endpoints = shared.allowed_endpoints;
        record.allowed_ips = shared.allowed_ips;
        record.is_unlimited = shared.is_unlimited;
        record.budget = shared.budget;
        record.expires_at = Time::into_option(own.expires_at)?;
        record.not_before = Time::into_option(own.not_before)?;
        record.usage = UsageTotals {
            requests: own.requests,
            tokens: own.tokens,
            cost_micro_cents: own.cost_micro_cents,
        };
        record.last_used_at = Time::into_option(own.last_used_at)?;
        if let Some(grace) = own.grace {
            let last_used_at = Time::into_option(grace.last_used_at)?;
            let ends_at = grace.ends_at.time()?;
            record.grace = Some(GracePeriod { prefix: grace.prefix, ends_at, last_used_at });
        }
        record.created_by = shared.created_by;
        record.created_by_key = shared.created_by_key.map(KeyId::from);
        record.revoked_at = Time::into_option(own.revoked_at)?;
        record.revoked_by = shared.revoked_by;
        record.revoke_reason = shared.revoke_reason;
        record.created_at = own.created_at.time()?;
        record.updated_at = own.updated_at.time()?;
        if let Some(metadata) = own.metadata {
            record.metadata = serde_json::from_str(&metadata).ok()?;
        }
        record.user = user;
        let revisions = Revisions { key: Revision(own.revision), owner: revision };
        let mut key = StoredKey::new(record, own.hash.hash()?).with_revisions(revisions);
        if let Some(upgraded) = own.upgraded {
            key = key.with_upgrade(upgraded.hash()?);
        }
        Some(match own.previous {
            Some((previous, upgraded)) => {
                let upgraded = match upgraded {
                    Some(upgraded) => Some(upgraded.hash()?),
                    None => None,
                };
                key.with_previous(previous.hash()?, upgraded)
            }
            None => key,
        })
    }

    /// Returns the id of the key.
    pub(super) fn id(&self) -> Option<KeyId> {
        // The fields before it are read only.
        let (_, id): (bool, PackedId) = postcard::from_bytes(&self.own).ok()?;
        Some(id.into())
    }

    /// Returns the revision of the key.
    pub(super) fn revision(&self) -> Option<Revision> {
        let own: OwnPart = postcard::from_bytes(&self.own).ok()?;
        Some(Revision(own.revision))
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

impl PackedId {
    fn of(integer: Option<i64>, id: &impl ToString) -> Self {
        integer.map_or_else(|| Self::Text(id.to_string()), Self::Integer)
    }
}

impl From<PackedId> for KeyId {
    fn from(id: PackedId) -> Self {
        match id {
            PackedId::Integer(id) => id.into(),
            PackedId::Text(id) => id.into(),
        }
    }
}

impl From<PackedId> for UserId {
    fn from(id: PackedId) -> Self {
        match id {
            PackedId::Integer(id) => id.into(),
            PackedId::Text(id) => id.into(),
        }
    }
}

impl Time {
    fn of(time: DateTime<Utc>) -> Self {
        Self(time.timestamp(), time.timestamp_subsec_nanos())
    }

    fn time(&self) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp(self.0, self.1)
    }

    /// Converts an optional time. The outer `None` means that the time is out of range.
    fn into_option(time: Option<Self>) -> Option<Option<DateTime<Utc>>> {
        match time {
            Some(time) => time.time().map(Some),
            None => Some(None),
        }
    }
}

impl PackedHash {
    fn of(hash: &KeyHash) -> Self {
        Self(hash.to_bytes())
    }

    fn hash(&self) -> Option<KeyHash> {
        KeyHash::from_bytes(&self.0)
    }
}
