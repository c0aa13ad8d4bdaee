//! Stores behind a pointer: [`Arc`], and [`DynKeyStore`] for one whose type is chosen at run time.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::SystemTime};

use super::{
    KeyStore,
    account::{CacheSecret, Lease, LeaseRequest, UsageBatch},
    answer::Answer,
    change::ChangeStream,
    keys_read::{KeySelection, KeysRead, ReadOwner},
    lookup::Lookup,
    replica_status::ReplicaStatus,
};
use crate::{error::StoreError, record::UserId};

/// Any [`KeyStore`], as one type. It is cheap to clone. The layers above the stores use this type.
///
/// ```
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore, store::DynKeyStore};
///
/// let store = match std::env::var("DATABASE_URL") {
///     // Ok(url) => DynKeyStore::new(PostgresStore::new(&url)?),
///     _ => DynKeyStore::new(MemoryStore::new()),
/// };
/// let layer = ApiKeyAuthLayer::new(store);
/// ```
#[derive(Clone)]
pub struct DynKeyStore(Arc<dyn Erased>);

impl DynKeyStore {
    /// Erases the type of `store`.
    pub fn new(store: impl KeyStore) -> Self {
        Self(Arc::new(store))
    }
}

impl KeyStore for DynKeyStore {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.0.resolve(lookup).await
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        self.0.changes(since)
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.0.record_usage(batch).await
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.0.lease(request).await
    }

    fn can_read_keys(&self) -> bool {
        self.0.can_read_keys()
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        self.0.read_keys(selection).await
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        self.0.read_owners(owners).await
    }

    fn invalidate(&self, lookup_id: &str) {
        self.0.invalidate(lookup_id);
    }

    fn replica_status(&self) -> Option<ReplicaStatus> {
        self.0.replica_status()
    }

    fn has_cache_secret(&self) -> bool {
        self.0.has_cache_secret()
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        self.0.cache_secret().await
    }
}

impl fmt::Debug for DynKeyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DynKeyStore").finish_non_exhaustive()
    }
}

impl<S: KeyStore> KeyStore for Arc<S> {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        S::resolve(self, lookup).await
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        S::changes(self, since)
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        S::record_usage(self, batch).await
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        S::lease(self, request).await
    }

    fn can_read_keys(&self) -> bool {
        S::can_read_keys(self)
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        S::read_keys(self, selection).await
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        S::read_owners(self, owners).await
    }

    fn invalidate(&self, lookup_id: &str) {
        S::invalidate(self, lookup_id);
    }

    fn replica_status(&self) -> Option<ReplicaStatus> {
        S::replica_status(self)
    }

    fn has_cache_secret(&self) -> bool {
        S::has_cache_secret(self)
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        S::cache_secret(self).await
    }
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// [`KeyStore`] in a form that can be a trait object.
trait Erased: Send + Sync {
    fn resolve<'a>(&'a self, lookup: &'a Lookup) -> Boxed<'a, Answer>;
    fn changes(&self, since: SystemTime) -> ChangeStream;
    fn record_usage<'a>(&'a self, batch: &'a UsageBatch) -> Boxed<'a, ()>;
    fn lease<'a>(&'a self, request: &'a LeaseRequest) -> Boxed<'a, Lease>;
    fn can_read_keys(&self) -> bool;
    fn read_keys<'a>(&'a self, selection: &'a KeySelection) -> Boxed<'a, KeysRead>;
    fn read_owners<'a>(&'a self, owners: &'a [UserId]) -> Boxed<'a, Vec<ReadOwner>>;
    fn invalidate(&self, lookup_id: &str);
    fn replica_status(&self) -> Option<ReplicaStatus>;
    fn has_cache_secret(&self) -> bool;
    fn cache_secret(&self) -> Boxed<'_, Option<CacheSecret>>;
}

impl<S: KeyStore> Erased for S {
    fn resolve<'a>(&'a self, lookup: &'a Lookup) -> Boxed<'a, Answer> {
        Box::pin(KeyStore::resolve(self, lookup))
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        KeyStore::changes(self, since)
    }

    fn record_usage<'a>(&'a self, batch: &'a UsageBatch) -> Boxed<'a, ()> {
        Box::pin(KeyStore::record_usage(self, batch))
    }

    fn lease<'a>(&'a self, request: &'a LeaseRequest) -> Boxed<'a, Lease> {
        Box::pin(KeyStore::lease(self, request))
    }

    fn can_read_keys(&self) -> bool {
        KeyStore::can_read_keys(self)
    }

    fn read_keys<'a>(&'a self, selection: &'a KeySelection) -> Boxed<'a, KeysRead> {
        Box::pin(KeyStore::read_keys(self, selection))
    }

    fn read_owners<'a>(&'a self, owners: &'a [UserId]) -> Boxed<'a, Vec<ReadOwner>> {
        Box::pin(KeyStore::read_owners(self, owners))
    }

    fn invalidate(&self, lookup_id: &str) {
        KeyStore::invalidate(self, lookup_id);
    }

    fn replica_status(&self) -> Option<ReplicaStatus> {
        KeyStore::replica_status(self)
    }

    fn has_cache_secret(&self) -> bool {
        KeyStore::has_cache_secret(self)
    }

    fn cache_secret(&self) -> Boxed<'_, Option<CacheSecret>> {
        Box::pin(KeyStore::cache_secret(self))
    }
}
