//! HTTP requests: the auth layer, its guards, and the responses to denied requests.

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
