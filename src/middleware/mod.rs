//! HTTP: the auth layer, the guards behind it, and the responses to denied requests.
//!
//! Start with [`ApiKeyAuthLayer`]. Behind it, guards enforce one rule each: [`RequireLayer`] (scopes, permissions,
//! roles, rules of your own), [`RateLimitLayer`] and [`BudgetLayer`]. Handlers read the
//! [`AuthContext`](crate::AuthContext).
//!
//! ```
//! use tower::ServiceBuilder;
//! use tower_api_key::{
//!     ApiKeyAuthLayer, MemoryStore, RateLimitLayer, RequireLayer,
//!     middleware::{BudgetLayer, Credential, TrustedProxies},
//!     rate_limit::LocalRateLimiter,
//! };
//!
//! # fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let auth = ApiKeyAuthLayer::new(MemoryStore::new())
//!     .credentials([Credential::bearer(), Credential::header("api-key".parse()?)])
//!     .trusted_proxies(TrustedProxies::x_forwarded_for(["10.0.0.0/8"])?)
//!     .skip(|head| head.uri().path() == "/health");
//! let service = ServiceBuilder::new()
//!     .layer(auth)
//!     .layer(RequireLayer::scope("chat:write"))
//!     .layer(RateLimitLayer::new(LocalRateLimiter::new()))
//!     .layer(BudgetLayer::new(200_000))
//!     .service_fn(|_request: http::Request<String>| async {
//!         Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
//!     });
//! # Ok(())
//! # }
//! ```
//!
//! # Credentials
//!
//! The default is `Authorization: Bearer KEY`, then `x-api-key: KEY`. [`credentials`](ApiKeyAuthLayer::credentials)
//! sets other places: a header field, HTTP Basic with the key as user name, a closure ([`Credential`]). The field is
//! removed from the request before the inner service gets it, or marked sensitive with
//! [`mark_sensitive`](ApiKeyAuthLayer::mark_sensitive).
//!
//! # Requests without a key
//!
//! They are denied. [`optional`](ApiKeyAuthLayer::optional) lets them through (a bad key is still denied), and
//! [`skip`](ApiKeyAuthLayer::skip) lets requests through untouched that match a predicate, such as health checks. Rate
//! limits and budgets behind the layer let such requests pass; [`RequireLayer`] and the extractor `AuthContext` answer
//! 401. `skip(|_| true)` turns the layer off.
//!
//! # Rules of the key
//!
//! The layer enforces that key and owner are active, the expiry (by the clock of the node), endpoints, and client
//! addresses. The address is that of the connection (axum's `ConnectInfo`, the extension [`ClientAddr`], or a
//! [`client_ip`](ApiKeyAuthLayer::client_ip) closure), or the one in a header field that [trusted
//! proxies](TrustedProxies) write. A key with address rules is denied where the address is unknown; the first time, the
//! log has a warning that names what to add.
//!
//! # Order of layers
//!
//! Put `CorsLayer` and `TraceLayer` outside, so that denials have CORS fields and are traced and a preflight needs no
//! key. If the trace layer logs header fields, put `SetSensitiveRequestHeadersLayer` before it. Concurrency limits,
//! buffers and load shedders may be inside: a request that waits for the store holds no permit of them.
//!
//! With tonic-web, put the layer around the translation: `(layer, GrpcWebLayer::new()).named_layer(server)`. If it is
//! inside, the denial of a gRPC-Web call over HTTP/1.1 is an HTTP response, which clients read as an internal error.
//!
//! # Responses to denied requests
//!
//! [`denial`](crate::denial) lists them. [`on_denial`](ApiKeyAuthLayer::on_denial) takes [`openai_error`], or a closure
//! that gets a [`DeniedRequest`].

mod body;
mod client_address;
mod credential;
mod discard;
#[cfg(feature = "axum")]
mod extract;
mod future;
mod gated_call;
mod guard;
mod layer;
mod response;
mod service;

pub use self::{
    body::ResponseBody,
    client_address::{ClientAddr, TrustedProxies},
    credential::{Credential, RequestHead},
    future::ResponseFuture,
    guard::{BudgetLayer, Guard, GuardFuture, RateLimitLayer, RequireLayer},
    layer::{ApiKeyAuthLayer, InvalidRealm},
    response::{DeniedRequest, openai_error},
    service::ApiKeyAuth,
};
