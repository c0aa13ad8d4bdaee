//! What applies a rule to requests that the auth layer has let in: [`Guard`].

use std::{
    fmt,
    future::Future,
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{HeaderMap, Request, Response};
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    body::ResponseBody, budget::Reservation, context::AuthContext, credential::RequestHead,
    limit::RateFields, respond::Denial, telemetry,
};

/// The service of a [`RequireLayer`](crate::RequireLayer), a [`RateLimitLayer`](crate::RateLimitLayer) or a
/// [`BudgetLayer`](crate::BudgetLayer): it asks its rule about the request's [`AuthContext`], and answers with
/// the [`Denial`] or calls the inner service. An [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer) has to be around it,
/// and gives its refusals their shape.
#[derive(Clone)]
pub struct Guard<S> {
    inner: S,
    rule: Arc<dyn Rule>,
}

/// What a guard asks.
pub(crate) trait Rule: Send + Sync + 'static {
    fn judge(&self, caller: &AuthContext, head: &RequestHead<'_>) -> Verdict;
}

/// What a rule says.
pub(crate) enum Verdict {
    Known(Result<Pass, Denial>),
    /// It has to ask somebody else.
    Later(Judging),
}

pub(crate) type Judging = Pin<Box<dyn Future<Output = Result<Pass, Denial>> + Send>>;

/// What is to be done with the response of a request that may pass.
pub(crate) enum Pass {
    Nothing,
    /// Its fields say how much is left.
    Limited(RateFields),
    /// It is charged when the response is there, or the request is given up.
    Reserved(Reservation),
}

impl Pass {
    fn finish(self, headers: &mut HeaderMap) {
        match self {
            Self::Nothing => {}
            Self::Limited(fields) => fields.write(headers),
            Self::Reserved(reservation) => drop(reservation),
        }
    }
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
            Ok(None) => Verdict::Known(Err(Denial::MissingCredential)),
            Err(denial) => Verdict::Known(Err(denial)),
        };
        let state = match verdict {
            Verdict::Known(Ok(pass)) => State::Inner { future: self.inner.call(request), pass },
            Verdict::Known(Err(denial)) => {
                // The instance that is ready may hold a permit for the call that will not come.
                drop(self.take_ready());
                State::Refused { denial }
            }
            Verdict::Later(judging) => {
                let held = Some(Box::new((request, self.take_ready())));
                State::Judging { judging, held }
            }
        };
        GuardFuture { state }
    }
}

impl<S: Clone> Guard<S> {
    /// Takes the instance that was polled ready and leaves a clone, which was not.
    fn take_ready(&mut self) -> S {
        let clone = self.inner.clone();
        mem::replace(&mut self.inner, clone)
    }
}

pin_project! {
    /// The response future of a [`Guard`].
    pub struct GuardFuture<S, B>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        state: State<S, B, S::Future>,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<S, B, F> {
        Judging {
            judging: Judging,
            // The request and the instance that is ready for it. Taken when the verdict is there.
            held: Option<Box<(Request<B>, S)>>,
        },
        Inner { #[pin] future: F, pass: Pass },
        Refused { denial: Denial },
    }
}

impl<S, B, R> Future for GuardFuture<S, B>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Output = Result<Response<ResponseBody<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProjection::Judging { judging, held } => {
                    let verdict = ready!(judging.as_mut().poll(cx));
                    // `None` only if somebody polls a future that has panicked.
                    let Some(held) = held.take() else { return Poll::Pending };
                    let (request, mut ready) = *held;
                    this.state.set(match verdict {
                        Ok(pass) => State::Inner { future: ready.call(request), pass },
                        Err(denial) => State::Refused { denial },
                    });
                }
                StateProjection::Inner { future, pass } => {
                    let mut response = ready!(future.poll(cx))?;
                    mem::replace(pass, Pass::Nothing).finish(response.headers_mut());
                    return Poll::Ready(Ok(response.map(ResponseBody::inner)));
                }
                StateProjection::Refused { denial } => {
                    telemetry::denied(denial);
                    return Poll::Ready(Ok(denial.response().map(ResponseBody::refusal)));
                }
            }
        }
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
