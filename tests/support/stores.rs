//! Key stores that misbehave, or wait.

use std::sync::{Arc, Mutex};

use tokio::sync::Semaphore;
use tower_api_key::{
    Authenticator, Denial, KeyScheme, MemoryStore, StoreError,
    record::KeyRecord,
    store::{Answer, KeyStore, Lookup},
};

use super::eventually::others_make;

/// Every look-up fails with this error.
pub struct Failing(pub StoreError);

impl KeyStore for Failing {
    async fn resolve(&self, _: &Lookup) -> Result<Answer, StoreError> {
        Err(self.0.clone())
    }
}

/// Every key is this record's.
pub struct Vouching(pub KeyRecord);

impl KeyStore for Vouching {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        Ok(lookup.assume_verified(self.0.clone()))
    }
}

/// Resolver every question with the answer to the first.
#[derive(Clone)]
pub struct MixedUp(pub MemoryStore, Arc<Mutex<Option<Lookup>>>);

impl MixedUp {
    pub fn new(store: MemoryStore) -> Self {
        Self(store, Arc::default())
    }
}

impl KeyStore for MixedUp {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let first = self.1.lock().unwrap().get_or_insert_with(|| lookup.clone()).clone();
        self.0.resolve(&first).await
    }
}

/// A store whose look-ups wait until one is let go.
#[derive(Clone)]
pub struct Held(Arc<HeldInner>);

struct HeldInner {
    store: MemoryStore,
    gate: Semaphore,
    under_way: Arc<()>,
}

impl Held {
    pub fn new(store: MemoryStore) -> Self {
        Self(Arc::new(HeldInner { store, gate: Semaphore::new(0), under_way: Arc::default() }))
    }

    /// Lets one look-up go on.
    pub fn let_one_go(&self) {
        self.0.gate.add_permits(1);
    }

    /// Waits until so many look-ups are under way. They run on tasks of their own.
    pub async fn is_asked(&self, times: usize) {
        others_make("the store is asked", || self.under_way() == times).await;
    }

    /// How many look-ups have begun and neither ended nor been dropped.
    pub fn under_way(&self) -> usize {
        Arc::strong_count(&self.0.under_way) - 1
    }
}

impl KeyStore for Held {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let _under_way = Arc::clone(&self.0.under_way);
        self.0.gate.acquire().await.unwrap().forget();
        self.0.store.resolve(lookup).await
    }
}

/// Keeps the look-up that it receives.
#[derive(Clone, Default)]
struct Listening(Arc<Mutex<Option<Lookup>>>);

impl KeyStore for Listening {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        *self.0.lock().unwrap() = Some(lookup.clone());
        lookup.verify([]).await
    }
}

/// The question that an authenticator with the default scheme asks of its store about `key`, to be put to
/// a store by hand: a look-up of an authenticator can't be dropped from outside.
pub async fn question(key: &str) -> Lookup {
    let store = Listening::default();
    let authenticator = Authenticator::builder(store.clone()).scheme(KeyScheme::default()).build();
    assert!(matches!(authenticator.authenticate(key).await, Err(Denial::InvalidKey(_))));
    store.0.lock().unwrap().take().expect("the key has a format of the scheme")
}
