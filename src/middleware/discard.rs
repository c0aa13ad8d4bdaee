//! Discards the body of a denied request: [`UnreadBody`].
//!
//! A server over HTTP/1.1 closes the connection if it has answered a request whose body it has not read. The kernel
//! then resets the connection, and a client or proxy that is still sending gets a broken pipe instead of the response
//! (RFC 9112 §9.6). Over HTTP/2 the stream is reset after the response (RFC 9113 §8.1), which some clients treat as
//! an error: curl 7.88 exits with 92. Therefore the rest of the body is read and discarded first, within limits.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Buf;
use http::{Request, Version, header};
use http_body::Body;
use tokio::{runtime::Handle, time::Sleep};

use super::{credential::RequestHead, response::ContentType};
use crate::runtime::timer;

/// Limits for reading the body of a denied request. The auth layer inserts its limits into the extensions of a
/// request, for guards, if they are not the default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DiscardLimits {
    pub(crate) bytes: u64,
    pub(crate) time: Duration,
}

impl Default for DiscardLimits {
    fn default() -> Self {
        Self { bytes: 8 << 20, time: Duration::from_secs(2) }
    }
}

impl DiscardLimits {
    /// Returns the limits of the outer auth layer, or the default.
    pub(crate) fn of<B>(request: &Request<B>) -> Self {
        request.extensions().get().copied().unwrap_or_default()
    }

    fn are_off(&self) -> bool {
        self.bytes == 0 || self.time.is_zero()
    }
}

/// Rest of a request body, which is read and discarded before the response.
pub(crate) struct UnreadBody<B> {
    body: Pin<Box<B>>,
    bytes_left: u64,
    /// Limits how long the client is waited for.
    timer: Pin<Box<Sleep>>,
}

impl<B: Body> UnreadBody<B> {
    /// Returns the body if it has to be read: it has not ended, its declared length is within the limit, and the
    /// client does not wait for a `100 Continue`, which polling the body would send (RFC 9110 §10.1.1). The body of a
    /// gRPC call is not read: a gRPC client may wait for the response before it ends its stream, and accepts an early
    /// response.
    pub(crate) fn of(request: Request<B>, limits: DiscardLimits) -> Option<Self> {
        let is_grpc = ContentType::of(&RequestHead::of(&request)).is_some()
            && request.version() == Version::HTTP_2;
        let awaits_continue = request
            .headers()
            .get(header::EXPECT)
            .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        let body = request.body();
        let is_worth_reading = !body.is_end_stream() && body.size_hint().lower() <= limits.bytes;
        if limits.are_off() || is_grpc || awaits_continue || !is_worth_reading {
            return None;
        }
        Handle::try_current().ok()?;
        // Without a timer, nothing bounds the wait for the client.
        let timer = Box::pin(timer(limits.time)?);
        Some(Self { body: Box::pin(request.into_body()), bytes_left: limits.bytes, timer })
    }

    /// Reads and discards frames. Ready at the end of the body, on an error, or when a limit is reached.
    pub(crate) fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if self.timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            let Poll::Ready(frame) = self.body.as_mut().poll_frame(cx) else {
                return Poll::Pending;
            };
            let Some(Ok(frame)) = frame else { return Poll::Ready(()) };
            // Each frame counts as at least one byte, so that a body of empty frames reaches the limit as well.
            let bytes = frame.data_ref().map_or(0, |data| data.remaining() as u64).max(1);
            match self.bytes_left.checked_sub(bytes) {
                Some(left) => self.bytes_left = left,
                None => return Poll::Ready(()),
            }
        }
    }
}
