//! [`ResponseFuture`]: what happens to a request until it is answered.

use std::{
    fmt,
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{
    authenticate::LookupFuture,
    body::ResponseBody,
    respond::{Asker, Denial},
    service::Gate,
    telemetry,
};

pin_project! {
    /// The response future of [`ApiKeyAuth`](crate::ApiKeyAuth). Dropping it at any moment leaves
    /// nothing behind but a slow hash check that has begun, which ends on its own.
    pub struct ResponseFuture<S, B>
    where
        S: Service<Request<B>>,
    {
        #[pin]
        state: State<S, B, S::Future>,
        gate: Arc<Gate>,
        asker: Asker,
    }
}

pin_project! {
    #[project = StateProjection]
    enum State<S, B, F> {
        LookUp {
            lookup: LookupFuture,
            address: Option<IpAddr>,
            // The request and the instance that is ready for it; taken when the answer is there.
            held: Option<(Request<B>, S)>,
        },
        Inner { #[pin] future: F },
        Refused { denial: Denial },
    }
}

impl<S, B> ResponseFuture<S, B>
where
    S: Service<Request<B>>,
{
    pub(crate) fn pass(gate: Arc<Gate>, asker: Asker, future: S::Future) -> Self {
        Self { state: State::Inner { future }, gate, asker }
    }

    pub(crate) fn look_up(
        gate: Arc<Gate>,
        asker: Asker,
        lookup: LookupFuture,
        address: Option<IpAddr>,
        request: Request<B>,
        ready: S,
    ) -> Self {
        Self { state: State::LookUp { lookup, address, held: Some((request, ready)) }, gate, asker }
    }

    pub(crate) fn refuse(gate: Arc<Gate>, asker: Asker, denial: Denial) -> Self {
        Self { state: State::Refused { denial }, gate, asker }
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
                StateProjection::LookUp { lookup, address, held } => {
                    let outcome = ready!(lookup.as_mut().poll(cx));
                    // `None` only if somebody polls a future that has panicked.
                    let Some((mut request, mut inner)) = held.take() else { return Poll::Pending };
                    let admitted =
                        outcome.and_then(|caller| this.gate.let_in(&mut request, caller, *address));
                    match admitted {
                        Ok(()) => {
                            let future = inner.call(request);
                            this.state.set(State::Inner { future });
                        }
                        Err(denial) => this.state.set(State::Refused { denial }),
                    }
                }
                StateProjection::Inner { future } => {
                    let response = ready!(future.poll(cx))?;
                    return Poll::Ready(Ok(this.gate.reshape(response, this.asker)));
                }
                StateProjection::Refused { denial } => {
                    telemetry::denied(denial);
                    return Poll::Ready(Ok(this.gate.response(denial, this.asker)));
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
