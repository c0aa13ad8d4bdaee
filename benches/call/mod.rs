//! A request and the service that it ends in, for programs that measure layers.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    task::{Context, Poll},
};

use http::{HeaderValue, Request, Response, header};
use http_body_util::Empty;
use tower::Service;

pub(crate) type Call = Request<Body>;
pub(crate) type Body = Empty<bytes::Bytes>;

/// A request with the fields that most have.
pub(crate) fn request(authorization: HeaderValue) -> Call {
    let mut request = Request::new(Body::new());
    let headers = request.headers_mut();
    headers.insert(header::HOST, HeaderValue::from_static("api.example.com"));
    headers.insert(header::USER_AGENT, HeaderValue::from_static("example/1.0"));
    headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(header::AUTHORIZATION, authorization);
    request
}

/// The service that is called in the end. It looks at nothing.
#[derive(Clone)]
pub(crate) struct Inner;

impl Service<Call> for Inner {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Call) -> Self::Future {
        black_box(&request);
        ready(Ok(Response::new(Empty::new())))
    }
}
