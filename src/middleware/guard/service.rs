//! The service that applies a rule to requests that the auth layer has let in: [`Guard`].

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    context::AuthContext,
    denial::Denial,
    metering::Reservation,
    middleware::{
        body::ResponseBody,
        credential::RequestHead,
        discard::DiscardLimits,
        gated_call::{Decision, Gate, GatedCall},
        response::RateFields,
    },
};

/// Service of a [`RequireLayer`](crate::RequireLayer), a [`RateLimitLayer`](crate::RateLimitLayer) or a
/// [`BudgetLayer`](crate::middleware::BudgetLayer).
///
/// It applies its rule to the request's [`AuthContext`], and either
/// returns the response to the [`Denial`] or calls the inner service. An [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer) is
/// required around it, and formats the responses to its denials.
#[derive(Clone)]
pub struct Guard<S> {
    inner: S,
    rule: Arc<dyn Rule>,
}

/// Rule of a guard.
pub(crate) trait Rule: Send + Sync + 'static {
    /// Decides on a request by its context and head.
    fn decide(&self, caller: &AuthContext, head: &RequestHead<'_>) -> RuleDecision;

    /// Returns whether a request that the auth layer has let through without a key is denied. If not, it passes: the
    /// rule limits keys.
    fn requires_key(&self) -> bool;
}

/// Decision of a rule.
pub(crate) enum RuleDecision {
    Ready(Result<FollowUp, Denial>),
    /// The decision needs I/O.
    Pending(Decision<FollowUp>),
}

/// Follow-up for the response of a request that passes.
pub(crate) enum FollowUp {
    Nothing,
    /// Adds the rate limit fields to the response.
    RateLimit(RateFields),
    /// Charges the reservation when the response is there, or when the request is dropped after the inner service was
    /// called.
    Charge(Reservation),
}

impl<S> Guard<S> {
    pub(crate) fn new(inner: S, rule: Arc<dyn Rule>) -> Self {
        Self { inner, rule }
    }

    /// Returns a reference to the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns a mutable reference to the inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Consumes the guard and returns the inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, B, R> Service<Request<B>> for Guard<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    B: Body,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = GuardFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> GuardFuture<S, B> {
        let decision = match AuthContext::of(request.extensions()) {
            Ok(Some(caller)) => self.rule.decide(caller, &RequestHead::of(&request)),
            Ok(None) if self.rule.requires_key() => {
                RuleDecision::Ready(Err(Denial::MissingCredential))
            }
            Ok(None) => RuleDecision::Ready(Ok(FollowUp::Nothing)),
            Err(denial) => RuleDecision::Ready(Err(denial)),
        };
        let call = match decision {
            RuleDecision::Ready(Ok(follow_up)) => {
                GatedCall::inner(GuardGate::new(follow_up), self.inner.call(request))
            }
            RuleDecision::Ready(Err(denial)) => {
                // Drops the ready instance: it may hold a permit for the call, which will not come.
                drop(self.take_ready());
                GatedCall::denied(GuardGate::new(FollowUp::Nothing), denial, request)
            }
            RuleDecision::Pending(decision) => {
                // A permit must not be held during I/O: see `ApiKeyAuth`.
                let inner = self.inner.clone();
                drop(self.take_ready());
                GatedCall::deciding(GuardGate::new(FollowUp::Nothing), decision, request, inner)
            }
        };
        GuardFuture { call }
    }
}

impl<S: Clone> Guard<S> {
    /// Takes the instance that was polled ready, and leaves a clone, which was not polled.
    fn take_ready(&mut self) -> S {
        let clone = self.inner.clone();
        mem::replace(&mut self.inner, clone)
    }
}

/// Follow-up of a guard for one request.
pub(crate) struct GuardGate {
    follow_up: FollowUp,
    is_called: bool,
}

impl GuardGate {
    fn new(follow_up: FollowUp) -> Self {
        Self { follow_up, is_called: false }
    }
}

impl Gate for GuardGate {
    type Permission = FollowUp;

    fn admit<B>(&mut self, _: &mut Request<B>, follow_up: FollowUp) -> Result<(), Denial> {
        self.follow_up = follow_up;
        Ok(())
    }

    fn called(&mut self) {
        self.is_called = true;
    }

    fn finish<R>(&mut self, mut response: Response<R>) -> Response<ResponseBody<R>> {
        match mem::replace(&mut self.follow_up, FollowUp::Nothing) {
            FollowUp::Nothing => {}
            FollowUp::RateLimit(fields) => fields.write(response.headers_mut()),
            FollowUp::Charge(reservation) => drop(reservation),
        }
        response.map(ResponseBody::inner)
    }

    fn deny<R>(&self, denial: &Denial) -> Response<ResponseBody<R>> {
        denial.response().map(ResponseBody::denial)
    }

    fn discard_limits<B>(&self, request: &Request<B>) -> DiscardLimits {
        DiscardLimits::of(request)
    }
}

/// Settles the reservation with 0 if the request is dropped before the inner service was called.
impl Drop for GuardGate {
    fn drop(&mut self) {
        if !self.is_called
            && let FollowUp::Charge(reservation) =
                mem::replace(&mut self.follow_up, FollowUp::Nothing)
        {
            reservation.settle(0);
        }
    }
}

pin_project! {
    /// Response future of a [`Guard`].
    pub struct GuardFuture<S, B>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        call: GatedCall<S, B, GuardGate>,
    }
}

impl<S, B, R> Future for GuardFuture<S, B>
where
    S: Service<Request<B>, Response = Response<R>>,
    B: Body,
{
    type Output = Result<Response<ResponseBody<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.project().call.poll(cx)
    }
}

impl<S: fmt::Debug> fmt::Debug for Guard<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<S, B> fmt::Debug for GuardFuture<S, B>
where
    S: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardFuture").finish_non_exhaustive()
    }
}
