//! Enforces rate limits: [`RateLimitLayer`].

use std::{fmt, future::Future, sync::Arc};

use tower_layer::Layer;

use super::service::{FollowUp, Guard, Rule, RuleDecision};
use crate::{
    context::AuthContext,
    denial::Denial,
    error::StoreError,
    middleware::credential::RequestHead,
    rate_limit::RateLimiter,
    record::{KeyId, Quota, RateLimits},
};

/// Enforces the rate limits of the request's key.
///
/// A request that exceeds a limit in its [`AuthContext`] is answered with 429 and `Retry-After` (gRPC:
/// `RESOURCE_EXHAUSTED`). The response fields `RateLimit` and `RateLimit-Policy` contain the
/// remaining requests (draft-ietf-httpapi-ratelimit-headers-10). Use it behind an
/// [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer). Requests pass if their key is unlimited or has no limits, or if the
/// auth layer lets them through without a key.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore, RateLimitLayer, rate_limit::LocalRateLimiter};
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
    /// Creates a layer that enforces limits with `limiter`. Layers that share their counters share one limiter, or
    /// clones of one.
    pub fn new(limiter: impl RateLimiter) -> Self {
        Self(Arc::new(Limit(Arc::new(limiter))))
    }
}

struct Limit<L>(Arc<L>);

impl<L: RateLimiter> Rule for Limit<L> {
    fn decide(&self, caller: &AuthContext, _: &RequestHead<'_>) -> RuleDecision {
        let limits = caller.rate_limits();
        if caller.key().is_unlimited || limits == RateLimits::default() {
            return RuleDecision::Ready(Ok(FollowUp::Nothing));
        }
        let key = &caller.key().id;
        if let Some(quota) = self.0.count_now(key, limits) {
            return RuleDecision::Ready(decision(&quota));
        }
        let (limiter, key) = (Arc::clone(&self.0), key.clone());
        RuleDecision::Pending(Box::pin(
            async move { decision(&limiter.count(&key, limits).await?) },
        ))
    }

    fn requires_key(&self) -> bool {
        false
    }
}

fn decision(quota: &Quota) -> Result<FollowUp, Denial> {
    if quota.is_allowed() {
        Ok(quota.fields().map_or(FollowUp::Nothing, FollowUp::RateLimit))
    } else {
        Err(Denial::RateLimited((*quota).into()))
    }
}

/// Shares one limiter between layers.
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
