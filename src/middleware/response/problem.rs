//! Denials in JSON: problem details, and the error format of the OpenAI API.

use bytes::Bytes;
use http::Response;
use serde::Serialize;

use super::denied_request::DeniedRequest;
use crate::denial::{Denial, Forbidden};

/// Problem details (RFC 9457), with the error code of RFC 6750 as an extension member.
#[derive(Serialize)]
struct Problem<'a> {
    r#type: &'static str,
    title: &'a str,
    status: u16,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
}

pub(super) fn problem_json(denied: &DeniedRequest<'_>) -> Response<Bytes> {
    let status = denied.status();
    let problem = Problem {
        r#type: "about:blank",
        title: status.canonical_reason().unwrap_or_default(),
        status: status.as_u16(),
        detail: denied.detail(),
        error: denied.denial().error_code(),
    };
    denied.respond_with("application/problem+json", json(&problem))
}

#[derive(Serialize)]
struct OpenAiError {
    error: OpenAiBody,
}

#[derive(Serialize)]
struct OpenAiBody {
    message: String,
    r#type: &'static str,
    param: Option<&'static str>,
    code: Option<&'static str>,
}

/// Creates a response in the error format of the OpenAI API, so that its client libraries raise their usual
/// exceptions. For [`on_denial`](crate::ApiKeyAuthLayer::on_denial).
///
/// ```
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore, middleware::openai_error};
///
/// let layer = ApiKeyAuthLayer::new(MemoryStore::new()).on_denial(openai_error);
/// ```
pub fn openai_error(denied: &DeniedRequest<'_>) -> Response<Bytes> {
    let (r#type, code) = match denied.denial() {
        Denial::MissingCredential => ("invalid_request_error", None),
        Denial::MalformedCredential(_) => ("invalid_request_error", Some("invalid_request")),
        Denial::InvalidKey(_) => ("invalid_request_error", Some("invalid_api_key")),
        Denial::Forbidden(Forbidden::Model(_)) => {
            ("invalid_request_error", Some("model_not_allowed"))
        }
        Denial::Forbidden(_) => ("permission_error", Some("insufficient_permissions")),
        Denial::BudgetExceeded(_) => ("insufficient_quota", Some("insufficient_quota")),
        Denial::RateLimited(_) => ("requests", Some("rate_limit_exceeded")),
        Denial::Unavailable(_) => ("server_error", Some("service_unavailable")),
        Denial::BadRow(_) | Denial::Unsupported(_) | Denial::LayerMissing => ("server_error", None),
    };
    let body = OpenAiBody { message: denied.detail(), r#type, param: None, code };
    denied.respond_with("application/json", json(&OpenAiError { error: body }))
}

fn json(body: &impl Serialize) -> Vec<u8> {
    // Structs of strings and numbers can always be serialized.
    serde_json::to_vec(body).unwrap_or_default()
}

#[cfg(feature = "axum")]
impl axum::response::IntoResponse for Denial {
    /// Returns [`Denial::response`] as an axum response.
    fn into_response(self) -> axum::response::Response {
        self.response().map(axum::body::Body::from)
    }
}
