//! What a handler sees of who calls: [`AuthContext`].

use std::{fmt, net::IpAddr, sync::Arc};

use chrono::{DateTime, Utc};
use http::Method;
use serde_json::Value;

use crate::{
    cache::Stamp,
    key::HashFingerprint,
    policy::{self, AllowedNetwork, EndpointRule},
    record::{KeyRecord, RateLimits, User},
};

/// Who calls, and what the key allows. The layer puts it into the extensions of each request that it
/// lets through; cheap to clone.
///
/// In axum it is an extractor; elsewhere:
///
/// ```
/// use tower_api_key::AuthContext;
///
/// fn handler<B>(request: http::Request<B>) -> String {
///     let Some(caller) = request.extensions().get::<AuthContext>() else { return String::new() };
///     caller.user().email.clone()
/// }
/// ```
///
/// It never holds the key itself.
#[derive(Clone)]
pub struct AuthContext(Arc<Inner>);

/// Its fields in this order: a hit reads what stands beside the reference counts and nothing else.
#[repr(C)]
struct Inner {
    /// Whether there are rules for addresses or endpoints.
    is_restricted: bool,
    /// `None` for a context that no authenticator made.
    provenance: Option<Provenance>,
    record: KeyRecord,
}

/// Where a context comes from, and what a cache has to know to serve it again.
pub(crate) struct Provenance {
    pub(crate) origin: Origin,
    pub(crate) stamp: Stamp,
    /// Of the hash that the key has matched.
    pub(crate) proof: Option<HashFingerprint>,
}

/// Tells one authenticator from another.
#[derive(Clone, Default)]
pub(crate) struct Origin(Arc<()>);

impl PartialEq for Origin {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl AuthContext {
    pub(crate) fn new(record: KeyRecord, provenance: Provenance) -> Self {
        Self::of(record, Some(provenance))
    }

    /// A context for the tests of a handler, made without a key. No layer takes it for its own.
    pub fn unverified(record: KeyRecord) -> Self {
        Self::of(record, None)
    }

    fn of(record: KeyRecord, provenance: Option<Provenance>) -> Self {
        let is_restricted = !(record.allowed_ips.is_empty() && record.allowed_endpoints.is_empty());
        Self(Arc::new(Inner { is_restricted, provenance, record }))
    }

    /// Whether it depends on the request whether the key may be used.
    pub(crate) fn is_restricted(&self) -> bool {
        self.0.is_restricted
    }

    pub(crate) fn provenance(&self) -> Option<&Provenance> {
        self.0.provenance.as_ref()
    }

    pub(crate) fn is_from(&self, origin: &Origin) -> bool {
        self.provenance().is_some_and(|it| it.origin == *origin)
    }

    /// The owner of the key: id, e-mail, role.
    pub fn user(&self) -> &User {
        &self.0.record.user
    }

    /// The key: id, name, prefix, expiry, budget, usage totals as of the read.
    pub fn key(&self) -> &KeyRecord {
        &self.0.record
    }

    /// The scopes of the key.
    pub fn scopes(&self) -> &[String] {
        &self.0.record.scopes
    }

    /// The permissions of the key.
    pub fn permissions(&self) -> &[String] {
        &self.0.record.permissions
    }

    /// How often the key may be used.
    pub fn rate_limits(&self) -> RateLimits {
        self.0.record.rate_limits
    }

    /// The models that the key may name; empty allows all.
    pub fn allowed_models(&self) -> &[String] {
        &self.0.record.allowed_models
    }

    /// The endpoints that the key may call; empty allows all.
    pub fn allowed_endpoints(&self) -> &[EndpointRule] {
        &self.0.record.allowed_endpoints
    }

    /// The networks that the key may be used from; empty allows all.
    pub fn allowed_ips(&self) -> &[AllowedNetwork] {
        &self.0.record.allowed_ips
    }

    /// What the team stored along with the key; `null` if nothing.
    pub fn metadata(&self) -> &Value {
        &self.0.record.metadata
    }

    /// Whether the key has exactly this scope.
    pub fn has_scope(&self, scope: &str) -> bool {
        self.scopes().iter().any(|held| held == scope)
    }

    /// Whether the key has exactly this permission.
    pub fn has_permission(&self, permission: &str) -> bool {
        self.permissions().iter().any(|held| held == permission)
    }

    /// Whether the key may name this model: one of the list, or any if the list is empty.
    pub fn can_access_model(&self, model: &str) -> bool {
        policy::allowed(self.allowed_models(), |allowed| allowed == model)
    }

    /// Whether the key may call this endpoint. The layer has asked this for the request's own.
    pub fn can_access_endpoint(&self, method: &Method, path: &str) -> bool {
        policy::allowed(self.allowed_endpoints(), |rule| rule.matches(method, path))
    }

    /// Whether the key may be used from this address. The layer has asked this for the request's own.
    pub fn can_access_from(&self, address: IpAddr) -> bool {
        policy::allowed(self.allowed_ips(), |network| network.contains(address))
    }

    /// Whether key and owner are active and the key has not expired at `time`.
    pub fn is_valid_at(&self, time: DateTime<Utc>) -> bool {
        policy::validity(&self.0.record, time).is_ok()
    }
}

impl fmt::Debug for AuthContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthContext")
            .field("key", &self.0.record.id)
            .field("prefix", &self.0.record.prefix)
            .field("user", &self.0.record.user.id)
            .finish_non_exhaustive()
    }
}

/// In a request's extensions: a layer let it pass without a key, as its options say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LetThrough;
