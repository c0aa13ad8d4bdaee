//! [`ResponseFuture`]: what happens to a request until it is answered.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    body::ResponseBody,
    cache::LookupFuture,
    respond::{Asker, Denial},
    service::Gate,
    telemetry,
};

pin_project! {
    /// The response future of [`ApiKeyAuth`](crate::ApiKeyAuth). Dropping it at any moment leaves
    /// nothing behind but a look-up that has begun, which ends on its own: others may wait for it.
    pub struct ResponseFuture<S, B>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        state: State<S, B, S::Future>,
        asker: Asker,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<S, B, F> {
        LookUp {
            lookup: LookupFuture,
            // Taken when the answer is there. Boxed, so that a future that holds none is no larger for it.
            held: Option<Box<Held<S, B>>>,
        },
        Inner { #[pin] future: F },
        Refused { denial: Denial },
    }
}

/// What waits for the outcome of a look-up.
pub(crate) struct Held<S, B> {
    pub(crate) request: Request<B>,
    /// The places that the key is in.
    pub(crate) places: u64,
    /// The instance that is ready for the request.
    pub(crate) ready: S,
    pub(crate) gate: Arc<Gate>,
}

impl<S, B> ResponseFuture<S, B>
where
    S: Service<Request<B>>,
{
    pub(crate) fn pass(asker: Asker, future: S::Future) -> Self {
        Self { state: State::Inner { future }, asker }
    }

    pub(crate) fn look_up(asker: Asker, lookup: LookupFuture, held: Held<S, B>) -> Self {
        Self { state: State::LookUp { lookup, held: Some(Box::new(held)) }, asker }
    }

    pub(crate) fn refuse(asker: Asker, denial: Denial) -> Self {
        Self { state: State::Refused { denial }, asker }
    }
}

impl<S, B, R> Future for ResponseFuture<S, B>
where
    S: Service<Request<B>, Response = Response<R>>,
{
    type Output = Result<Response<ResponseBody<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            match this.state.as_mut().project() {
                StateProjection::LookUp { lookup, held } => {
                    let outcome = ready!(lookup.as_mut().poll(cx));
                    // `None` only if somebody polls a future that has panicked.
                    let Some(held) = held.take() else { return Poll::Pending };
                    let Held { mut request, places, mut ready, gate } = *held;
                    let admitted =
                        outcome.and_then(|caller| gate.let_in(&mut request, caller, places));
                    match admitted {
                        Ok(()) => {
                            let future = ready.call(request);
                            this.state.set(State::Inner { future });
                        }
                        Err(denial) => this.state.set(State::Refused { denial }),
                    }
                }
                StateProjection::Inner { future } => {
                    let response = ready!(future.poll(cx))?;
                    return Poll::Ready(Ok(this.asker.reshape(response)));
                }
                StateProjection::Refused { denial } => {
                    telemetry::denied(denial);
                    return Poll::Ready(Ok(this.asker.refuse(denial)));
                }
            }
        }
    }
}

impl<S, B> fmt::Debug for ResponseFuture<S, B>
where
    S: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
