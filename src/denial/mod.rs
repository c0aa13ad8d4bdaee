//! Why a request is denied: [`Denial`].
//!
//! | reason | HTTP | gRPC |
//! |---|---|---|
//! | no key | 401, a challenge without an error code | UNAUTHENTICATED |
//! | a header that breaks the grammar, two different keys, a key that is not behind `Bearer` | 400 `invalid_request` | INVALID_ARGUMENT |
//! | not a key, unknown, wrong, revoked, expired, not valid yet, rotated and past the grace period, owner inactive | 401 `invalid_token` | UNAUTHENTICATED |
//! | endpoint, address, scope, permission, role or model not allowed | 403 | PERMISSION_DENIED |
//! | rate limit or budget used up | 429 with `Retry-After` (a `total` budget never resets and has none) | RESOURCE_EXHAUSTED |
//! | store unavailable or overloaded, too many slow checks | 503 with `Retry-After` | UNAVAILABLE |
//! | the key's row can't be decoded; the store lacks a capability (budget leases, usage) | 500, and the log has the details | INTERNAL |
//!
//! A failure of the store is never a 401, and every response has `Cache-Control: no-store`. A handler returns a denial
//! with `?`, in axum and, with the feature `tonic`, in tonic:
//!
//! ```
//! use tower_api_key::{AuthContext, Denial};
//!
//! async fn delete(caller: AuthContext) -> Result<(), Denial> {
//!     caller.require_scope("files:delete")?;
//!     Ok(())
//! }
//! ```
//!
//! # The response
//!
//! - The body is `application/problem+json` (RFC 9457).
//!   [`ApiKeyAuthLayer::on_denial`](crate::ApiKeyAuthLayer::on_denial) replaces it, with
//!   [`openai_error`](crate::middleware::openai_error) or a closure.
//! - The text does not show why a key is not valid, unless the layer is [`verbose`](crate::ApiKeyAuthLayer::verbose).
//! - gRPC calls get trailers with the HTTP status 200: a `POST` over HTTP/2 with an `application/grpc` content type,
//!   and a `POST` with one of gRPC-Web. No other request does. [`http_only`](crate::ApiKeyAuthLayer::http_only) answers
//!   these in HTTP as well: use it for an endpoint that a proxy judges by its HTTP status (nginx `auth_request`),
//!   because the proxy may forward content type and method.
//! - The body of a denied upload is read and discarded first, at most 8 MiB and 2 s
//!   ([`discard_body`](crate::ApiKeyAuthLayer::discard_body)). A handler that returns a `Denial` has to read the body
//!   itself.
//! - Behind a proxy that caches, a response that depends on the key needs `Cache-Control: private`: nginx also stores
//!   responses to requests with `Authorization`.
//!
//! # Malformed credentials
//!
//! - A structured key in `Authorization` without `Bearer`, or behind another scheme (`Token KEY`), is 400 with a
//!   sentence that names what to write, also with [`optional`](crate::ApiKeyAuthLayer::optional).
//! - Behind `Bearer`, the grammar is the `b64token` of RFC 6750 (letters, digits, `-._~+/`, then `=`): `"KEY"`, `<KEY>`
//!   and `KEY,` are 400. With [`KeyFormat::first_chars`](crate::key::KeyFormat::first_chars), any visible ASCII
//!   characters may be a key, and such values are 401.

mod credential;
mod log;
mod reason;

pub use self::{
    credential::{MalformedCredential, UnrecognizedKey},
    reason::{BudgetExceeded, Denial, Forbidden, InvalidKey},
};
