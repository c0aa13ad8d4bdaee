//! [`ApiKeyAuthLayer`]: the options, and the service that they make.

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderName, Response};
use tower_layer::Layer;

use super::{
    client_address::{ClientAddress, TrustedProxies},
    credential::{Credential, KeyHeader, MAX_PLACES, RequestHead},
    discard::DiscardLimits,
    response::{DeniedRequest, OnDenial, Presentation, Realm},
    service::ApiKeyAuth,
};
use crate::{authenticator::Authenticator, key::KeyScheme, store::KeyStore};

/// Lets requests through that carry a valid API key, with an
/// [`AuthContext`](crate::AuthContext) in their extensions, and answers the others.
///
/// ```
/// use tower::ServiceBuilder;
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore};
///
/// let service = ServiceBuilder::new()
///     .layer(
///         ApiKeyAuthLayer::new(MemoryStore::new())
///             .realm("acme")?
///             .skip(|head| head.uri().path() == "/health"),
///     )
///     .service_fn(|_request: http::Request<String>| async {
///         Ok::<_, std::convert::Infallible>(http::Response::new(String::new()))
///     });
/// # Ok::<(), tower_api_key::InvalidRealm>(())
/// ```
///
/// The request body has to implement [`http_body::Body`]: see [`discard_body`](Self::discard_body).
///
/// A request whose key is in the local cache goes to the instance of the inner service that was polled ready. For
/// one that needs a look-up, that instance is dropped, so that it holds no permit of a concurrency limit while the
/// store is asked, and a clone of the service is polled ready after the look-up.
#[derive(Debug, Clone)]
pub struct ApiKeyAuthLayer {
    authenticator: Authenticator,
    options: Options,
}

/// What a layer does with a request.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) credentials: Vec<Credential>,
    pub(crate) key_header: KeyHeader,
    pub(crate) is_optional: bool,
    pub(crate) skip: Option<Skip>,
    pub(crate) client: ClientAddress,
    pub(crate) presentation: Presentation,
}

