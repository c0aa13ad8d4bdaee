//! What applies a rule to requests that the auth layer has let in: [`Guard`].

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

/// The service of a [`RequireLayer`](crate::RequireLayer), a [`RateLimitLayer`](crate::RateLimitLayer) or a
/// [`BudgetLayer`](crate::BudgetLayer): it applies its rule to the request's [`AuthContext`], and answers with
/// the [`Denial`] or calls the inner service. An [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer) has to be around it,
/// and gives its refusals their shape.
#[derive(Clone)]
pub struct Guard<S> {
    inner: S,
    rule: Arc<dyn Rule>,
}

/// The rule of a guard.
pub(crate) trait Rule: Send + Sync + 'static {
    fn judge(&self, caller: &AuthContext, head: &RequestHead<'_>) -> Verdict;

    /// Whether a request is denied that the auth layer has let through without a key. If not, it passes: the rule
    /// is about a key's limits.
    fn requires_key(&self) -> bool;
}

/// The outcome of a rule.
pub(crate) enum Verdict {
    Known(Result<Pass, Denial>),
    /// It takes I/O.
    Later(Decision<Pass>),
}

/// What is to be done with the response of a request that may pass.
pub(crate) enum Pass {
    Nothing,
    /// Its fields say how much is left.
    Limited(RateFields),
    /// It is charged when the response is there, or the request is given up.
    Reserved(Reservation),
}

impl<S> Guard<S> {
    pub(crate) fn new(inner: S, rule: Arc<dyn Rule>) -> Self {
        Self { inner, rule }
    }

    /// The inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Gives up the guard and returns the inner service.
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
        let verdict = match AuthContext::of(request.extensions()) {
            Ok(Some(caller)) => self.rule.judge(caller, &RequestHead::of(&request)),
            Ok(None) if self.rule.requires_key() => Verdict::Known(Err(Denial::MissingCredential)),
            Ok(None) => Verdict::Known(Ok(Pass::Nothing)),
            Err(denial) => Verdict::Known(Err(denial)),
        };
        let call = match verdict {
            Verdict::Known(Ok(pass)) => {
                GatedCall::inner(PassGate::new(pass), self.inner.call(request))
            }
            Verdict::Known(Err(denial)) => {
                // The instance that is ready may hold a permit for the call that will not come.
                drop(self.take_ready());
                GatedCall::denied(PassGate::new(Pass::Nothing), denial, request)
            }
            Verdict::Later(decision) => {
                // Nor is a permit held during I/O: see `ApiKeyAuth`.
                let inner = self.inner.clone();
                drop(self.take_ready());
                GatedCall::deciding(PassGate::new(Pass::Nothing), decision, request, inner)
            }
        };
        GuardFuture { call }
    }
}

impl<S: Clone> Guard<S> {
    /// Takes the instance that was polled ready and leaves a clone, which was not.
    fn take_ready(&mut self) -> S {
        let clone = self.inner.clone();
        mem::replace(&mut self.inner, clone)
    }
}

/// What a guard does for one request.
pub(crate) struct PassGate {
    pass: Pass,
    is_called: bool,
}

impl PassGate {
    fn new(pass: Pass) -> Self {
        Self { pass, is_called: false }
    }
}

impl Gate for PassGate {
    type Permission = Pass;

    fn admit<B>(&mut self, _: &mut Request<B>, pass: Pass) -> Result<(), Denial> {
        self.pass = pass;
        Ok(())
    }

    fn called(&mut self) {
        self.is_called = true;
    }

    fn finish<R>(&mut self, mut response: Response<R>) -> Response<ResponseBody<R>> {
        match mem::replace(&mut self.pass, Pass::Nothing) {
            Pass::Nothing => {}
            Pass::Limited(fields) => fields.write(response.headers_mut()),
            Pass::Reserved(reservation) => drop(reservation),
        }
        response.map(ResponseBody::inner)
    }

    fn deny<R>(&self, denial: &Denial) -> Response<ResponseBody<R>> {
        denial.response().map(ResponseBody::refusal)
    }

    fn discard_limits<B>(&self, request: &Request<B>) -> DiscardLimits {
        DiscardLimits::of(request)
    }
}

/// A request that is given up before the inner service has it costs nothing.
impl Drop for PassGate {
    fn drop(&mut self) {
        if !self.is_called
            && let Pass::Reserved(reservation) = mem::replace(&mut self.pass, Pass::Nothing)
        {
            reservation.settle(0);
        }
    }
}

pin_project! {
    /// The response future of a [`Guard`].
    pub struct GuardFuture<S, B>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        call: GatedCall<S, B, PassGate>,
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
