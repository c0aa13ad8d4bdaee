//! Status of a replica: [`ReplicaStatus`].

use std::time::Duration;

/// Status of a [`Replica`](crate::Replica).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplicaStatus {
    /// Whether the replica answers look-ups.
    pub state: ReplicaState,
    /// Number of keys in memory.
    pub keys: usize,
    /// Approximate size of these keys, in bytes.
    pub bytes: usize,
    /// Time since the replica was last in sync with the change feed of the store; `None` before the first sync.
    pub lag: Option<Duration>,
}

/// Whether a [`Replica`](crate::Replica) answers look-ups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum ReplicaState {
    /// Not all keys are loaded. Look-ups are passed on to the store.
    #[default]
    Loading,
    /// All keys are loaded.
    Loaded,
    /// The store has more keys than the maximum. Look-ups are passed on to the store.
    TooManyKeys,
}

impl ReplicaStatus {
    pub(crate) fn new(
        state: ReplicaState,
        (keys, bytes): (usize, usize),
        lag: Option<Duration>,
    ) -> Self {
        Self { state, keys, bytes, lag }
    }
}
