//! Keeps what is needed of a request to answer it: [`RequestSummary`].

use std::{fmt, sync::Arc};

use bytes::Bytes;
use http::{Method, Response, Uri, header};

use super::{denied_request::DeniedRequest, grpc, presentation::Presentation};
use crate::{
    denial::Denial,
    middleware::{body::ResponseBody, credential::RequestHead},
};

/// Parts of a request that are needed for its response after the inner service has taken it.
#[derive(Default)]
pub(crate) struct RequestSummary {
    pub(super) is_head: bool,
    /// Method and URI; `None` if there is no `on_denial` closure to read them, because a clone has a cost for every
    /// request.
    pub(super) line: Option<Box<(Method, Uri)>>,
    pub(super) grpc: Option<grpc::ContentType>,
    /// `None` for the default settings.
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
            None => Presentation::default_settings(),
        }
    }

    /// Creates the response to a denied request.
    pub(crate) fn deny<B>(&self, denial: &Denial) -> Response<ResponseBody<B>> {
        DeniedRequest::new(denial, self).response().map(ResponseBody::denial)
    }

    /// Returns the response of the inner service, formatted for this layer if the inner service has denied the
    /// request. Header fields that other layers have added, such as CORS fields, are kept.
    #[inline]
    pub(crate) fn format<B>(&self, inner: Response<B>) -> Response<ResponseBody<B>> {
        if inner.extensions().get::<DefaultFormat>().is_none() {
            return inner.map(ResponseBody::inner);
        }
        let Some(denial) = inner.extensions().get::<Denial>().cloned() else {
            return inner.map(ResponseBody::inner);
        };
        let (mut head, _) = inner.into_parts();
        head.extensions.remove::<DefaultFormat>();
        let (formatted, body) = DeniedRequest::new(&denial, self).response().into_parts();
        for name in [header::CONTENT_LENGTH, header::WWW_AUTHENTICATE, header::RETRY_AFTER] {
            head.headers.remove(name);
        }
        for name in formatted.headers.keys() {
            head.headers.remove(name);
        }
        head.headers.extend(formatted.headers);
        head.extensions.extend(formatted.extensions);
        head.status = formatted.status;
        Response::from_parts(head, ResponseBody::denial(body))
    }
}

impl Denial {
    /// Creates a response for a handler or a guard to return, in the default format. An
    /// [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer) around it formats it by its own settings: realm, `on_denial`,
    /// gRPC.
    pub fn response(&self) -> Response<Bytes> {
        let mut response = DeniedRequest::new(self, &RequestSummary::default()).response();
        response.extensions_mut().insert(DefaultFormat);
        response
    }
}

/// Omits the query, which may contain a key.
impl fmt::Debug for RequestSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestSummary")
            .field("is_head", &self.is_head)
            .field("path", &self.line.as_deref().map(|(_, uri)| uri.path()))
            .finish_non_exhaustive()
    }
}

/// Extension of a response whose denial was formatted by default behind the layer. The layer formats it by its
/// settings.
#[derive(Debug, Clone, Copy)]
struct DefaultFormat;
