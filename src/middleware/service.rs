//! [`ApiKeyAuth`]: what happens to a request when it arrives.

use std::{
    mem,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Request, Response};
use http_body::Body;
use tower_service::Service;

use super::{
    body::ResponseBody,
    credential::{self, Misplaced, RequestHead},
    discard::DiscardLimits,
    future::ResponseFuture,
    gated_call::{Gate, GatedCall},
    layer::Options,
    response::{Presentation, RequestSummary},
};
use crate::{
    authenticator::{Authenticator, Cached, LookupFuture, check_address},
    context::{AuthContext, LetThrough},
    denial::{Denial, Forbidden, MalformedCredential},
};

/// The service of an [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer).
#[derive(Debug, Clone)]
pub struct ApiKeyAuth<S> {
    inner: S,
    rules: Arc<Rules>,
}

impl<S> ApiKeyAuth<S> {
    pub(crate) fn new(inner: S, authenticator: Authenticator, options: Options) -> Self {
        let presentation = options.presentation.clone().shared();
        Self { inner, rules: Arc::new(Rules { authenticator, options, presentation }) }
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
    B: Body,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> ResponseFuture<S, B> {
        let head = RequestHead::of(&request);
        let asker = RequestSummary::new(&head, self.rules.presentation.as_ref());
        let gate = AuthGate { asker, pending: None };
        let admitted = match self.rules.decide(&head) {
            Decision::Pass => Ok(()),
            Decision::LetThrough => {
                self.rules.let_through(&mut request);
                Ok(())
            }
            Decision::Known { caller, places } => self.rules.let_in(&mut request, caller, places),
            Decision::LookUp { lookup, places } => {
                // The look-up may take as long as the store's time-outs. The instance that is ready may hold a
                // permit, which requests with a cached key need meanwhile.
                let inner = self.inner.clone();
                drop(self.take_ready());
                let pending = Some(Box::new(Pending { rules: Arc::clone(&self.rules), places }));
                let gate = AuthGate { pending, ..gate };
                return ResponseFuture { call: GatedCall::deciding(gate, lookup, request, inner) };
            }
            Decision::Refuse(denial) => Err(denial),
        };
        let call = match admitted {
            Ok(()) => GatedCall::inner(gate, self.inner.call(request)),
            Err(denial) => {
                // The instance that is ready may hold a permit for the call that will not come.
                drop(self.take_ready());
                GatedCall::denied(gate, denial, request)
            }
        };
        ResponseFuture { call }
    }
}

impl<S: Clone> ApiKeyAuth<S> {
    /// Takes the instance that was polled ready and leaves a clone, which was not.
    fn take_ready(&mut self) -> S {
        let clone = self.inner.clone();
        mem::replace(&mut self.inner, clone)
    }
}

/// The decision about one request, and the shape of its response.
pub(crate) struct AuthGate {
    asker: RequestSummary,
    /// For a request that waits for a look-up.
    pending: Option<Box<Pending>>,
}

struct Pending {
    rules: Arc<Rules>,
    /// The places that the key is in.
    places: u64,
}

impl Gate for AuthGate {
    type Permission = AuthContext;

    fn admit<B>(&mut self, request: &mut Request<B>, caller: AuthContext) -> Result<(), Denial> {
        // Always there, because this is called once; without the rules nothing is let in.
        let Some(pending) = self.pending.take() else { return Err(Denial::LayerMissing) };
        pending.rules.let_in(request, caller, pending.places)
    }

    #[inline]
    fn finish<R>(&mut self, response: Response<R>) -> Response<ResponseBody<R>> {
        self.asker.reshape(response)
    }

    fn deny<R>(&self, denial: &Denial) -> Response<ResponseBody<R>> {
        self.asker.refuse(denial)
    }

    fn discard_limits<B>(&self, _: &Request<B>) -> DiscardLimits {
        self.asker.presentation().discard
    }
}

/// What decides on a request, before and after the look-up.
#[derive(Debug)]
struct Rules {
    authenticator: Authenticator,
    options: Options,
    presentation: Option<Arc<Presentation>>,
}

const UNKNOWN_PEER: &str = "serve axum with into_make_service_with_connect_info::<SocketAddr>(), insert \
    ClientAddr into the extensions of requests, or set client_ip on the layer";

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

impl Rules {
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
            && let Some(caller) = self.authenticator.cached_context(bytes)
        {
            return Decision::Known { caller, places };
        }
        let found = match credential::find(credentials, head) {
            Ok(Some(found)) => found,
            Ok(None) if self.has_misplaced_key(head) => {
                return Decision::Refuse(MalformedCredential::NoBearer.into());
            }
            Ok(None) if self.options.is_optional => return Decision::LetThrough,
            Ok(None) => return Decision::Refuse(Denial::MissingCredential),
            Err(denial) => return Decision::Refuse(denial),
        };
        let places = found.places;
        match self.authenticator.cached(&found.token) {
            Cached::Hit(caller) => Decision::Known { caller, places },
            Cached::Negative(reason) => Decision::Refuse(reason.into()),
            Cached::Miss => match self.authenticator.parse(&found.token) {
                Ok(key) => {
                    let address = self.options.client.find(head);
                    let lookup = self.authenticator.look_up(key, address);
                    Decision::LookUp { lookup, places }
                }
                // Not before: keys of another service may have other characters.
                Err(_) if found.breaks_bearer_grammar(credentials) => {
                    Decision::Refuse(MalformedCredential::NotB64Token.into())
                }
                Err(denial) => Decision::Refuse(denial),
            },
        }
    }

    /// Whether the request has a key in `Authorization` that is not behind `Bearer`. Without a word about it, it
    /// would be a request without a key, which an optional layer lets through.
    fn has_misplaced_key(&self, head: &RequestHead<'_>) -> bool {
        match Misplaced::of(&self.options.credentials, head.headers()) {
            Some(Misplaced::Structured(text)) => self.authenticator.has_structured_key(text),
            Some(Misplaced::Any(text)) => self.authenticator.parse(text).is_ok(),
            None => false,
        }
    }

    /// Prepares a request that passes without a key.
    fn let_through<B>(&self, request: &mut Request<B>) {
        // No context but this layer's own may reach the inner service.
        request.extensions_mut().remove::<AuthContext>();
        request.extensions_mut().insert(LetThrough);
        self.pass_on(request);
    }

    /// Judges what depends on the request, and makes it ready for the inner service. `places` has the key.
    fn let_in<B>(
        &self,
        request: &mut Request<B>,
        caller: AuthContext,
        places: u64,
    ) -> Result<(), Denial> {
        let head = RequestHead::of(request);
        if caller.is_restricted() {
            let address = || {
                let address = self.options.client.find(&head);
                if address.is_none() && !self.options.client.has_peer(&head) {
                    self.authenticator.address_is_unknown(UNKNOWN_PEER);
                }
                address
            };
            check_address(&caller, address)?;
            if !caller.can_access_endpoint(head.method(), head.endpoint()) {
                return Err(Forbidden::Endpoint.into());
            }
        }
        self.options.key_header.treat(&self.options.credentials, places, request.headers_mut());
        caller.count_request();
        request.extensions_mut().insert(caller);
        self.pass_on(request);
        Ok(())
    }

    /// Passes settings on to guards, where they are not the default.
    fn pass_on<B>(&self, request: &mut Request<B>) {
        if let Some(presentation) = &self.presentation
            && presentation.discard != DiscardLimits::default()
        {
            request.extensions_mut().insert(presentation.discard);
        }
    }
}
