//! The auth layer and its options: [`ApiKeyAuthLayer`].

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

/// Lets requests with a valid API key through, with an [`AuthContext`](crate::AuthContext) in their extensions, and
/// denies the others.
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
/// # Ok::<(), tower_api_key::middleware::InvalidRealm>(())
/// ```
///
/// The request body must implement [`http_body::Body`]: see [`discard_body`](Self::discard_body).
///
/// A request whose key is in the local cache goes to the instance of the inner service that was polled ready. For a
/// request that needs a look-up, that instance is dropped, so that it holds no permit of a concurrency limit during
/// the look-up. A clone of the service is polled ready after the look-up.
#[derive(Debug, Clone)]
pub struct ApiKeyAuthLayer {
    authenticator: Authenticator,
    options: Options,
}

/// Options of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) credentials: Vec<Credential>,
    pub(crate) key_header: KeyHeader,
    pub(crate) is_optional: bool,
    pub(crate) skip: Option<Skip>,
    pub(crate) client: ClientAddress,
    pub(crate) presentation: Presentation,
}

/// Predicate for requests that the layer lets through unchecked.
#[derive(Clone)]
pub(crate) struct Skip(pub(crate) Arc<dyn Fn(&RequestHead<'_>) -> bool + Send + Sync>);

impl ApiKeyAuthLayer {
    /// Creates a layer over `store` with the default options and the default [`KeyScheme`].
    pub fn new(store: impl KeyStore) -> Self {
        Self::from(Authenticator::new(store))
    }

    /// Sets the formats and hashes of keys. Call this before the layer is cloned, because it creates a new
    /// [`Authenticator`] over the same store.
    #[must_use]
    pub fn scheme(mut self, scheme: KeyScheme) -> Self {
        self.authenticator = self.authenticator.with_scheme(scheme);
        self
    }

    /// Sets the places where a key may be, instead of `Authorization: Bearer` and `x-api-key`. With an empty list, no
    /// request has a key. At most 64 places are used; further ones are ignored.
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
    /// Returns an error if the realm has characters that a quoted string can't contain, or more than 256 characters.
    pub fn realm(self, realm: &str) -> Result<Self, InvalidRealm> {
        let realm = Realm::new(realm).ok_or(InvalidRealm)?;
        Ok(self.with(|options| options.presentation.realm = realm))
    }

    /// Lets requests without a key through, without a context. An invalid key is still denied. Of the guards behind
    /// the layer, [`RequireLayer`](crate::RequireLayer) denies a request without a key, and the others let it pass.
    #[must_use]
    pub fn optional(self) -> Self {
        self.with(|options| options.is_optional = true)
    }

    /// Lets requests for which `predicate` returns true through unchecked, such as health checks and CORS preflight.
    /// Guards treat them like requests without a key behind an [`optional`](Self::optional) layer.
    #[must_use]
    pub fn skip(
        self,
        predicate: impl Fn(&RequestHead<'_>) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.with(|options| options.skip = Some(Skip(Arc::new(predicate))))
    }

    /// Leaves the header field that held the key in the request, marked as sensitive so that it is not logged. By
    /// default the field is removed before the inner service is called.
    #[must_use]
    pub fn mark_sensitive(self) -> Self {
        self.with(|options| options.key_header = KeyHeader::MarkSensitive)
    }

    /// Sets the trusted proxies, from whose header field the client's address is read.
    #[must_use]
    pub fn trusted_proxies(self, proxies: TrustedProxies) -> Self {
        self.with(|options| options.client.proxies = Some(proxies))
    }

    /// Sets a closure that returns the peer's address, instead of [`ClientAddr`](crate::middleware::ClientAddr) and
    /// axum's `ConnectInfo`. `None` means that the address is unknown: keys with address rules are then denied, and the
    /// failure limiter of bcrypt checks counts all such callers as one.
    #[must_use]
    pub fn client_ip(
        self,
        find: impl Fn(&RequestHead<'_>) -> Option<IpAddr> + Send + Sync + 'static,
    ) -> Self {
        self.with(|options| options.client.closure = Some(Arc::new(find)))
    }

    /// Adds to denials the reason for which a key is not valid: unknown, expired, revoked. Off by default, because the
    /// reason reveals the state of a key to a caller that found it.
    #[must_use]
    pub fn verbose(self) -> Self {
        self.with(|options| options.presentation.verbose = true)
    }

    /// Sets a closure that creates the responses to denied HTTP requests. gRPC callers always get the response of
    /// their protocol. The response to a `HEAD` request gets no body. A response with a success status gets the
    /// [status of the denial](DeniedRequest::status) instead, and every response gets `Cache-Control: no-store`.
    ///
    /// ```
    /// use tower_api_key::{ApiKeyAuthLayer, MemoryStore};
    ///
    /// let layer = ApiKeyAuthLayer::new(MemoryStore::new())
    ///     .on_denial(|denied| denied.respond_with("text/plain", denied.detail()));
    /// ```
    #[must_use]
    pub fn on_denial(
        self,
        respond: impl Fn(&DeniedRequest<'_>) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        self.with(|options| options.presentation.on_denial = Some(OnDenial(Arc::new(respond))))
    }

    /// Answers every denial in HTTP, also those of gRPC calls. By default a `POST` over HTTP/2 with a gRPC content
    /// type, and a `POST` with one of gRPC-Web, is answered with the HTTP status 200 and a `grpc-status`. Set this
    /// where only the HTTP status is checked: behind nginx's `auth_request`, or for a service without gRPC.
    #[must_use]
    pub fn http_only(self) -> Self {
        self.with(|options| options.presentation.is_http_only = true)
    }

    /// Sets how much of the body of a denied request is read and discarded before the response: at most `max_bytes`
    /// (8 MiB by default), for at most `max_time` (2 s). Without this, the server closes the connection, or resets
    /// the HTTP/2 stream, while the client is still sending, and the client or proxy gets a broken pipe (nginx: 502)
    /// instead of the denial. The bodies of gRPC calls over HTTP/2 are not read. 0 disables it. A body is not read if
    /// its declared length exceeds the limit, or if the client waits because it has sent `Expect: 100-continue`. The
    /// limits apply to the guards behind this layer as well.
    #[must_use]
    pub fn discard_body(self, max_bytes: u64, max_time: Duration) -> Self {
        let discard = DiscardLimits { bytes: max_bytes, time: max_time };
        self.with(|options| options.presentation.discard = discard)
    }

    /// Returns the authenticator of this layer, to check its health or to share it.
    pub fn authenticator(&self) -> &Authenticator {
        &self.authenticator
    }

    fn with(mut self, change: impl FnOnce(&mut Options)) -> Self {
        change(&mut self.options);
        self
    }
}

/// Creates a layer with the default options, which shares the cache and the tasks of the authenticator.
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

/// Error for a realm that a quoted string can't contain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidRealm;

impl fmt::Display for InvalidRealm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a realm is at most 256 characters of visible ASCII and spaces")
    }
}

impl std::error::Error for InvalidRealm {}
