//! A refusal on its way out: [`DeniedRequest`].

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

/// Writes `Retry-After`, in whole seconds and at least one, and what is left of each rate limit.
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

/// What [`on_denial`](crate::ApiKeyAuthLayer::on_denial) gets: the denial, and what is needed to
/// answer it.
#[derive(Debug)]
pub struct DeniedRequest<'a> {
    denial: &'a Denial,
    asker: &'a RequestSummary,
}

impl<'a> DeniedRequest<'a> {
    pub(super) fn new(denial: &'a Denial, asker: &'a RequestSummary) -> Self {
        Self { denial, asker }
    }

    /// Why the request is refused.
    pub fn denial(&self) -> &Denial {
        self.denial
    }

    /// The status that the default response has.
    pub fn status(&self) -> StatusCode {
        self.denial.status()
    }

    /// The method of the request.
    pub fn method(&self) -> &Method {
        &self.line().0
    }

    /// The URI of the request, as this layer saw it.
    pub fn uri(&self) -> &Uri {
        &self.line().1
    }

    fn line(&self) -> &(Method, Uri) {
        static NOT_KEPT: LazyLock<(Method, Uri)> = LazyLock::new(Default::default);
        self.asker.line.as_deref().unwrap_or(&NOT_KEPT)
    }

    fn presentation(&self) -> &'a Presentation {
        self.asker.presentation()
    }

    /// A sentence that the caller may see.
    pub fn detail(&self) -> String {
        if self.presentation().verbose {
            self.denial.verbose_detail()
        } else {
            self.denial.detail()
        }
    }

    /// The default response: `application/problem+json` (RFC 9457). A starting point for one of
    /// your own.
    pub fn default_response(&self) -> Response<Bytes> {
        problem::problem_json(self)
    }

    /// A response of the right status with the header fields that go with it: `WWW-Authenticate`
    /// and `Retry-After`.
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

    /// RFC 6750 §3: a challenge on every 401, and on a 400 or 403 that has an error code.
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

    /// The whole response, in the shape that the caller can read.
    pub(super) fn response(&self) -> Response<Bytes> {
        let mut response = match (&self.asker.grpc, &self.presentation().on_denial) {
            (Some(content_type), _) => grpc::trailers_only(self, content_type),
            (None, Some(OnDenial(respond))) => respond(self),
            (None, None) => self.default_response(),
        };
        if response.status().is_success() && self.asker.grpc.is_none() {
            // A closure that sets no status must not make a denial look like success.
            *response.status_mut() = self.status();
        }
        // A status that a shared cache would store by itself, or is set up to store, is no answer for others.
        response.headers_mut().insert(header::CACHE_CONTROL, NO_STORE);
        if self.asker.is_head {
            // The length of what GET would get (RFC 9110 §8.6).
            let length = std::mem::take(response.body_mut()).len();
            if self.asker.grpc.is_none() {
                response.headers_mut().insert(header::CONTENT_LENGTH, length.into());
            }
        }
        response.extensions_mut().insert(self.denial.clone());
        response
    }
}
