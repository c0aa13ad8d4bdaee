//! The engine, free of HTTP: a key in, an [`AuthContext`] or a [`Denial`] out.

use std::{fmt, future::Future, net::IpAddr, pin::Pin, sync::Arc};

use chrono::DateTime;
use tokio::runtime::Handle;

use crate::{
    context::{AuthContext, Origin},
    error::{StoreError, StoreErrorKind},
    key::{KeyScheme, PresentedKey, token},
    policy,
    respond::{Denial, Forbidden, InvalidKey},
    store::{DynKeyStore, KeyStore, Lookup, Outcome},
    telemetry,
};

/// Finds out whose a key is. The layer is this over HTTP; use it directly for sockets and queues.
///
/// Cheap to clone; clones, and layers made from them, share everything. Building one needs no runtime;
/// a look-up needs a Tokio runtime with its timer (`enable_all`).
///
/// ```
/// use tower_api_key::{ApiKeyAuthLayer, Authenticator, Denial, MemoryStore};
///
/// # async fn run() -> Result<(), Denial> {
/// let authenticator = Authenticator::new(MemoryStore::new());
/// let layer = ApiKeyAuthLayer::from(authenticator.clone());
///
/// let caller = authenticator.authenticate("tak_live_…").await?;
/// println!("{}", caller.user().email);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Authenticator(Arc<Inner>);

struct Inner {
    store: DynKeyStore,
    scheme: KeyScheme,
    origin: Origin,
}

/// A look-up on its way.
pub(crate) type LookupFuture = Pin<Box<dyn Future<Output = Result<AuthContext, Denial>> + Send>>;

impl Authenticator {
    /// An authenticator over `store` with the default [`KeyScheme`].
    pub fn new(store: impl KeyStore) -> Self {
        Self::builder(store).build()
    }

    /// An authenticator over `store` with settings of your own.
    pub fn builder(store: impl KeyStore) -> AuthenticatorBuilder {
        AuthenticatorBuilder { store: DynKeyStore::new(store), scheme: KeyScheme::default() }
    }

    /// Finds out whose `key` is.
    ///
    /// Endpoint rules are not asked, because there is no endpoint: see
    /// [`AuthContext::can_access_endpoint`]. A key with address rules is refused; for one, use
    /// [`Authenticator::authenticate_from`].
    ///
    /// # Errors
    ///
    /// Why the key is refused, or that it could not be checked.
    pub async fn authenticate(&self, key: &str) -> Result<AuthContext, Denial> {
        self.find_out(key, None).await
    }

    /// Finds out whose `key` is that a peer at `address` presents.
    ///
    /// # Errors
    ///
    /// Those of [`Authenticator::authenticate`].
    pub async fn authenticate_from(
        &self,
        key: &str,
        address: IpAddr,
    ) -> Result<AuthContext, Denial> {
        self.find_out(key, Some(address)).await
    }

    async fn find_out(&self, key: &str, address: Option<IpAddr>) -> Result<AuthContext, Denial> {
        let outcome = match token(key.as_bytes()).map_err(Denial::from).and_then(|t| self.parse(t))
        {
            Ok(key) => self.look_up(key, address).await.and_then(|caller| {
                check_address(&caller, address)?;
                Ok(caller)
            }),
            Err(denial) => Err(denial),
        };
        outcome.inspect_err(telemetry::denied)
    }

    /// Parses a token of visible ASCII. Nothing is hashed or looked up before this.
    pub(crate) fn parse(&self, token: &str) -> Result<PresentedKey, Denial> {
        Ok(self.0.scheme.parse(token)?)
    }

    /// Asks the store, and judges what does not depend on the request: that the key is active, its
    /// owner too, and that it has not expired.
    pub(crate) fn look_up(&self, key: PresentedKey, address: Option<IpAddr>) -> LookupFuture {
        let inner = Arc::clone(&self.0);
        Box::pin(async move {
            if Handle::try_current().is_err() {
                return Err(StoreError::unavailable("there is no Tokio runtime here").into());
            }
            let lookup = Lookup::new(key, inner.scheme.clone(), address);
            let answer = inner.store.resolve(&lookup).await.inspect_err(|error| {
                if error.kind() == StoreErrorKind::BadRow {
                    telemetry::bad_row(lookup.id(), error);
                }
            })?;
            if !answer.answers(&lookup) {
                let mixed_up = "the key store gave the answer to another question";
                return Err(StoreError::rejected(mixed_up).into());
            }
            let record = match answer.into_outcome() {
                Outcome::Unknown => return Err(InvalidKey::Unknown.into()),
                Outcome::Mismatch => return Err(InvalidKey::WrongSecret.into()),
                Outcome::Match(record) => *record,
            };
            // By the time after the look-up, which may have taken a while.
            policy::validity(&record, DateTime::from(inner.scheme.clock().now()))?;
            Ok(AuthContext::new(record, inner.origin.clone()))
        })
    }

    /// Whether this authenticator made the context.
    pub(crate) fn made(&self, caller: &AuthContext) -> bool {
        caller.is_from(&self.0.origin)
    }

    /// The same store with another scheme. Shares nothing else.
    pub(crate) fn with_scheme(&self, scheme: KeyScheme) -> Self {
        AuthenticatorBuilder { store: self.0.store.clone(), scheme }.build()
    }
}

/// A key with address rules is refused where the address is not known.
pub(crate) fn check_address(
    caller: &AuthContext,
    address: Option<IpAddr>,
) -> Result<(), Forbidden> {
    let is_allowed = match address {
        Some(address) => caller.can_access_from(address),
        None => caller.allowed_ips().is_empty(),
    };
    if is_allowed { Ok(()) } else { Err(Forbidden::Address) }
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator").field("scheme", &self.0.scheme).finish_non_exhaustive()
    }
}

/// Builds an [`Authenticator`].
#[derive(Debug, Clone)]
pub struct AuthenticatorBuilder {
    store: DynKeyStore,
    scheme: KeyScheme,
}

impl AuthenticatorBuilder {
    /// Sets how keys look and are hashed, and the clock.
    #[must_use]
    pub fn scheme(self, scheme: KeyScheme) -> Self {
        Self { scheme, ..self }
    }

    /// Builds the authenticator. Needs no runtime.
    pub fn build(self) -> Authenticator {
        let Self { store, scheme } = self;
        Authenticator(Arc::new(Inner { store, scheme, origin: Origin::default() }))
    }
}
