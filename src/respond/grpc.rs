//! Refusals in gRPC: a trailers-only response, whose header fields are the trailers.
//!
//! <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#responses>

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, header};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use super::{Denial, Refusal};

const GRPC: &[u8] = b"application/grpc";
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// What may not stand in `grpc-message`; bytes over 0x7E are always escaped.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

/// The content type of a gRPC or gRPC-Web request, which that of the answer has to be.
pub(super) enum ContentType {
    Usual(&'static str),
    Other(Box<HeaderValue>),
}

const USUAL: [&str; 6] = [
    "application/grpc",
    "application/grpc+proto",
    "application/grpc-web",
    "application/grpc-web+proto",
    "application/grpc-web-text",
    "application/grpc-web-text+proto",
];

impl ContentType {
    /// `None` for a request that is none of gRPC's.
    #[inline]
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        Self::parse(headers.get(header::CONTENT_TYPE)?)
    }

    fn parse(value: &HeaderValue) -> Option<Self> {
        let (essence, rest) = value.as_bytes().split_at_checked(GRPC.len())?;
        let is_grpc = essence.eq_ignore_ascii_case(GRPC)
            && matches!(rest.first(), None | Some(b'+' | b';' | b'-' | b' '));
        let usual = || USUAL.into_iter().find(|it| it.as_bytes() == value.as_bytes());
        is_grpc.then(|| usual().map_or_else(|| Self::Other(value.clone().into()), Self::Usual))
    }

    fn value(&self) -> HeaderValue {
        match self {
            Self::Usual(text) => HeaderValue::from_static(text),
            Self::Other(value) => (**value).clone(),
        }
    }
}

pub(super) fn trailers_only(refusal: &Refusal<'_>, content_type: &ContentType) -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, content_type.value());
    headers.insert(GRPC_STATUS, code(refusal.denial()).into());
    let message = utf8_percent_encode(&refusal.detail(), ESCAPED).to_string();
    if let Ok(message) = message.try_into() {
        headers.insert(GRPC_MESSAGE, message);
    }
    if let Some(seconds) = refusal.retry_after_seconds() {
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    if let Denial::RateLimited(quota) = refusal.denial()
        && let Some(fields) = quota.fields()
    {
        fields.write(headers);
    }
    response
}

/// <https://github.com/grpc/grpc/blob/master/doc/statuscodes.md>
fn code(denial: &Denial) -> u16 {
    const INVALID_ARGUMENT: u16 = 3;
    const PERMISSION_DENIED: u16 = 7;
    const RESOURCE_EXHAUSTED: u16 = 8;
    const INTERNAL: u16 = 13;
    const UNAVAILABLE: u16 = 14;
    const UNAUTHENTICATED: u16 = 16;
    match denial {
        Denial::MalformedCredential(_) => INVALID_ARGUMENT,
        Denial::MissingCredential | Denial::InvalidKey(_) => UNAUTHENTICATED,
        Denial::Forbidden(_) => PERMISSION_DENIED,
        Denial::RateLimited(_) | Denial::BudgetExceeded(_) => RESOURCE_EXHAUSTED,
        Denial::Unavailable(_) => UNAVAILABLE,
        Denial::BadRow(_) | Denial::LayerMissing => INTERNAL,
    }
}
