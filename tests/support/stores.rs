//! Key stores that misbehave, or wait.

use std::sync::{Arc, Mutex};

use tokio::sync::Semaphore;
use tower_api_key::{Answer, KeyRecord, KeyStore, Lookup, MemoryStore, StoreError};

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
        Ok(lookup.vouch(self.0.clone()))
    }
}

/// Answers every question with the answer to the first.
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
