//! The authenticated caller, as handlers see it: [`AuthContext`].

mod recheck;

use std::{fmt, net::IpAddr, sync::Arc};

use chrono::{DateTime, Utc};
use http::{Extensions, Method};
use serde_json::Value;

pub(crate) use self::recheck::{Engine, RecheckFuture, Verified};
use crate::{
    denial::{Denial, Forbidden},
    metering::{Reservation, Usage, UsageCounter},
    policy,
    record::{AllowedNetwork, EndpointRule, KeyRecord, RateLimits, Secret, User},
};

/// The authenticated caller and what the key allows.
///
/// The layer inserts it into the extensions of each request that it lets in. Cheap to clone.
///
/// In axum it is an extractor. Elsewhere, read it from the extensions:
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
/// It never contains the key itself.
#[derive(Clone)]
pub struct AuthContext(Arc<ContextInner>);

/// The order of the fields is fixed, so that the fields that a cache hit reads are next to the reference counts.
#[repr(C)]
struct ContextInner {
    /// Whether the key has rules for addresses or endpoints.
    is_restricted: bool,
    /// The secret that was presented.
    secret: Secret,
    /// `None` for a context that was not created by an authenticator.
    provenance: Option<Provenance>,
    record: KeyRecord,
    /// Used for a recheck. Last, because a hit does not read it. `None` if `provenance` is `None`.
    verified: Option<Verified>,
}

/// Origin of a context.
pub(crate) struct Provenance {
    pub(crate) origin: Origin,
    /// `None` if no usage is recorded.
    pub(crate) counter: Option<Arc<UsageCounter>>,
}

/// Identity of an authenticator.
#[derive(Clone, Default)]
pub(crate) struct Origin(Arc<()>);

impl PartialEq for Origin {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl AuthContext {
    pub(crate) fn new(
        record: KeyRecord,
        secret: Secret,
        provenance: Provenance,
        verified: Verified,
    ) -> Self {
        Self::with_parts(record, secret, Some(provenance), Some(verified))
    }

    /// Creates a context without a key, for tests of handlers. No layer accepts it as its own.
    pub fn unverified(record: KeyRecord) -> Self {
        Self::with_parts(record, Secret::Current, None, None)
    }

    fn with_parts(
        record: KeyRecord,
        secret: Secret,
        provenance: Option<Provenance>,
        verified: Option<Verified>,
    ) -> Self {
        let is_restricted = !(record.allowed_ips.is_empty() && record.allowed_endpoints.is_empty());
        Self(Arc::new(ContextInner { is_restricted, provenance, record, secret, verified }))
    }

    /// Returns whether the key has rules that depend on the request.
    pub(crate) fn is_restricted(&self) -> bool {
        self.0.is_restricted
    }

    pub(crate) fn provenance(&self) -> Option<&Provenance> {
        self.0.provenance.as_ref()
    }

    pub(crate) fn is_from(&self, origin: &Origin) -> bool {
        self.provenance().is_some_and(|it| it.origin == *origin)
    }

    /// Returns the owner of the key: id, e-mail, role.
    pub fn user(&self) -> &User {
        &self.0.record.user
    }

    /// Returns the key: id, name, lookup id, expiry, budget, and the usage totals at the time of the read.
    pub fn key(&self) -> &KeyRecord {
        &self.0.record
    }

    /// Returns the secret that was presented: the current one, or the previous one in its grace period. A service can
    /// warn the holder of a key whose previous secret is still in use.
    pub fn secret(&self) -> Secret {
        self.0.secret
    }

    /// Returns the time from which the presented secret is rejected: the expiry of the key or, for a previous secret,
    /// the end of the grace period if that is earlier. `None` means never.
    pub fn valid_until(&self) -> Option<DateTime<Utc>> {
        let grace = self.key().grace.as_ref().map(|grace| grace.ends_at);
        let grace_end = grace.filter(|_| self.secret() == Secret::Previous);
        self.key().expires_at.into_iter().chain(grace_end).min()
    }

    /// Returns the scopes of the key.
    pub fn scopes(&self) -> &[String] {
        &self.0.record.scopes
    }

    /// Returns the permissions of the key.
    pub fn permissions(&self) -> &[String] {
        &self.0.record.permissions
    }

    /// Returns the rate limits of the key, in requests per minute, hour and day.
    pub fn rate_limits(&self) -> RateLimits {
        self.0.record.rate_limits
    }

    /// Returns the models that the key may use; empty allows all.
    pub fn allowed_models(&self) -> &[String] {
        &self.0.record.allowed_models
    }

