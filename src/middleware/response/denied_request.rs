//! Creates the response to a denied request: [`DeniedRequest`].

use std::sync::LazyLock;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri, header};

use super::{
    grpc,
    presentation::{OnDenial, Presentation, quoted},
    problem,
    request_summary::RequestSummary,
};
use crate::denial::{Denial, Forbidden};

const NO_STORE: HeaderValue = HeaderValue::from_static("no-store");

/// Writes `Retry-After`, in whole seconds and at least one, and the fields of a rate limit.
pub(super) fn write_limits(denial: &Denial, headers: &mut HeaderMap) {
    if let Some(wait) = denial.retry_after() {
        let seconds = wait.as_millis().div_ceil(1000).clamp(1, 31 * 86_400) as u64;
        headers.insert(header::RETRY_AFTER, seconds.into());
    }
    if let Denial::RateLimited(quota) = denial
        && let Some(fields) = quota.fields()
    {
        fields.write(headers);
    }
}

/// Argument of [`on_denial`](crate::ApiKeyAuthLayer::on_denial): the denial, and what is needed to create the
/// response.
#[derive(Debug)]
pub struct DeniedRequest<'a> {
    denial: &'a Denial,
    summary: &'a RequestSummary,
}

impl<'a> DeniedRequest<'a> {
    pub(super) fn new(denial: &'a Denial, summary: &'a RequestSummary) -> Self {
        Self { denial, summary }
    }

    /// Returns the reason of the denial.
    pub fn denial(&self) -> &Denial {
        self.denial
    }

    /// Returns the status of the default response.
    pub fn status(&self) -> StatusCode {
        self.denial.status()
    }

    /// Returns the method of the request.
    pub fn method(&self) -> &Method {
        &self.line().0
    }

    /// Returns the URI of the request, as this layer received it.
    pub fn uri(&self) -> &Uri {
        &self.line().1
    }

    fn line(&self) -> &(Method, Uri) {
        static NOT_STORED: LazyLock<(Method, Uri)> = LazyLock::new(Default::default);
        self.summary.line.as_deref().unwrap_or(&NOT_STORED)
    }

    fn presentation(&self) -> &'a Presentation {
        self.summary.presentation()
    }

    /// Returns a sentence that may be sent to the caller.
    pub fn detail(&self) -> String {
        if self.presentation().verbose {
            self.denial.verbose_detail()
        } else {
            self.denial.detail()
        }
    }

    /// Returns the default response: `application/problem+json` (RFC 9457). A custom response can start from it.
    pub fn default_response(&self) -> Response<Bytes> {
        problem::problem_json(self)
    }

    /// Creates a response with the status of the denial and its header fields: `WWW-Authenticate` and `Retry-After`.
    pub fn respond_with(
        &self,
        content_type: &'static str,
        body: impl Into<Bytes>,
    ) -> Response<Bytes> {
        let mut response = Response::new(body.into());
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        if let Ok(content_type) = HeaderValue::try_from(content_type) {
            headers.insert(header::CONTENT_TYPE, content_type);
        }
        for challenge in self.challenges() {
            headers.append(header::WWW_AUTHENTICATE, challenge);
        }
        write_limits(self.denial, headers);
        response
    }

    /// Returns the challenges (RFC 6750 §3): one on every 401, and on a 400 or 403 that has an error code.
    fn challenges(&self) -> impl Iterator<Item = HeaderValue> {
        let realm = &self.presentation().realm.0;
        let offers_bearer = self.presentation().offers_bearer;
        let mut bearer = format!("Bearer realm=\"{realm}\"");
        let code = self.denial.error_code();
        if let Some(code) = code {
            bearer.push_str(&format!(", error=\"{code}\""));
        }
        if let Denial::Forbidden(Forbidden::Scope(scope)) = self.denial {
            bearer.push_str(&format!(", scope=\"{}\"", quoted(scope)));
        }
        let is_unauthorized = self.status() == StatusCode::UNAUTHORIZED;
        let basic = (is_unauthorized && self.presentation().offers_basic)
            .then(|| format!("Basic realm=\"{realm}\", charset=\"UTF-8\""));
        let bearer = (offers_bearer && (is_unauthorized || code.is_some())).then_some(bearer);
        bearer.into_iter().chain(basic).filter_map(|challenge| challenge.try_into().ok())
    }

    /// Creates the complete response, in the protocol of the caller.
    pub(super) fn response(&self) -> Response<Bytes> {
        let mut response = match (&self.summary.grpc, &self.presentation().on_denial) {
            (Some(content_type), _) => grpc::trailers_only(self, content_type),
            (None, Some(OnDenial(respond))) => respond(self),
            (None, None) => self.default_response(),
        };
        if response.status().is_success() && self.summary.grpc.is_none() {
            // A closure that sets no status must not turn a denial into a success.
            *response.status_mut() = self.status();
        }
        // A shared cache may store some statuses by default or by its configuration. A denial must not be served to
        // other callers.
        response.headers_mut().insert(header::CACHE_CONTROL, NO_STORE);
        if self.summary.is_head {
            // The length of the response to a GET (RFC 9110 §8.6).
            let length = std::mem::take(response.body_mut()).len();
            if self.summary.grpc.is_none() {
                response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
            }
        }
        response.extensions_mut().insert(self.denial.clone());
        response
    }
}
