//! Settings of a replica: [`ReplicaBuilder`].

use std::{fmt, sync::Arc};

use super::Replica;
use crate::{
    runtime::{Clock, SystemClock},
    store::KeyStore,
};

/// Builds a [`Replica`].
pub struct ReplicaBuilder<S> {
    store: S,
    max_keys: usize,
    clock: Arc<dyn Clock>,
}

const MAX_KEYS: usize = 1_000_000;

impl<S: KeyStore> ReplicaBuilder<S> {
    pub(super) fn new(store: S) -> Self {
        Self { store, max_keys: MAX_KEYS, clock: Arc::new(SystemClock) }
    }

    /// Sets the maximum number of keys: 1,000,000 by default. If the store has more, the replica turns itself off, logs
    /// one warning, and passes all look-ups on to the store.
    #[must_use]
    pub fn max_keys(self, keys: usize) -> Self {
        Self { max_keys: keys, ..self }
    }

    /// Sets the clock, which measures the lag that is reported: [`SystemClock`] by default. Use the same clock for the
    /// [`Authenticator`](crate::Authenticator), whose clock decides for keys.
    #[must_use]
    pub fn clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    /// Builds the replica. It needs no runtime, and begins to load at first use.
    ///
    /// # Errors
    ///
    /// If the store can't read all keys, or does not report every change.
    pub fn build(self) -> Result<Replica<S>, ReplicaError> {
        let Self { store, max_keys, clock } = self;
        if !store.can_read_keys() {
            return Err(ReplicaError::CannotReadKeys);
        }
        if !store.changes(clock.now()).is_complete() {
            return Err(ReplicaError::NoFeed);
        }
        Ok(Replica::from_parts(store, max_keys, clock))
    }
}

impl<S: fmt::Debug> fmt::Debug for ReplicaBuilder<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplicaBuilder")
            .field("store", &self.store)
            .field("max_keys", &self.max_keys)
            .finish_non_exhaustive()
    }
}

/// The reason why a [`Replica`] can't be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReplicaError {
    /// The store can't read all keys.
    CannotReadKeys,
    /// The store does not report every change, so that keys in memory could be outdated.
    NoFeed,
}

impl fmt::Display for ReplicaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CannotReadKeys => {
                "the store can't read all keys (KeyStore::can_read_keys): a replica of it is not possible"
            }
            Self::NoFeed => {
                "the store does not report every change (KeyStore::changes): a replica of it is not possible"
            }
        })
    }
}

impl std::error::Error for ReplicaError {}