    /// Returns the endpoints that the key may call; empty allows all.
    pub fn allowed_endpoints(&self) -> &[EndpointRule] {
        &self.0.record.allowed_endpoints
    }

    /// Returns the networks from which the key may be used; empty allows all.
    pub fn allowed_ips(&self) -> &[AllowedNetwork] {
        &self.0.record.allowed_ips
    }

    /// Returns the metadata that is stored with the key; `null` if there is none.
    pub fn metadata(&self) -> &Value {
        &self.0.record.metadata
    }

    /// Returns whether the key has this scope. A scope of the key may end in a wildcard: `models:*` grants every
    /// longer scope that begins with `models:`, and `*` grants every scope. The asterisk is a wildcard only alone or
    /// after a `:`, `.` or `/`; elsewhere it is an ordinary character. Scopes are compared byte by byte.
    pub fn has_scope(&self, scope: &str) -> bool {
        self.scopes().iter().any(|held| policy::grants(held, scope))
    }

    /// Returns whether the key has exactly this permission.
    pub fn has_permission(&self, permission: &str) -> bool {
        self.permissions().iter().any(|held| held == permission)
    }

    /// Returns whether the key may use this model: the model is in the list, or the list is empty.
    pub fn can_access_model(&self, model: &str) -> bool {
        policy::allowed(self.allowed_models(), |allowed| allowed == model)
    }

    /// Returns whether the key may call this endpoint. The layer has checked this for the request's own endpoint.
    pub fn can_access_endpoint(&self, method: &Method, path: &str) -> bool {
        policy::allowed(self.allowed_endpoints(), |rule| rule.matches(method, path))
    }

    /// Returns whether the key may be used from this address. The layer has checked this for the request's own
    /// address.
    pub fn can_access_from(&self, address: IpAddr) -> bool {
        policy::allowed(self.allowed_ips(), |network| network.contains(address))
    }

    /// Adds usage to the key, beside the request itself, which is already counted. This adds to a counter in memory:
    /// it does not wait, and can be called many times, also after the response has begun. The usage is written to the
    /// store within a second (see [`AuthenticatorBuilder::usage_interval`]). Sums saturate.
    ///
    /// [`AuthenticatorBuilder::usage_interval`]: crate::authenticator::AuthenticatorBuilder::usage_interval
    #[inline]
    pub fn record_usage(&self, usage: Usage) {
        if let Some(counter) = self.counter() {
            counter.add(usage);
        }
    }

    /// Holds `estimate` micro-cents of the key's budget before work begins. Settle the returned reservation with the
    /// actual cost. If this node has a sufficient lease, this does not wait; otherwise it waits for the store. For a
    /// key without a budget nothing is held, and the settled cost is counted.
    ///
    /// ```
    /// use tower_api_key::{AuthContext, Denial};
    ///
    /// async fn complete(caller: AuthContext, prompt: String) -> Result<String, Denial> {
    ///     let reservation = caller.reserve(2_000_000).await?;
    ///     let (answer, cost) = ask_the_model(prompt).await;
    ///     reservation.settle(cost);
    ///     Ok(answer)
    /// }
    /// # async fn ask_the_model(prompt: String) -> (String, u64) { (prompt, 1) }
    /// ```
    ///
    /// # Errors
    ///
    /// 429 if the remaining budget of the period is too small, with the time at which the period ends. 503 if this node
    /// has no sufficient lease and the store is unavailable, or does not answer because another session has locked the
    /// key's row (after 2 s with the defaults of `PostgresStore`). `Unsupported` (500) if the store has no budget
    /// leases ([`KeyStore::lease`](crate::store::KeyStore::lease)) or does not record usage, or the authenticator was
    /// built with [`without_usage`](crate::authenticator::AuthenticatorBuilder::without_usage). The first such error is
    /// logged as a warning.
    pub async fn reserve(&self, estimate: u64) -> Result<Reservation, Denial> {
        if let Some(reservation) = self.reserve_now(estimate) {
            return Ok(reservation);
        }
        let recorder = Arc::clone(self.engine()?.recorder());
        recorder.reserve(&self.key().id, estimate, self.counter()).await
    }

    /// Holds `estimate` from the lease of this node, without waiting.
    pub(crate) fn reserve_now(&self, estimate: u64) -> Option<Reservation> {
        // A context that was created for a test has no budget.
        if self.key().budget.is_none() || self.provenance().is_none() {
            return Some(Reservation::free(estimate, self.counter().cloned()));
        }
        let counter = self.counter()?;
        counter.recorder()?.reserve_now(&self.key().id, estimate, counter)
    }