/// Says which requests are none of the layer's business.
#[derive(Clone)]
pub(crate) struct Skip(pub(crate) Arc<dyn Fn(&RequestHead<'_>) -> bool + Send + Sync>);

impl ApiKeyAuthLayer {
    /// A layer over `store` with the default options and the default [`KeyScheme`].
    pub fn new(store: impl KeyStore) -> Self {
        Self::from(Authenticator::new(store))
    }

    /// Sets how keys look and are hashed. Give it before the layer is cloned: it makes a new
    /// [`Authenticator`] over the same store.
    #[must_use]
    pub fn scheme(mut self, scheme: KeyScheme) -> Self {
        self.authenticator = self.authenticator.with_scheme(scheme);
        self
    }

    /// Sets where a key may be, instead of `Authorization: Bearer` and `x-api-key`. With no place at all,
    /// no request has a key; past 64 they are not looked at.
    #[must_use]
    pub fn credentials(self, places: impl IntoIterator<Item = Credential>) -> Self {
        let places: Vec<_> = places.into_iter().take(MAX_PLACES).collect();
        self.with(|options| {
            let offers_basic = places.iter().any(Credential::is_basic);
            options.presentation.offers_basic = offers_basic;
            options.presentation.offers_bearer =
                places.iter().any(Credential::is_bearer) || !offers_basic;
            options.credentials = places;
        })
    }

    /// Sets the realm of the challenge, `api` by default.
    ///
    /// # Errors
    ///
    /// If it has characters that a quoted string can't hold, or more than 256.
    pub fn realm(self, realm: &str) -> Result<Self, InvalidRealm> {
        let realm = Realm::new(realm).ok_or(InvalidRealm)?;
        Ok(self.with(|options| options.presentation.realm = realm))
    }

    /// Lets a request without a key through, without a context. A bad key is still denied. Of the guards behind the
    /// layer, [`RequireLayer`](crate::RequireLayer) denies such a request, the others let it pass.
    #[must_use]
    pub fn optional(self) -> Self {
        self.with(|options| options.is_optional = true)
    }

    /// Lets requests through untouched for which `predicate` is true: health checks, CORS preflight. Guards treat
    /// them as those of an [`optional`](Self::optional) layer.
    #[must_use]
    pub fn skip(
        self,
        predicate: impl Fn(&RequestHead<'_>) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.with(|options| options.skip = Some(Skip(Arc::new(predicate))))
    }

    /// Leaves the header field that held the key in the request, marked as sensitive so that it is
    /// not logged. By default the inner service never sees it.
    #[must_use]
    pub fn mark_sensitive(self) -> Self {
        self.with(|options| options.key_header = KeyHeader::MarkSensitive)
    }

    /// Takes the client's address from a header field that these proxies write.
    #[must_use]
    pub fn trusted_proxies(self, proxies: TrustedProxies) -> Self {
        self.with(|options| options.client.proxies = Some(proxies))
    }

    /// Sets where the peer's address comes from, instead of [`ClientAddr`](crate::ClientAddr) and
    /// axum's `ConnectInfo`. `None` is "not known": keys with address rules are refused then, and in the
    /// ration of failed bcrypt checks all such callers count as one.
    #[must_use]
    pub fn client_ip(
        self,
        find: impl Fn(&RequestHead<'_>) -> Option<IpAddr> + Send + Sync + 'static,
    ) -> Self {
        self.with(|options| options.client.closure = Some(Arc::new(find)))
    }

    /// Tells callers why their key is not valid: unknown, expired, revoked. Off by default, because
    /// it tells whoever found a key what it was.
    #[must_use]
    pub fn verbose(self, verbose: bool) -> Self {
        self.with(|options| options.presentation.verbose = verbose)
    }

    /// Makes the responses of denied HTTP requests. gRPC callers get theirs in the protocol's own
    /// shape, whatever this does, and a `HEAD` request gets no body. A response with a status of success gets the
    /// [status of the denial](DeniedRequest::status) instead, and every one gets `Cache-Control: no-store`.
    ///
    /// ```
    /// use tower_api_key::{ApiKeyAuthLayer, MemoryStore};
    ///
    /// let layer = ApiKeyAuthLayer::new(MemoryStore::new())
    ///     .on_denial(|refusal| refusal.respond_with("text/plain", refusal.detail()));
    /// ```
    #[must_use]
    pub fn on_denial(
        self,
        respond: impl Fn(&DeniedRequest<'_>) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        self.with(|options| options.presentation.on_denial = Some(OnDenial(Arc::new(respond))))
    }

    /// Resolver every denial in HTTP, gRPC calls too. By default a `POST` over HTTP/2 with a gRPC content type, and
    /// a `POST` with one of gRPC-Web, is answered with the HTTP status 200 and a `grpc-status`. Set this where only
    /// the HTTP status counts: behind nginx's `auth_request`, or for a service that has no gRPC.
    #[must_use]
    pub fn http_only(self) -> Self {
        self.with(|options| options.presentation.is_http_only = true)
    }

    /// Sets how much of the body of a denied request is read and discarded before it is answered: at most `max_bytes`
    /// (8 MiB by default), for at most `max_time` (2 s). Without this, the server closes the connection, or resets
    /// the HTTP/2 stream, while the client is still sending, and a client or proxy sees a broken pipe (nginx: 502)
    /// instead of the denial. Not for gRPC calls over HTTP/2. 0 turns it off. A body whose declared length is over the limit is not read, nor
    /// is one whose client sends `Expect: 100-continue` and therefore waits. Counts for the guards behind this
    /// layer as well.
    #[must_use]
    pub fn discard_body(self, max_bytes: u64, max_time: Duration) -> Self {
        let discard = DiscardLimits { bytes: max_bytes, time: max_time };
        self.with(|options| options.presentation.discard = discard)
    }

    /// The engine of this layer, to ask it about its health or to share it.
    pub fn authenticator(&self) -> &Authenticator {
        &self.authenticator
    }

    fn with(mut self, change: impl FnOnce(&mut Options)) -> Self {
        change(&mut self.options);
        self
    }
}

/// A layer with the default options that shares everything with the authenticator.
impl From<Authenticator> for ApiKeyAuthLayer {
    fn from(authenticator: Authenticator) -> Self {
        let x_api_key = HeaderName::from_static("x-api-key");
        let options = Options {
            credentials: vec![Credential::bearer(), Credential::header(x_api_key)],
            key_header: KeyHeader::Remove,
            is_optional: false,
            skip: None,
            client: ClientAddress::default(),
            presentation: Presentation::default(),
        };
        Self { authenticator, options }
    }
}

impl<S> Layer<S> for ApiKeyAuthLayer {
    type Service = ApiKeyAuth<S>;

    fn layer(&self, inner: S) -> ApiKeyAuth<S> {
        ApiKeyAuth::new(inner, self.authenticator.clone(), self.options.clone())
    }
}

impl fmt::Debug for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Skip")
    }
}

/// A realm that a quoted string can't hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidRealm;

impl fmt::Display for InvalidRealm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a realm is at most 256 characters of visible ASCII and spaces")
    }
}

impl std::error::Error for InvalidRealm {}
