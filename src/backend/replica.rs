//! All keys in memory, in front of a store: [`Replica`].

mod builder;
mod change_log;
mod content;
mod follower;
mod packed_key;
mod pending;
mod repository;
mod shards;

use std::{fmt, sync::Arc, time::SystemTime};

use tokio::runtime::Handle;

pub use self::builder::{ReplicaBuilder, ReplicaError};
use self::{
    change_log::ChangeLog,
    content::{Content, Found},
    pending::Pending,
};
use crate::{
    coherence::Age,
    error::StoreError,
    record::{Revision, UserId},
    runtime::{Background, Clock},
    store::{
        Answer, CacheSecret, Change, ChangeStream, KeySelection, KeyStore, KeysRead, Lease,
        LeaseRequest, Lookup, ReadOwner, ReplicaState, ReplicaStatus, Source, UsageBatch,
    },
    telemetry,
};

/// All keys in memory, in front of a store that reports its changes.
///
/// It loads all keys once, follows the change feed of the store, and answers every look-up from memory, also of unknown
/// keys. Then neither a deployment, nor a flood of unknown keys, nor an outage of the database within the bounds of
/// [freshness](crate::authenticator) causes a query. It suits fleets with up to some millions of keys, at some hundred
/// bytes a key and node.
///
/// A replica in front of a store is a store. A look-up is passed on to the store below while the keys are loaded, while
/// the replica is not in sync, for a key or owner from the moment of its change until it was read again, and for a key
/// with a bcrypt hash until one node has verified it and stored the fast hash. A key that was just created can be
/// unknown to another node until its change arrives there, which takes milliseconds with notifications, and at most the
/// poll interval without.
///
/// A key whose row can't be decoded is logged, and looked up in the store below, where it fails alone.
/// [`KeyRecord::usage`](crate::record::KeyRecord::usage) is that of the time when the key was loaded.
///
/// ```
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore, Replica};
///
/// let replica = Replica::new(MemoryStore::new())?;
/// // Optional, in a readiness check: the first requests need no query then.
/// replica.loaded().await;
/// let layer = ApiKeyAuthLayer::new(replica);
/// # Ok(())
/// # }
/// ```
pub struct Replica<S> {
    core: Arc<Core<S>>,
    /// The task that loads the keys. It is not in the core, which a read under way keeps: it ends with the last replica.
    follower: Arc<Background>,
}

struct Core<S> {
    store: S,
    content: Arc<Content>,
    log: Arc<ChangeLog>,
    max_keys: usize,
    clock: Arc<dyn Clock>,
}

impl<S: KeyStore> Replica<S> {
    /// Creates a replica of `store` with the default settings. It begins to load at first use.
    ///
    /// # Errors
    ///
    /// The errors of [`ReplicaBuilder::build`].
    pub fn new(store: S) -> Result<Self, ReplicaError> {
        Self::builder(store).build()
    }

    /// Creates a builder.
    pub fn builder(store: S) -> ReplicaBuilder<S> {
        ReplicaBuilder::new(store)
    }

    fn from_parts(store: S, max_keys: usize, clock: Arc<dyn Clock>) -> Self {
        let (content, log) = (Arc::new(Content::new()), Arc::default());
        let core = Arc::new(Core { store, content, log, max_keys, clock });
        Self { core, follower: Arc::default() }
    }

    /// Returns the store behind the replica.
    pub fn get_ref(&self) -> &S {
        &self.core.store
    }

    /// Waits until all keys are loaded, or the replica is turned off because there are too many. It waits as long as the
    /// store fails. Requires a Tokio runtime.
    pub async fn loaded(&self) -> ReplicaStatus {
        self.ensure_follower();
        let mut state = self.core.content.state();
        // The content has the sender, so that this ends with the condition.
        let _ = state.wait_for(|state| *state != ReplicaState::Loading).await;
        self.status()
    }

    /// Returns the status, for a health check. Keys are checked in every state.
    pub fn status(&self) -> ReplicaStatus {
        let Core { content, clock, .. } = &*self.core;
        let now = clock.read();
        let lag = content.last_sync().map(|sync| now.since(sync));
        let state = *content.state().borrow();
        ReplicaStatus::new(state, (content.keys(), content.bytes()), lag)
    }

    /// Starts the task that loads the keys, if it does not run.
    fn ensure_follower(&self) {
        if Handle::try_current().is_ok() {
            self.follower.ensure(|| follower::follow(Arc::downgrade(&self.core)));
        }
    }
}

impl<S> Core<S> {
    /// Removes what an earlier task has read, if there was one. It has panicked, or its runtime has shut down, and changes
    /// may have been missed since.
    fn begin_anew(&self) {
        if self.log.is_empty() {
            return;
        }
        if *self.content.state().borrow() != ReplicaState::TooManyKeys {
            self.content.clear(ReplicaState::Loading);
        }
        self.log.append(Change::Reset);
    }

    /// Updates the metrics.
    fn report(&self) {
        let is_loaded = *self.content.state().borrow() == ReplicaState::Loaded;
        telemetry::replica_size(is_loaded, self.content.keys(), self.content.bytes());
        telemetry::replica_synced(self.clock.now());
    }
}

impl<S: KeyStore> KeyStore for Replica<S> {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.ensure_follower();
        let Core { store, content, .. } = &*self.core;
        let found = match lookup.is_presented() && !lookup.skips_copies() {
            true => content.find(lookup),
            false => Found::Nothing,
        };
        telemetry::replica_hit(matches!(found, Found::Answer(_, Age::Fresh)));
        match found {
            Found::Answer(answer, Age::Fresh) => Ok(answer),
            Found::Nothing => store.resolve(lookup).await,
            Found::NeedsStore => {
                let answer = store.resolve(lookup).await?;
                if answer.record().is_some() {
                    // The store may have the fast hash now, or a row that can be decoded.
                    content.read_again(Pending::Id(lookup.id().into()));
                }
                Ok(answer)
            }
            Found::Answer(old, _) => match store.resolve(lookup).await {
                Err(error) if error.is_transient() && lookup.grants_access(&old) => {
                    Ok(old.with_source(Source::Fallback))
                }
                answer => answer,
            },
        }
    }

    fn changes(&self, _since: SystemTime) -> ChangeStream {
        // The task reads the feed from further back than any node needs.
        let replica = self.clone();
        ChangeLog::stream(&self.core.log, move || replica.ensure_follower())
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.core.store.record_usage(batch).await
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.core.store.lease(request).await
    }

    fn can_read_keys(&self) -> bool {
        self.core.store.can_read_keys()
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        self.core.store.read_keys(selection).await
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        self.core.store.read_owners(owners).await
    }

    fn replica_status(&self) -> Option<ReplicaStatus> {
        Some(self.status())
    }

    fn invalidate(&self, lookup_id: &str) {
        self.core.content.mark(&Change::Prefix(lookup_id.to_owned(), Revision(0)));
        self.core.store.invalidate(lookup_id);
    }

    fn has_cache_secret(&self) -> bool {
        self.core.store.has_cache_secret()
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        self.core.store.cache_secret().await
    }
}

impl<S> Clone for Replica<S> {
    fn clone(&self) -> Self {
        Self { core: Arc::clone(&self.core), follower: Arc::clone(&self.follower) }
    }
}

impl<S: fmt::Debug> fmt::Debug for Replica<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica")
            .field("store", &self.core.store)
            .field("state", &*self.core.content.state().borrow())
            .field("keys", &self.core.content.keys())
            .finish_non_exhaustive()
    }
}
