//! [`GatedCall`]: a request from the decision about it to its response. The auth layer and its guards share it.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_service::Service;

use super::{
    body::ResponseBody,
    discard::{DiscardLimits, UnreadBody},
};
use crate::denial::Denial;

/// What a layer does with a request that waits for a decision, and with its response.
pub(crate) trait Gate {
    /// What a positive decision is made of.
    type Permission;

    /// Prepares the request for the inner service.
    fn admit<B>(
        &mut self,
        request: &mut Request<B>,
        permission: Self::Permission,
    ) -> Result<(), Denial>;

    /// The inner service gets the request.
    fn called(&mut self) {}

    /// Makes the layer's response of the inner service's.
    fn finish<R>(&mut self, response: Response<R>) -> Response<ResponseBody<R>>;

    /// Makes the response to a request that is denied.
    fn deny<R>(&self, denial: &Denial) -> Response<ResponseBody<R>>;

    /// How much of a denied request's body is read.
    fn discard_limits<B>(&self, request: &Request<B>) -> DiscardLimits;
}

/// A decision that takes I/O.
pub(crate) type Decision<P> = Pin<Box<dyn Future<Output = Result<P, Denial>> + Send>>;

pin_project! {
    pub(crate) struct GatedCall<S, B, G>
    where
        S: Service<Request<B>>,
        G: Gate,
    {
        #[pin]
        state: State<S, B, S::Future, G::Permission>,
        gate: G,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<S, B, F, P> {
        Deciding {
            decision: Decision<P>,
            // Taken when the decision is there. Boxed, so that a call that holds none is no larger for it.
            held: Option<Box<Held<S, B>>>,
        },
        GettingReady { held: Option<Box<Held<S, B>>> },
        Inner { #[pin] future: F },
        Denied { denial: Denial, unread: Option<UnreadBody<B>> },
    }
}

/// What waits for a decision. The inner service is not ready: an instance that is may hold a permit of a
/// concurrency limit, which requests that need no I/O would wait for.
struct Held<S, B> {
    request: Request<B>,
    inner: S,
}

impl<S, B, G> GatedCall<S, B, G>
where
    S: Service<Request<B>>,
    G: Gate,
{
    /// The request has gone to the inner service, which was ready.
    pub(crate) fn inner(mut gate: G, future: S::Future) -> Self {
        gate.called();
        Self { state: State::Inner { future }, gate }
    }

    /// The request waits for a decision, and after that for `inner`, which is not ready.
    pub(crate) fn deciding(
        gate: G,
        decision: Decision<G::Permission>,
        request: Request<B>,
        inner: S,
    ) -> Self {
        let held = Some(Box::new(Held { request, inner }));
        Self { state: State::Deciding { decision, held }, gate }
    }
}

impl<S, B, G> GatedCall<S, B, G>
where
    S: Service<Request<B>>,
    B: Body,
    G: Gate,
{
    /// The request is denied.
    pub(crate) fn denied(gate: G, denial: Denial, request: Request<B>) -> Self {
        Self { state: State::denied(&gate, denial, request), gate }
    }
}

impl<S, B: Body, F, P> State<S, B, F, P> {
    fn denied(gate: &impl Gate, denial: Denial, request: Request<B>) -> Self {
        denial.log();
        let limits = gate.discard_limits(&request);
        Self::Denied { denial, unread: UnreadBody::of(request, limits) }
    }
}

impl<S, B, R, G> Future for GatedCall<S, B, G>
where
    S: Service<Request<B>, Response = Response<R>>,
    B: Body,
    G: Gate,
{
    type Output = Result<Response<ResponseBody<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProjection::Deciding { decision, held } => {
                    let decision = ready!(decision.as_mut().poll(cx));
                    // `None` only if a future that has panicked is polled again.
                    let Some(mut held) = held.take() else { return Poll::Pending };
                    let admitted = decision
                        .and_then(|permission| this.gate.admit(&mut held.request, permission));
                    let next = match admitted {
                        Ok(()) => State::GettingReady { held: Some(held) },
                        Err(denial) => State::denied(this.gate, denial, held.request),
                    };
                    this.state.set(next);
                }
                StateProjection::GettingReady { held } => {
                    let Some(waiting) = held else { return Poll::Pending };
                    ready!(waiting.inner.poll_ready(cx))?;
                    let Some(held) = held.take() else { return Poll::Pending };
                    let Held { request, mut inner } = *held;
                    this.gate.called();
                    let future = inner.call(request);
                    this.state.set(State::Inner { future });
                }
                StateProjection::Inner { future } => {
                    let response = ready!(future.poll(cx))?;
                    return Poll::Ready(Ok(this.gate.finish(response)));
                }
                StateProjection::Denied { denial, unread } => {
                    if let Some(body) = unread {
                        ready!(body.poll_discard(cx));
                        *unread = None;
                    }
                    return Poll::Ready(Ok(this.gate.deny(denial)));
                }
            }
        }
    }
}
