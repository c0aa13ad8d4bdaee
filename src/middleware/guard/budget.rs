//! Charges a fixed cost for each request: [`BudgetLayer`].

use std::{fmt, sync::Arc};

use tower_layer::Layer;

use super::service::{FollowUp, Guard, Rule, RuleDecision};
use crate::{context::AuthContext, middleware::credential::RequestHead};

/// Charges a fixed cost for each request, within the key's budget.
///
/// A request that exceeds the budget is answered with 429 and the time at which the period ends (gRPC:
/// `RESOURCE_EXHAUSTED`). Use it behind an [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer). A service whose cost depends on
/// the work calls [`AuthContext::reserve`] instead. Requests that the auth layer lets through without a key pass and
/// cost nothing.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore, middleware::BudgetLayer};
///
/// // 200,000 micro-cents are a fifth of a cent.
/// let service = ServiceBuilder::new()
///     .layer(ApiKeyAuthLayer::new(MemoryStore::new()))
///     .layer(BudgetLayer::new(200_000))
///     .service_fn(|_request: http::Request<String>| async {
///         Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
///     });
/// ```
#[derive(Clone)]
pub struct BudgetLayer(Arc<dyn Rule>);

impl BudgetLayer {
    /// Creates a layer that charges `cost` micro-cents a request.
    pub fn new(cost: u64) -> Self {
        Self(Arc::new(FixedCost(cost)))
    }
}

struct FixedCost(u64);

impl Rule for FixedCost {
    fn decide(&self, caller: &AuthContext, _: &RequestHead<'_>) -> RuleDecision {
        if let Some(reservation) = caller.reserve_now(self.0) {
            return RuleDecision::Ready(Ok(FollowUp::Charge(reservation)));
        }
        let (caller, cost) = (caller.clone(), self.0);
        RuleDecision::Pending(Box::pin(
            async move { Ok(FollowUp::Charge(caller.reserve(cost).await?)) },
        ))
    }

    fn requires_key(&self) -> bool {
        false
    }
}

impl<S> Layer<S> for BudgetLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard::new(inner, Arc::clone(&self.0))
    }
}

impl fmt::Debug for BudgetLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BudgetLayer").finish_non_exhaustive()
    }
}
