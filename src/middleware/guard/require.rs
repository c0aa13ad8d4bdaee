//! Enforces rules about what a key may do: [`RequireLayer`].

use std::{fmt, sync::Arc};

use tower_layer::Layer;

use super::service::{FollowUp, Guard, Rule, RuleDecision};
use crate::{context::AuthContext, denial::Denial, middleware::credential::RequestHead};

/// Lets requests through whose key meets the requirement, and answers the others with 403.
///
/// Use it behind an [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer): around a router, a route, or a tonic service. A request
/// without a key is answered with 401.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore, RequireLayer};
///
/// let service = ServiceBuilder::new()
///     .layer(ApiKeyAuthLayer::new(MemoryStore::new()))
///     .layer(RequireLayer::scope("models:read"))
///     .layer(RequireLayer::role("admin"))
///     .service_fn(|_request: http::Request<String>| async {
///         Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
///     });
/// ```
///
/// [`AuthContext`] has the same checks for handlers: `caller.require_scope("models:read")?`.
#[derive(Clone)]
pub struct RequireLayer(Arc<dyn Rule>);

impl RequireLayer {
    /// Requires a scope; see [`AuthContext::has_scope`] for wildcards.
    pub fn scope(scope: impl Into<String>) -> Self {
        let scope = scope.into();
        Self::new(move |caller, _| caller.require_scope(&scope))
    }

    /// Requires every one of these scopes.
    pub fn all_scopes<T: Into<String>>(scopes: impl IntoIterator<Item = T>) -> Self {
        let scopes: Vec<String> = scopes.into_iter().map(Into::into).collect();
        Self::new(move |caller, _| caller.require_all_scopes(&scopes))
    }

    /// Requires at least one of these scopes. An empty list denies every request.
    pub fn any_scope<T: Into<String>>(scopes: impl IntoIterator<Item = T>) -> Self {
        let scopes: Vec<String> = scopes.into_iter().map(Into::into).collect();
        Self::new(move |caller, _| caller.require_any_scope(&scopes))
    }

    /// Requires a permission.
    pub fn permission(permission: impl Into<String>) -> Self {
        let permission = permission.into();
        Self::new(move |caller, _| caller.require_permission(&permission))
    }

    /// Requires the owner of the key to have a role.
    pub fn role(role: impl Into<String>) -> Self {
        let role = role.into();
        Self::new(move |caller, _| caller.require_role(&role))
    }

    /// Requires a custom rule.
    ///
    /// ```
    /// use tower_api_key::{RequireLayer, denial::Forbidden};
    ///
    /// let own_tenant = RequireLayer::new(|caller, head| {
    ///     let tenant = caller.metadata()["tenant"].as_str().unwrap_or_default();
    ///     let is_own = head.uri().path().split('/').nth(1) == Some(tenant);
    ///     if is_own { Ok(()) } else { Err(Forbidden::Endpoint.into()) }
    /// });
    /// ```
    pub fn new(
        rule: impl Fn(&AuthContext, &RequestHead<'_>) -> Result<(), Denial> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(Closure(rule)))
    }
}

struct Closure<F>(F);

impl<F> Rule for Closure<F>
where
    F: Fn(&AuthContext, &RequestHead<'_>) -> Result<(), Denial> + Send + Sync + 'static,
{
    fn decide(&self, caller: &AuthContext, head: &RequestHead<'_>) -> RuleDecision {
        RuleDecision::Ready((self.0)(caller, head).map(|()| FollowUp::Nothing))
    }

    fn requires_key(&self) -> bool {
        true
    }
}

impl<S> Layer<S> for RequireLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard::new(inner, Arc::clone(&self.0))
    }
}

impl fmt::Debug for RequireLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequireLayer").finish_non_exhaustive()
    }
}
