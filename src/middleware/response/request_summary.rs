//! Who is to be answered if a request is refused: [`RequestSummary`].

use std::{fmt, sync::Arc};

use bytes::Bytes;
use http::{Method, Response, Uri, header};

use super::{denied_request::DeniedRequest, grpc, presentation::Presentation};
use crate::{
    denial::Denial,
    middleware::{body::ResponseBody, credential::RequestHead},
};

/// What must be kept of a request to answer it after it has gone to the inner service.
#[derive(Default)]
pub(crate) struct RequestSummary {
    pub(super) is_head: bool,
    /// Method and URI; `None` where no responder would look at them: a clone costs on every request.
    pub(super) line: Option<Box<(Method, Uri)>>,
    pub(super) grpc: Option<grpc::ContentType>,
    /// `None` for the common one.
    presentation: Option<Arc<Presentation>>,
}

impl RequestSummary {
    pub(crate) fn new(head: &RequestHead<'_>, presentation: Option<&Arc<Presentation>>) -> Self {
        let has_responder = presentation.is_some_and(|it| it.on_denial.is_some());
        Self {
            is_head: head.method() == Method::HEAD,
            line: has_responder.then(|| Box::new((head.method().clone(), head.uri().clone()))),
            grpc: match presentation {
                Some(presentation) if presentation.is_http_only => None,
                _ => grpc::ContentType::of(head),
            },
            presentation: presentation.cloned(),
        }
    }

    pub(crate) fn presentation(&self) -> &Presentation {
        match &self.presentation {
            Some(presentation) => presentation,
            None => Presentation::common(),
        }
    }

    /// The response to a request that is refused.
    pub(crate) fn refuse<B>(&self, denial: &Denial) -> Response<ResponseBody<B>> {
        DeniedRequest::new(denial, self).response().map(ResponseBody::refusal)
    }

    /// The response of the inner service, in the right shape if something there has refused the request. What
    /// others have put into its head, such as CORS fields, stays.
    #[inline]
    pub(crate) fn reshape<B>(&self, inner: Response<B>) -> Response<ResponseBody<B>> {
        if inner.extensions().get::<Unshaped>().is_none() {
            return inner.map(ResponseBody::inner);
        }
        let Some(denial) = inner.extensions().get::<Denial>().cloned() else {
            return inner.map(ResponseBody::inner);
        };
        let (mut head, _) = inner.into_parts();
        head.extensions.remove::<Unshaped>();
        let (shaped, body) = DeniedRequest::new(&denial, self).response().into_parts();
        for name in [header::CONTENT_LENGTH, header::WWW_AUTHENTICATE, header::RETRY_AFTER] {
            head.headers.remove(name);
        }
        for name in shaped.headers.keys() {
            head.headers.remove(name);
        }
        head.headers.extend(shaped.headers);
        head.extensions.extend(shaped.extensions);
        head.status = shaped.status;
        Response::from_parts(head, ResponseBody::refusal(body))
    }
}

impl Denial {
    /// A response for a handler or a guard to return, in the default shape. An
    /// [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer) around it gives it its own: realm, `on_denial`,
    /// gRPC.
    pub fn response(&self) -> Response<Bytes> {
        let mut response = DeniedRequest::new(self, &RequestSummary::default()).response();
        response.extensions_mut().insert(Unshaped);
        response
    }
}

/// A key may stand in the query.
impl fmt::Debug for RequestSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestSummary")
            .field("is_head", &self.is_head)
            .field("path", &self.line.as_deref().map(|(_, uri)| uri.path()))
            .finish_non_exhaustive()
    }
}

/// In a response's extensions: its denial was answered in the default shape by something behind the
/// layer, which is to give it the right one.
#[derive(Debug, Clone, Copy)]
struct Unshaped;
