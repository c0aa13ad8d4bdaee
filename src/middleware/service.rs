//! The service of the auth layer: [`ApiKeyAuth`].

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
    key::KeyDigest,
};

/// Service of an [`ApiKeyAuthLayer`](crate::ApiKeyAuthLayer).
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

    /// Returns a reference to the inner service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns a mutable reference to the inner service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Consumes the auth service and returns the inner service.
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
        let summary = RequestSummary::new(&head, self.rules.presentation.as_ref());
        let gate = AuthGate { summary, pending: None };
        let admitted = match self.rules.decide(&head) {
            Decision::Pass => Ok(()),
            Decision::LetThrough => {
                self.rules.let_through(&mut request);
                Ok(())
            }
            Decision::Cached { caller, places } => self.rules.admit(&mut request, caller, places),
            Decision::LookUp { lookup, places } => {
                // A look-up may take as long as the store's timeouts. The ready instance may hold a permit, which
                // requests with a cached key need in the meantime.
                let inner = self.inner.clone();
                drop(self.take_ready());
                let pending = Some(Box::new(Pending { rules: Arc::clone(&self.rules), places }));
                let gate = AuthGate { pending, ..gate };
                return ResponseFuture { call: GatedCall::deciding(gate, lookup, request, inner) };
            }
            Decision::Deny(denial) => Err(denial),
        };
        let call = match admitted {
            Ok(()) => GatedCall::inner(gate, self.inner.call(request)),
            Err(denial) => {
                // Drops the ready instance: it may hold a permit for the call, which will not come.
                drop(self.take_ready());
                GatedCall::denied(gate, denial, request)
            }
        };
        ResponseFuture { call }
    }
}

impl<S: Clone> ApiKeyAuth<S> {
    /// Takes the instance that was polled ready, and leaves a clone, which was not polled.
    fn take_ready(&mut self) -> S {
        let clone = self.inner.clone();
        mem::replace(&mut self.inner, clone)
    }
}

/// Decision on one request, and the format of its response.
pub(crate) struct AuthGate {
    summary: RequestSummary,
    /// Set for a request that waits for a look-up.
    pending: Option<Box<Pending>>,
}

struct Pending {
    rules: Arc<Rules>,
    /// Bit set of the places that contain the key.
    places: u64,
}

impl Gate for AuthGate {
    type Permission = AuthContext;

    fn admit<B>(&mut self, request: &mut Request<B>, caller: AuthContext) -> Result<(), Denial> {
        // Always set, because this is called once. Without the rules, the request is denied.
        let Some(pending) = self.pending.take() else { return Err(Denial::LayerMissing) };
        pending.rules.admit(request, caller, pending.places)
    }

    #[inline]
    fn finish<R>(&mut self, response: Response<R>) -> Response<ResponseBody<R>> {
        self.summary.format(response)
    }

    fn deny<R>(&self, denial: &Denial) -> Response<ResponseBody<R>> {
        self.summary.deny(denial)
    }

    fn discard_limits<B>(&self, _: &Request<B>) -> DiscardLimits {
        self.summary.presentation().discard
    }
}

/// Settings that decide on a request, before and after the look-up.
#[derive(Debug)]
struct Rules {
    authenticator: Authenticator,
    options: Options,
    presentation: Option<Arc<Presentation>>,
}

const UNKNOWN_PEER: &str = "serve axum with into_make_service_with_connect_info::<SocketAddr>(), insert \
    ClientAddr into the extensions of requests, or set client_ip on the layer";

/// Decision on a request without I/O. `places` is the bit set of the places that contain the key.
enum Decision {
    /// The request passes, because it has already passed a layer of this authenticator.
    Pass,
    /// The options let the request through without a key.
    LetThrough,
    Cached {
        caller: AuthContext,
        places: u64,
    },
    LookUp {
        lookup: LookupFuture,
        places: u64,
    },
    Deny(Denial),
}

