//! A store that counts how often it is queried, and a runtime for property tests.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tower_api_key::{
    MemoryStore, StoreError,
    store::{Answer, KeyStore, Lookup},
};

/// The keys of a [`MemoryStore`], and the number of look-ups so far.
#[derive(Clone, Default)]
pub struct Counted {
    pub keys: MemoryStore,
    asked: Arc<AtomicUsize>,
}

impl Counted {
    pub fn over(keys: MemoryStore) -> Self {
        Self { keys, asked: Arc::default() }
    }

    /// Number of look-ups in the store since this was last called.
    pub fn take_asked(&self) -> usize {
        self.asked.swap(0, Ordering::SeqCst)
    }
}

impl KeyStore for Counted {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.keys.resolve(lookup).await
    }
}

/// Runs a future to its end on a current-thread runtime of its own.
pub fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
