//! What a handler sees of who calls: [`AuthContext`].

mod recheck;

use std::{fmt, net::IpAddr, sync::Arc};

use chrono::{DateTime, Utc};
use http::{Extensions, Method};
use serde_json::Value;

pub(crate) use self::recheck::{Engine, RecheckFuture, Verified};
use crate::{
    coherence::CoherenceTag,
    denial::{Denial, Forbidden},
    metering::{Reservation, Usage, UsageCounter},
    policy,
    record::{AllowedNetwork, EndpointRule, KeyRecord, RateLimits, User},
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
    /// For another check. Last, because a hit does not read it; `None` with the provenance.
    verified: Option<Verified>,
}

/// Where a context comes from, and what a cache has to know to serve it again.
pub(crate) struct Provenance {
    pub(crate) origin: Origin,
    pub(crate) tag: CoherenceTag,
    /// `None` if nothing is recorded.
    pub(crate) counter: Option<Arc<UsageCounter>>,
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
    pub(crate) fn new(record: KeyRecord, provenance: Provenance, verified: Verified) -> Self {
        Self::make(record, Some(provenance), Some(verified))
    }

    /// A context for the tests of a handler, made without a key. No layer takes it for its own.
    pub fn unverified(record: KeyRecord) -> Self {
        Self::make(record, None, None)
    }

    fn make(record: KeyRecord, provenance: Option<Provenance>, verified: Option<Verified>) -> Self {
        let is_restricted = !(record.allowed_ips.is_empty() && record.allowed_endpoints.is_empty());
        Self(Arc::new(Inner { is_restricted, provenance, record, verified }))
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

    /// Whether the key has this scope. One that it holds may end in a wildcard: `models:*` grants every scope
    /// that begins with `models:` and goes on, `*` every one; the asterisk stands alone or behind a `:`, `.`
    /// or `/`, and anywhere else is a character like others. Compared byte by byte.
    pub fn has_scope(&self, scope: &str) -> bool {
        self.scopes().iter().any(|held| policy::grants(held, scope))
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

    /// Adds what was used on behalf of the key, beside the request itself, which is counted already. An addition
    /// to a counter: it waits for nothing, may be made many times, and also after the response has begun. It
    /// reaches the store within a second (see [`AuthenticatorBuilder::usage_interval`]); sums saturate.
    ///
    /// [`AuthenticatorBuilder::usage_interval`]: crate::AuthenticatorBuilder::usage_interval
    #[inline]
    pub fn record_usage(&self, usage: Usage) {
        if let Some(counter) = self.counter() {
            counter.add(usage);
        }
    }

    /// Holds `estimate` micro-cents of the key's budget for work to come, before it begins; settle what comes back
    /// with what the work has cost. With a lease in hand this waits for nothing; otherwise for the store. A key
    /// without a budget holds nothing, and what is settled is counted.
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
    /// 429 if less is left in the period, with the time at which it ends; 503 if there is no lease in hand and
    /// the store can't be asked, or does not answer because another session keeps the key's row locked (after 2 s
    /// with the defaults of `PostgresStore`). `Unsupported`, 500, if the store has no budget leases
    /// ([`KeyStore::lease`](crate::KeyStore::lease)) or does not record usage, or the authenticator was built with
    /// [`without_usage`](crate::AuthenticatorBuilder::without_usage); the first one is logged as a warning.
    pub async fn reserve(&self, estimate: u64) -> Result<Reservation, Denial> {
        if let Some(reservation) = self.reserve_now(estimate) {
            return Ok(reservation);
        }
        let recorder = Arc::clone(self.engine()?.recorder());
        recorder.reserve(&self.key().id, estimate, self.counter()).await
    }

    /// The same from a lease in hand, without waiting.
    pub(crate) fn reserve_now(&self, estimate: u64) -> Option<Reservation> {
        // Nobody has a budget of a test's own.
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
            counter.count_request();
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

    /// Requires at least one of these scopes; none of them lets nobody through.
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

    /// Requires that the key [may name a model](Self::can_access_model).
    ///
    /// # Errors
    ///
    /// 403.
    pub fn require_model(&self, model: &str) -> Result<(), Denial> {
        required(self.can_access_model(model), || Forbidden::Model(model.to_owned()))
    }

    /// Returns the context in the extensions of a request, for handlers that have no extractor: tonic, hyper.
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
    /// 401 behind a layer that let the request through without a key, and 500 if there is no layer at all; the log
    /// then names the one to add.
    pub fn from_extensions(extensions: &Extensions) -> Result<&Self, Denial> {
        let caller = Self::of(extensions).inspect_err(Denial::log)?;
        caller.ok_or(Denial::MissingCredential)
    }

    /// The context in the extensions of a request; `None` behind a layer that let the request through without
    /// a key.
    ///
    /// # Errors
    ///
    /// `LayerMissing` if no layer is around at all; the log says so.
    pub(crate) fn of(extensions: &Extensions) -> Result<Option<&Self>, Denial> {
        match extensions.get() {
            Some(caller) => Ok(Some(caller)),
            None if extensions.get::<LetThrough>().is_some() => Ok(None),
            None => Err(Denial::LayerMissing),
        }
    }

    /// Whether key and owner are active and the key has not expired at `time`.
    pub fn is_valid_at(&self, time: DateTime<Utc>) -> bool {
        policy::validity(&self.0.record, time).is_ok()
    }
}

fn required(is_met: bool, missing: impl FnOnce() -> Forbidden) -> Result<(), Denial> {
    if is_met { Ok(()) } else { Err(missing().into()) }
}

/// As a scope list is written (RFC 6749 §3.3).
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

/// In a request's extensions: a layer let it pass without a key, as its options say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LetThrough;
