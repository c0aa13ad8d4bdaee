//! A refusal on its way out: [`Refusal`], and what decides how it looks.

use std::{
    fmt,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, Uri, header};

use super::{Denial, grpc, problem};
use crate::credential::RequestHead;

/// What [`on_denial`](crate::ApiKeyAuthLayer::on_denial) gets: the denial, and what is needed to
/// answer it.
#[derive(Debug)]
pub struct Refusal<'a> {
    denial: &'a Denial,
    asker: &'a Asker,
    presentation: &'a Presentation,
}

impl Refusal<'_> {
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
        &self.asker.method
    }

    /// The URI of the request, as this layer saw it.
    pub fn uri(&self) -> &Uri {
        static NOT_KEPT: LazyLock<Uri> = LazyLock::new(Uri::default);
        self.asker.uri.as_deref().unwrap_or(&NOT_KEPT)
    }

    /// A sentence that the caller may see.
    pub fn detail(&self) -> String {
        if self.presentation.verbose {
            self.denial.verbose_detail()
        } else {
            self.denial.public_detail()
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
        if let Some(seconds) = self.retry_after_seconds() {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }

    /// Whole seconds, at least one.
    pub(super) fn retry_after_seconds(&self) -> Option<u64> {
        let wait = self.denial.retry_after()?;
        Some(wait.as_millis().div_ceil(1000).clamp(1, 3600) as u64)
    }

    /// RFC 6750 §3: a challenge on every 401, and on a 400 or 403 that has an error code.
    fn challenges(&self) -> impl Iterator<Item = HeaderValue> {
        let realm = &self.presentation.realm.0;
        let offers_bearer = self.presentation.offers_bearer;
        let mut bearer = format!("Bearer realm=\"{realm}\"");
        let code = self.denial.error_code();
        if let Some(code) = code {
            bearer.push_str(&format!(", error=\"{code}\""));
        }
        if let Denial::Forbidden(super::Forbidden::Scope(scope)) = self.denial {
            bearer.push_str(&format!(", scope=\"{}\"", quoted(scope)));
        }
        let is_unauthorized = self.status() == StatusCode::UNAUTHORIZED;
        let basic = (is_unauthorized && self.presentation.offers_basic)
            .then(|| format!("Basic realm=\"{realm}\", charset=\"UTF-8\""));
        let bearer = (offers_bearer && (is_unauthorized || code.is_some())).then_some(bearer);
        bearer.into_iter().chain(basic).filter_map(|challenge| challenge.try_into().ok())
    }

    /// The whole response, in the shape that the caller can read.
    pub(super) fn response(&self) -> Response<Bytes> {
        let mut response = match (&self.asker.grpc, &self.presentation.on_denial) {
            (Some(content_type), _) => grpc::trailers_only(self, content_type.clone()),
            (None, Some(OnDenial(respond))) => respond(self),
            (None, None) => self.default_response(),
        };
        if self.asker.method == Method::HEAD {
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

/// Escapes what ends a quoted string (RFC 9110 §5.6.4) and drops what it can't hold.
fn quoted(text: &str) -> String {
    let visible = text.chars().filter(|c| *c == ' ' || c.is_ascii_graphic());
    visible.flat_map(|c| matches!(c, '"' | '\\').then_some('\\').into_iter().chain([c])).collect()
}

/// The realm of a challenge, as it stands between the quotes.
#[derive(Debug, Clone)]
pub(crate) struct Realm(String);

impl Realm {
    /// `None` if a quoted string can't hold `text` or it is longer than 256 bytes.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let holds = text.len() <= 256 && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
        holds.then(|| Self(quoted(text)))
    }
}

type Respond = dyn Fn(&Refusal<'_>) -> Response<Bytes> + Send + Sync;

/// What makes the body of a refusal instead of the default.
#[derive(Clone)]
pub(crate) struct OnDenial(pub(crate) Arc<Respond>);

impl fmt::Debug for OnDenial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnDenial")
    }
}

/// How a layer's refusals look.
#[derive(Debug, Clone)]
pub(crate) struct Presentation {
    pub(crate) realm: Realm,
    /// Also where neither scheme is: a 401 has a challenge (RFC 9110 §15.5.2).
    pub(crate) offers_bearer: bool,
    pub(crate) offers_basic: bool,
    pub(crate) verbose: bool,
    pub(crate) on_denial: Option<OnDenial>,
}

impl Default for Presentation {
    fn default() -> Self {
        Self {
            realm: Realm("api".to_owned()),
            offers_bearer: true,
            offers_basic: false,
            verbose: false,
            on_denial: None,
        }
    }
}

impl Presentation {
    /// What must be kept of a request to answer it after it has gone to the inner service.
    pub(crate) fn asker(&self, head: &RequestHead<'_>) -> Asker {
        let uri = self.on_denial.as_ref().map(|_| Box::new(head.uri().clone()));
        let method = head.method().clone();
        Asker { method, uri, grpc: grpc::content_type(head.headers()).cloned() }
    }

    pub(crate) fn response(&self, denial: &Denial, asker: &Asker) -> Response<Bytes> {
        Refusal { denial, asker, presentation: self }.response()
    }

    /// Whether something behind the layer has refused the request.
    pub(crate) fn is_refusal<B>(response: &Response<B>) -> bool {
        response.extensions().get::<Unshaped>().is_some()
    }

    /// Gives a refusal from behind the layer the right shape, if `inner` is one. What others have put
    /// into its head, such as CORS fields, stays.
    pub(crate) fn reshaped<B>(
        &self,
        inner: Response<B>,
        asker: &Asker,
    ) -> Result<Response<Bytes>, Response<B>> {
        let (mut head, body) = inner.into_parts();
        let denial =
            head.extensions.get::<Unshaped>().and_then(|_| head.extensions.get::<Denial>());
        let Some(denial) = denial.cloned() else { return Err(Response::from_parts(head, body)) };
        head.extensions.remove::<Unshaped>();
        let (shaped, body) = self.response(&denial, asker).into_parts();
        for name in [header::CONTENT_LENGTH, header::WWW_AUTHENTICATE, header::RETRY_AFTER] {
            head.headers.remove(name);
        }
        for name in shaped.headers.keys() {
            head.headers.remove(name);
        }
        head.headers.extend(shaped.headers);
        head.extensions.extend(shaped.extensions);
        head.status = shaped.status;
        Ok(Response::from_parts(head, body))
    }
}

impl Denial {
    /// A response for a handler or a guard to return, in the default shape. An
    /// [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer) around it gives it its own: realm, `on_denial`,
    /// gRPC.
    pub fn response(&self) -> Response<Bytes> {
        let mut response = Presentation::default().response(self, &Asker::default());
        response.extensions_mut().insert(Unshaped);
        response
    }
}

/// Who is to be answered.
#[derive(Default)]
pub(crate) struct Asker {
    method: Method,
    /// `None` where no responder would look at it: a clone costs on every request.
    uri: Option<Box<Uri>>,
    /// The content type, if it is one of gRPC's.
    grpc: Option<HeaderValue>,
}

/// A key may stand in the query.
impl fmt::Debug for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Asker")
            .field("method", &self.method)
            .field("path", &self.uri.as_deref().map(Uri::path))
            .finish_non_exhaustive()
    }
}

/// In a response's extensions: its denial was answered in the default shape by something behind the
/// layer, which is to give it the right one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unshaped;