impl Rules {
    fn decide(&self, head: &RequestHead<'_>) -> Decision {
        if let Some(caller) = head.extensions().get::<AuthContext>()
            && self.authenticator.is_origin_of(caller)
        {
            return Decision::Pass;
        }
        if self.options.skip.as_ref().is_some_and(|skip| (skip.0)(head)) {
            return Decision::LetThrough;
        }
        let credentials = &self.options.credentials;
        // The digest of a key in the form that nearly all requests have. Nothing else of the grammar is checked for
        // a key that is cached.
        let common = credential::common_form(credentials, head.headers());
        let common = common.map(|(bytes, places)| (bytes, KeyDigest::of(bytes), places));
        if let Some((_, digest, places)) = common {
            match self.authenticator.cached(&digest) {
                Cached::Hit(caller) => return Decision::Cached { caller, places },
                Cached::Negative(reason) => return Decision::Deny(reason.into()),
                Cached::Miss => {}
            }
        }
        let found = match credential::find(credentials, head) {
            Ok(Some(found)) => found,
            Ok(None) if self.has_misplaced_key(head) => {
                return Decision::Deny(MalformedCredential::NoBearer.into());
            }
            Ok(None) if self.options.is_optional => return Decision::LetThrough,
            Ok(None) => return Decision::Deny(Denial::MissingCredential),
            Err(denial) => return Decision::Deny(denial),
        };
        let (token, places) = (found.token.as_bytes(), found.places);
        let digest = match common {
            // Not hashed and not looked for in the cache again.
            Some((bytes, digest, _)) if bytes == token => digest,
            _ => {
                let digest = KeyDigest::of(token);
                match self.authenticator.cached(&digest) {
                    Cached::Hit(caller) => return Decision::Cached { caller, places },
                    Cached::Negative(reason) => return Decision::Deny(reason.into()),
                    Cached::Miss => digest,
                }
            }
        };
        match self.authenticator.parse(&found.token, digest) {
            Ok(key) => {
                let address = self.options.client.find(head);
                let lookup = self.authenticator.look_up(key, address);
                Decision::LookUp { lookup, places }
            }
            // Checked after parsing, because keys of an adopted database may have other characters.
            Err(_) if found.breaks_bearer_grammar(credentials) => {
                Decision::Deny(MalformedCredential::NotB64Token.into())
            }
            Err(denial) => Decision::Deny(denial),
        }
    }

    /// Returns whether the request has a key in `Authorization` that does not follow `Bearer`. Without this check,
    /// the request would have no key, and an optional layer would let it through.
    fn has_misplaced_key(&self, head: &RequestHead<'_>) -> bool {
        match Misplaced::of(&self.options.credentials, head.headers()) {
            Some(Misplaced::Structured(text)) => self.authenticator.has_structured_key(text),
            Some(Misplaced::Any(text)) => self.authenticator.has_key(text),
            None => false,
        }
    }

    /// Prepares a request that passes without a key.
    fn let_through<B>(&self, request: &mut Request<B>) {
        // Only a context of this layer may reach the inner service.
        request.extensions_mut().remove::<AuthContext>();
        request.extensions_mut().insert(LetThrough);
        self.pass_on(request);
    }

    /// Checks the rules that depend on the request, and prepares it for the inner service. `places` is the bit set of
    /// the places that contain the key.
    fn admit<B>(
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
                    self.authenticator.log_unknown_address(UNKNOWN_PEER);
                }
                address
            };
            check_address(&caller, address)?;
            if !caller.can_access_endpoint(head.method(), head.endpoint()) {
                return Err(Forbidden::Endpoint.into());
            }
        }
        self.options.key_header.apply(&self.options.credentials, places, request.headers_mut());
        caller.count_request();
        request.extensions_mut().insert(caller);
        self.pass_on(request);
        Ok(())
    }

    /// Inserts the settings for guards, if they are not the default.
    fn pass_on<B>(&self, request: &mut Request<B>) {
        if let Some(presentation) = &self.presentation
            && presentation.discard != DiscardLimits::default()
        {
            request.extensions_mut().insert(presentation.discard);
        }
    }
}
