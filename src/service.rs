//! [`ApiKeyAuth`]: what happens to a request when it arrives.

use std::{
    mem,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use tower_service::Service;

use crate::{
    authenticate::{Authenticator, check_address},
    body::ResponseBody,
    cache::{LookupFuture, Recall},
    context::{AuthContext, LetThrough},
    credential::{self, Found, RequestHead},
    future::{Held, ResponseFuture},
    layer::Options,
    respond::{Asker, Denial, Forbidden, Presentation},
};

/// The service of an [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer).
#[derive(Debug, Clone)]
pub struct ApiKeyAuth<S> {
    inner: S,
    gate: Arc<Gate>,
}

impl<S> ApiKeyAuth<S> {
    pub(crate) fn new(inner: S, authenticator: Authenticator, options: Options) -> Self {
        let presentation = options.presentation.clone().shared();
        Self { inner, gate: Arc::new(Gate { authenticator, options, presentation }) }
    }

    /// The inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// The inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Gives up the layer and returns the inner service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S, B, R> Service<Request<B>> for ApiKeyAuth<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> ResponseFuture<S, B> {
        let head = RequestHead::of(&request);
        let asker = Asker::new(&head, self.gate.presentation.as_ref());
        let admitted = match self.gate.decide(&head) {
            Decision::Pass => Ok(()),
            Decision::LetThrough => {
                // No context but this layer's own may reach the inner service.
                request.extensions_mut().remove::<AuthContext>();
                request.extensions_mut().insert(LetThrough);
                Ok(())
            }
            Decision::Known { caller, places } => self.gate.let_in(&mut request, caller, places),
            Decision::LookUp { lookup, places } => {
                let gate = Arc::clone(&self.gate);
                let held = Held { request, places, ready: self.take_ready(), gate };
                return ResponseFuture::look_up(asker, lookup, held);
            }
            Decision::Refuse(denial) => Err(denial),
        };
        match admitted {
            Ok(()) => ResponseFuture::pass(asker, self.inner.call(request)),
            Err(denial) => {
                // The instance that is ready may hold a permit for the call that will not come.
                drop(self.take_ready());
                ResponseFuture::refuse(asker, denial)
            }
        }
    }
}

impl<S: Clone> ApiKeyAuth<S> {
    /// Takes the instance that was polled ready and leaves a clone, which was not.
    fn take_ready(&mut self) -> S {
        let clone = self.inner.clone();
        mem::replace(&mut self.inner, clone)
    }
}

/// Who decides on a request, before and after the look-up.
#[derive(Debug)]
pub(crate) struct Gate {
    authenticator: Authenticator,
    options: Options,
    presentation: Option<Arc<Presentation>>,
}

/// What can be said of a request at once. `places` has the key.
enum Decision {
    /// This layer has let it in before.
    Pass,
    /// As the options say, without a key.
    LetThrough,
    Known {
        caller: AuthContext,
        places: u64,
    },
    LookUp {
        lookup: LookupFuture,
        places: u64,
    },
    Refuse(Denial),
}

impl Gate {
    fn decide(&self, head: &RequestHead<'_>) -> Decision {
        if let Some(caller) = head.extensions().get::<AuthContext>()
            && self.authenticator.made(caller)
        {
            return Decision::Pass;
        }
        if self.options.skip.as_ref().is_some_and(|skip| (skip.0)(head)) {
            return Decision::LetThrough;
        }
        let credentials = &self.options.credentials;
        if let Some((bytes, places)) = credential::at_a_glance(credentials, head.headers())
            && let Some(caller) = self.authenticator.recall_known(bytes)
        {
            return Decision::Known { caller, places };
        }
        let Found { token, places } = match credential::find(credentials, head) {
            Ok(Some(found)) => found,
            Ok(None) if self.options.is_optional => return Decision::LetThrough,
            Ok(None) => return Decision::Refuse(Denial::MissingCredential),
            Err(denial) => return Decision::Refuse(denial),
        };
        match self.authenticator.recall(&token) {
            Recall::Known(caller) => Decision::Known { caller, places },
            Recall::Refused(reason) => Decision::Refuse(reason.into()),
            Recall::Nothing => match self.authenticator.parse(&token) {
                Ok(key) => {
                    let address = self.options.client.find(head);
                    let lookup = self.authenticator.look_up(key, address);
                    Decision::LookUp { lookup, places }
                }
                Err(denial) => Decision::Refuse(denial),
            },
        }
    }

    /// Judges what depends on the request, and makes it ready for the inner service. `places` has the key.
    pub(crate) fn let_in<B>(
        &self,
        request: &mut Request<B>,
        caller: AuthContext,
        places: u64,
    ) -> Result<(), Denial> {
        let head = RequestHead::of(request);
        if caller.is_restricted() {
            check_address(&caller, || self.options.client.find(&head))?;
            if !caller.can_access_endpoint(head.method(), head.endpoint()) {
                return Err(Forbidden::Endpoint.into());
            }
        }
        self.options.key_header.treat(&self.options.credentials, places, request.headers_mut());
        caller.count_request();
        request.extensions_mut().insert(caller);
        Ok(())
    }
}
