//! Handles a request from the decision to the response: [`GatedCall`]. The auth layer and its guards share it.

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

/// Layer-specific steps for a request that waits for a decision, and for its response.
pub(crate) trait Gate {
    /// Result of a positive decision.
    type Permission;

    /// Prepares the request for the inner service.
    fn admit<B>(
        &mut self,
        request: &mut Request<B>,
        permission: Self::Permission,
    ) -> Result<(), Denial>;

    /// Called directly before the inner service gets the request.
    fn called(&mut self) {}

    /// Converts the inner service's response into the layer's response.
    fn finish<R>(&mut self, response: Response<R>) -> Response<ResponseBody<R>>;

    /// Creates the response to a denied request.
    fn deny<R>(&self, denial: &Denial) -> Response<ResponseBody<R>>;

    /// Returns the limits for reading the body of a denied request.
    fn discard_limits<B>(&self, request: &Request<B>) -> DiscardLimits;
}

/// Decision that needs I/O.
pub(crate) type Decision<P> = Pin<Box<dyn Future<Output = Result<P, Denial>> + Send>>;

pin_project! {
    pub(crate) struct GatedCall<S, B, G>
    where
        S: Service<Request<B>>,
        G: Gate,
    {
        #[pin]
        state: CallState<S, B, S::Future, G::Permission>,
        gate: G,
    }
}

pin_project! {
    #[project = CallStateProjection]
    enum CallState<S, B, F, P> {
        Deciding {
            decision: Decision<P>,
            // Taken when the decision is made. Boxed, to keep calls in other states small.
            held: Option<Box<WaitingRequest<S, B>>>,
        },
        GettingReady { held: Option<Box<WaitingRequest<S, B>>> },
        Inner { #[pin] future: F },
        Denied { denial: Denial, unread: Option<UnreadBody<B>> },
    }
}

/// A request that waits for a decision, with the inner service. The service is not polled ready yet: a ready instance
/// may hold a permit of a concurrency limit, for which requests without I/O would wait.
struct WaitingRequest<S, B> {
    request: Request<B>,
    inner: S,
}

impl<S, B, G> GatedCall<S, B, G>
where
    S: Service<Request<B>>,
    G: Gate,
{
    /// Creates a call whose request was passed to the inner service, which was ready.
    pub(crate) fn inner(mut gate: G, future: S::Future) -> Self {
        gate.called();
        Self { state: CallState::Inner { future }, gate }
    }

    /// Creates a call that waits for a decision, and then until `inner`, which is not ready, is ready.
    pub(crate) fn deciding(
        gate: G,
        decision: Decision<G::Permission>,
        request: Request<B>,
        inner: S,
    ) -> Self {
        let held = Some(Box::new(WaitingRequest { request, inner }));
        Self { state: CallState::Deciding { decision, held }, gate }
    }
}

impl<S, B, G> GatedCall<S, B, G>
where
    S: Service<Request<B>>,
    B: Body,
    G: Gate,
{
    /// Creates a call whose request is denied.
    pub(crate) fn denied(gate: G, denial: Denial, request: Request<B>) -> Self {
        Self { state: CallState::denied(&gate, denial, request), gate }
    }
}

impl<S, B: Body, F, P> CallState<S, B, F, P> {
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
                CallStateProjection::Deciding { decision, held } => {
                    let decision = ready!(decision.as_mut().poll(cx));
                    // This is `None` only if the future is polled again after a panic.
                    let Some(mut held) = held.take() else { return Poll::Pending };
                    let admitted = decision
                        .and_then(|permission| this.gate.admit(&mut held.request, permission));
                    let next = match admitted {
                        Ok(()) => CallState::GettingReady { held: Some(held) },
                        Err(denial) => CallState::denied(this.gate, denial, held.request),
                    };
                    this.state.set(next);
                }
                CallStateProjection::GettingReady { held } => {
                    let Some(waiting) = held else { return Poll::Pending };
                    ready!(waiting.inner.poll_ready(cx))?;
                    let Some(held) = held.take() else { return Poll::Pending };
                    let WaitingRequest { request, mut inner } = *held;
                    this.gate.called();
                    let future = inner.call(request);
                    this.state.set(CallState::Inner { future });
                }
                CallStateProjection::Inner { future } => {
                    let response = ready!(future.poll(cx))?;
                    return Poll::Ready(Ok(this.gate.finish(response)));
                }
                CallStateProjection::Denied { denial, unread } => {
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
