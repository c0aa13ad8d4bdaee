//! Rate limits as a layer: [`RateLimitLayer`].

use std::{fmt, future::Future, sync::Arc};

use tower_layer::Layer;

use super::service::{Guard, Pass, Rule, Verdict};
use crate::{
    context::AuthContext,
    denial::Denial,
    error::StoreError,
    middleware::credential::RequestHead,
    rate_limit::RateLimiter,
    record::{KeyId, Quota, RateLimits},
};

/// Keeps the rate limits that stand in the request's [`AuthContext`]. A request past one of them is answered
/// with 429 and `Retry-After` (gRPC: `RESOURCE_EXHAUSTED`); responses say how much is left in the fields
/// `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10). It belongs behind an
/// [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer). Keys that are unlimited, or have no limits, pass, and so do requests that
/// it lets through without a key.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_api_key::{ApiKeyAuthLayer, LocalRateLimiter, MemoryStore, RateLimitLayer};
///
/// let service = ServiceBuilder::new()
///     .layer(ApiKeyAuthLayer::new(MemoryStore::new()))
///     .layer(RateLimitLayer::new(LocalRateLimiter::new()))
///     .service_fn(|_request: http::Request<String>| async {
///         Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
///     });
/// ```
#[derive(Clone)]
pub struct RateLimitLayer(Arc<dyn Rule>);

impl RateLimitLayer {
    /// Keeps limits by what `limiter` counts. Layers that are to count together share one, or clones of one.
    pub fn new(limiter: impl RateLimiter) -> Self {
        Self(Arc::new(Limit(Arc::new(limiter))))
    }
}

struct Limit<L>(Arc<L>);

impl<L: RateLimiter> Rule for Limit<L> {
    fn judge(&self, caller: &AuthContext, _: &RequestHead<'_>) -> Verdict {
        let limits = caller.rate_limits();
        if caller.key().is_unlimited || limits == RateLimits::default() {
            return Verdict::Known(Ok(Pass::Nothing));
        }
        let key = &caller.key().id;
        if let Some(quota) = self.0.count_now(key, limits) {
            return Verdict::Known(outcome(&quota));
        }
        let (limiter, key) = (Arc::clone(&self.0), key.clone());
        Verdict::Later(Box::pin(async move { outcome(&limiter.count(&key, limits).await?) }))
    }

    fn requires_key(&self) -> bool {
        false
    }
}

fn outcome(quota: &Quota) -> Result<Pass, Denial> {
    if quota.is_allowed() {
        Ok(quota.fields().map_or(Pass::Nothing, Pass::Limited))
    } else {
        Err(Denial::RateLimited((*quota).into()))
    }
}

/// One limiter for many layers.
impl<L: RateLimiter> RateLimiter for Arc<L> {
    fn count(
        &self,
        key: &KeyId,
        limits: RateLimits,
    ) -> impl Future<Output = Result<Quota, StoreError>> + Send {
        L::count(self, key, limits)
    }

    fn count_now(&self, key: &KeyId, limits: RateLimits) -> Option<Quota> {
        L::count_now(self, key, limits)
    }
}

impl<S> Layer<S> for RateLimitLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard::new(inner, Arc::clone(&self.0))
    }
}

impl fmt::Debug for RateLimitLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimitLayer").finish_non_exhaustive()
    }
}
