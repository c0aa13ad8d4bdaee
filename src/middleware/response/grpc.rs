//! Denials in gRPC: a trailers-only response, whose header fields are the trailers.
//!
//! <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#responses>

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, Version, header};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

use super::denied_request::{DeniedRequest, write_limits};
use crate::{denial::Denial, middleware::credential::RequestHead};

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
/// Characters that are escaped in `grpc-message`. Bytes over 0x7E are always escaped.
const ESCAPED: &AsciiSet = &CONTROLS.add(b'%');

/// Content type of a gRPC or gRPC-Web request. The response has the same one.
pub(crate) enum ContentType {
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
    /// Returns `None` for a request that is not a gRPC call. A denial in gRPC has the HTTP status 200, and the caller
    /// chooses the content type, so the content type alone is not sufficient. A gRPC call is a `POST` over HTTP/2; a
    /// gRPC-Web call is a `POST` over any version.
    #[inline]
    pub(crate) fn of(head: &RequestHead<'_>) -> Option<Self> {
        if head.method() != Method::POST {
            return None;
        }
        let value = head.headers().get(header::CONTENT_TYPE)?;
        let has_its_version = match Protocol::of(value.as_bytes())? {
            Protocol::Grpc => head.version() == Version::HTTP_2,
            Protocol::GrpcWeb => true,
        };
        let usual = || USUAL.into_iter().find(|it| it.as_bytes() == value.as_bytes());
        has_its_version
            .then(|| usual().map_or_else(|| Self::Other(value.clone().into()), Self::Usual))
    }

    fn value(&self) -> HeaderValue {
        match self {
            Self::Usual(text) => HeaderValue::from_static(text),
            Self::Other(value) => (**value).clone(),
        }
    }
}

enum Protocol {
    Grpc,
    GrpcWeb,
}

impl Protocol {
    /// Returns the protocol of a content type (<https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-WEB.md>).
    fn of(content_type: &[u8]) -> Option<Self> {
        let rest = strip_prefix(content_type, b"application/grpc")?;
        let (protocol, rest) = match strip_prefix(rest, b"-web") {
            Some(rest) => (Self::GrpcWeb, strip_prefix(rest, b"-text").unwrap_or(rest)),
            None => (Self::Grpc, rest),
        };
        matches!(rest.first(), None | Some(b'+' | b';' | b' ' | b'\t')).then_some(protocol)
    }
}

/// Strips a prefix, case-insensitively like media types (RFC 9110 §8.3.1).
fn strip_prefix<'a>(text: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    let (start, rest) = text.split_at_checked(prefix.len())?;
    start.eq_ignore_ascii_case(prefix).then_some(rest)
}

pub(super) fn trailers_only(
    denied: &DeniedRequest<'_>,
    content_type: &ContentType,
) -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, content_type.value());
    headers.insert(GRPC_STATUS, code(denied.denial()).into());
    let message = utf8_percent_encode(&denied.detail(), ESCAPED).to_string();
    if let Ok(message) = message.try_into() {
        headers.insert(GRPC_MESSAGE, message);
    }
    write_limits(denied.denial(), headers);
    response
}

/// Creates the status that a handler returns: the code of the table, [`Denial::detail`] as message, and `retry-after`
/// and the fields of a rate limit in the metadata.
///
/// ```
/// use tower_api_key::AuthContext;
///
/// async fn generate(request: tonic::Request<String>) -> Result<tonic::Response<String>, tonic::Status> {
///     let caller = AuthContext::from_extensions(request.extensions())?;
///     caller.require_model("small")?;
///     Ok(tonic::Response::new(caller.user().email.clone()))
/// }
/// ```
#[cfg(feature = "tonic")]
impl From<Denial> for tonic::Status {
    fn from(denial: Denial) -> Self {
        let mut headers = http::HeaderMap::new();
        write_limits(&denial, &mut headers);
        let code = tonic::Code::from_i32(code(&denial).into());
        let metadata = tonic::metadata::MetadataMap::from_headers(headers);
        Self::with_metadata(code, denial.detail(), metadata)
    }
}

/// Returns the gRPC status code (<https://github.com/grpc/grpc/blob/master/doc/statuscodes.md>).
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
        Denial::BadRow(_) | Denial::Unsupported(_) | Denial::LayerMissing => INTERNAL,
    }
}