    /// Counts a request that was let in.
    #[inline]
    pub(crate) fn count_request(&self) {
        if let Some(counter) = self.counter() {
            counter.count_request(self.secret());
        }
        if self.secret() == Secret::Previous
            && let Ok(engine) = self.engine()
        {
            engine.note_previous_secret(self.key());
        }
    }

    fn counter(&self) -> Option<&Arc<UsageCounter>> {
        self.provenance()?.counter.as_ref()
    }

    /// Requires [a scope](Self::has_scope).
    ///
    /// ```
    /// use tower_api_key::{AuthContext, Denial};
    ///
    /// fn list_models(caller: &AuthContext) -> Result<Vec<String>, Denial> {
    ///     caller.require_scope("models:read")?;
    ///     Ok(caller.allowed_models().to_vec())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// 403, with the scope in the challenge (RFC 6750 §3.1).
    pub fn require_scope(&self, scope: &str) -> Result<(), Denial> {
        required(self.has_scope(scope), || Forbidden::Scope(scope.to_owned()))
    }

    /// Requires every one of these scopes.
    ///
    /// # Errors
    ///
    /// 403, with all of them in the challenge.
    pub fn require_all_scopes(&self, scopes: &[impl AsRef<str>]) -> Result<(), Denial> {
        let has_all = scopes.iter().all(|scope| self.has_scope(scope.as_ref()));
        required(has_all, || Forbidden::Scope(listed(scopes)))
    }

    /// Requires at least one of these scopes. An empty list denies every request.
    ///
    /// # Errors
    ///
    /// 403, with all of them in the challenge.
    pub fn require_any_scope(&self, scopes: &[impl AsRef<str>]) -> Result<(), Denial> {
        let has_one = scopes.iter().any(|scope| self.has_scope(scope.as_ref()));
        required(has_one, || Forbidden::Scope(listed(scopes)))
    }

    /// Requires a permission, by exactly this name.
    ///
    /// # Errors
    ///
    /// 403.
    pub fn require_permission(&self, permission: &str) -> Result<(), Denial> {
        let has_it = self.has_permission(permission);
        required(has_it, || Forbidden::Permission(permission.to_owned()))
    }

    /// Requires the owner to have a role, by exactly this name.
    ///
    /// # Errors
    ///
    /// 403.
    pub fn require_role(&self, role: &str) -> Result<(), Denial> {
        required(self.user().role == role, || Forbidden::Role(role.to_owned()))
    }

    /// Requires that the key [may use a model](Self::can_access_model).
    ///
    /// # Errors
    ///
    /// 403.
    pub fn require_model(&self, model: &str) -> Result<(), Denial> {
        required(self.can_access_model(model), || Forbidden::Model(model.to_owned()))
    }

    /// Returns the context in the extensions of a request, for frameworks without an extractor: tonic, hyper.
    ///
    /// ```
    /// use tower_api_key::{AuthContext, Denial};
    ///
    /// fn email<B>(request: &http::Request<B>) -> Result<String, Denial> {
    ///     let caller = AuthContext::from_extensions(request.extensions())?;
    ///     Ok(caller.user().email.clone())
    /// }
    /// ```
    ///
    /// # Errors
    ///
    /// 401 behind a layer that let the request through without a key, and 500 if no auth layer wraps the handler. In
    /// the second case the log message names the layer to add.
    pub fn from_extensions(extensions: &Extensions) -> Result<&Self, Denial> {
        let caller = Self::of(extensions).inspect_err(Denial::log)?;
        caller.ok_or(Denial::MissingCredential)
    }

    /// Returns the context in the extensions of a request; `None` behind a layer that let the request through without
    /// a key.
    ///
    /// # Errors
    ///
    /// `LayerMissing` if no auth layer wraps the handler.
    pub(crate) fn of(extensions: &Extensions) -> Result<Option<&Self>, Denial> {
        match extensions.get() {
            Some(caller) => Ok(Some(caller)),
            None if extensions.get::<LetThrough>().is_some() => Ok(None),
            None => Err(Denial::LayerMissing),
        }
    }

    /// Returns whether the key and its owner are active and the key has not expired at `time`.
    pub fn is_valid_at(&self, time: DateTime<Utc>) -> bool {
        policy::validity(&self.0.record, self.0.secret, time).is_ok()
    }
}

fn required(is_met: bool, missing: impl FnOnce() -> Forbidden) -> Result<(), Denial> {
    if is_met { Ok(()) } else { Err(missing().into()) }
}

/// Formats scopes as a scope list (RFC 6749 §3.3).
fn listed(scopes: &[impl AsRef<str>]) -> String {
    scopes.iter().map(AsRef::as_ref).collect::<Vec<_>>().join(" ")
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

/// Extension of a request that a layer let through without a key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LetThrough;
