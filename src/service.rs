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
        Self { inner, gate: Arc::new(Gate { authenticator, options }) }
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
        let asker = self.gate.options.presentation.asker(&RequestHead::of(&request));
        let gate = Arc::clone(&self.gate);
        match self.gate.admit(&mut request) {
            Admission::Pass => ResponseFuture::pass(gate, asker, self.inner.call(request)),
            Admission::LookUp { lookup, places } => {
                let held = Held { request, places, ready: self.take_ready() };
                ResponseFuture::look_up(gate, asker, lookup, held)
            }
            Admission::Refuse(denial) => {
                // The instance that is ready may hold a permit for the call that will not come.
                drop(self.take_ready());
                ResponseFuture::refuse(gate, asker, denial)
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
}

/// What can be said of a request at once.
enum Admission {
    Pass,
    /// With the places that the key is in.
    LookUp {
        lookup: LookupFuture,
        places: u64,
    },
    Refuse(Denial),
}

impl Gate {
    fn admit<B>(&self, request: &mut Request<B>) -> Admission {
        let head = RequestHead::of(request);
        if let Some(caller) = head.extensions().get::<AuthContext>()
            && self.authenticator.made(caller)
        {
            return Admission::Pass;
        }
        // No context but this layer's own may reach the inner service.
        if self.options.skip.as_ref().is_some_and(|skip| (skip.0)(&head)) {
            return let_through(request);
        }
        if let Some((bytes, places)) = credential::sole(&self.options.credentials, &head)
            && let Some(caller) = self.authenticator.recall_known(bytes)
        {
            return self.pass(request, caller, places);
        }
        let found = match credential::find(&self.options.credentials, &head) {
            Ok(Some(found)) => found,
            Ok(None) if self.options.is_optional => return let_through(request),
            Ok(None) => return Admission::Refuse(Denial::MissingCredential),
            Err(denial) => return Admission::Refuse(denial),
        };
        let caller = match self.authenticator.recall(&found.token) {
            Recall::Known(caller) => caller,
            Recall::Refused(reason) => return Admission::Refuse(reason.into()),
            Recall::Nothing => return self.ask(&found, &head),
        };
        let places = found.places;
        self.pass(request, caller, places)
    }

    fn pass<B>(&self, request: &mut Request<B>, caller: AuthContext, places: u64) -> Admission {
        match self.let_in(request, caller, places) {
            Ok(()) => Admission::Pass,
            Err(denial) => Admission::Refuse(denial),
        }
    }

    fn ask(&self, found: &Found<'_>, head: &RequestHead<'_>) -> Admission {
        match self.authenticator.parse(&found.token) {
            Ok(key) => {
                let address = self.options.client.find(head);
                let lookup = self.authenticator.look_up(key, address);
                Admission::LookUp { lookup, places: found.places }
            }
            Err(denial) => Admission::Refuse(denial),
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
        check_address(&caller, || self.options.client.find(&head))?;
        if !caller.can_access_endpoint(head.method(), head.endpoint()) {
            return Err(Forbidden::Endpoint.into());
        }
        self.options.key_header.treat(&self.options.credentials, places, request.headers_mut());
        request.extensions_mut().insert(caller);
        Ok(())
    }

    /// The inner service's response, in the layer's shape if it is a refusal.
    pub(crate) fn reshape<R>(
        &self,
        inner: Response<R>,
        asker: &Asker,
    ) -> Response<ResponseBody<R>> {
        if !Presentation::is_refusal(&inner) {
            return inner.map(ResponseBody::inner);
        }
        match self.options.presentation.reshaped(inner, asker) {
            Ok(refusal) => refusal.map(ResponseBody::refusal),
            Err(answer) => answer.map(ResponseBody::inner),
        }
    }

    /// The response to a request that is refused.
    pub(crate) fn response<R>(&self, denial: &Denial, asker: &Asker) -> Response<ResponseBody<R>> {
        self.options.presentation.response(denial, asker).map(ResponseBody::refusal)
    }
}

fn let_through<B>(request: &mut Request<B>) -> Admission {
    request.extensions_mut().remove::<AuthContext>();
    request.extensions_mut().insert(LetThrough);
    Admission::Pass
}
