//! The contract of a store: what to implement to keep keys elsewhere.
//!
//! Implement [`KeyStore::resolve`]: read the keys under [`Lookup::id`], and pass them to [`Lookup::verify`], which
//! compares the hashes and makes the [`Answer`]. The example at [`KeyStore`] is the smallest useful store. The other
//! methods are optional:
//!
//! | method | without it |
//! |---|---|
//! | [`changes`](KeyStore::changes), a [`ChangeStream`] | a revoked key works for at most `max_staleness`, 30 s |
//! | [`record_usage`](KeyStore::record_usage) of a [`UsageBatch`] | no usage is counted |
//! | [`lease`](KeyStore::lease), for a [`LeaseRequest`] | reservations for keys with a budget are answered 500 |
//! | [`cache_secret`](KeyStore::cache_secret), a [`CacheSecret`] | `RedisCache` needs a secret in its builder |
//! | [`read_keys`](KeyStore::read_keys), [`read_owners`](KeyStore::read_owners) | there is no [`Replica`](crate::Replica) of the store |
//!
//! [`KeyRepository`] is the write side, which [`KeyManager`](crate::KeyManager) uses. The stores of this crate
//! implement it. It also lists and edits keys:
//!
//! ```
//! use tower_api_key::{
//!     MemoryStore, StoreError,
//!     store::{KeyRepository, ListKeys},
//! };
//!
//! # async fn run(store: MemoryStore) -> Result<(), StoreError> {
//! for key in store.list_keys(&ListKeys::default().owner(7)).await?.keys {
//!     println!("{} {}", key.prefix, key.name);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A store that can't write keys mints them with [`KeyScheme::mint`](crate::KeyScheme::mint) (`custom_store` in the
//! examples). [`DynKeyStore`] is any store as one type.

mod account;
mod answer;
mod attribution;
mod audit;
mod change;
mod erased;
mod filter;
mod keys_read;
mod ledger;
mod lookup;
mod lookup_key;
mod page;
mod priority;
mod replica_status;
mod repository;
mod stored_key;
mod waiting;

use std::{future::Future, time::SystemTime};

#[cfg(feature = "redis")]
pub(crate) use self::answer::Read;
pub use self::{
    account::{CacheSecret, KeyUsage, Lease, LeaseRequest, UsageBatch},
    answer::{Answer, HashUpgrade},
    attribution::Attribution,
    audit::{AuditAction, AuditEntry, AuditPage, ListAudit},
    change::{Change, ChangeStream, FeedFault, FeedStatus},
    erased::DynKeyStore,
    filter::KeyFilter,
    keys_read::{KeySelection, KeysRead, ReadOwner, ReadRow},
    lookup::Lookup,
    page::{KeyPage, ListKeys, ListUsers, UnreadableKey, UserPage},
    replica_status::{ReplicaState, ReplicaStatus},
    repository::{DailyUsage, Inserted, KeyRepository},
    stored_key::StoredKey,
};
pub(crate) use self::{
    answer::{Candidate, Outcome, Source},
    audit::{audited_key, audited_user},
    ledger::{GrantedLease, LedgerEntry, grant},
    lookup::needs_the_key,
    lookup_key::{LookupKey, Proof, VerifiedKey},
    priority::Priority,
    repository::import_lane,
    stored_key::SecretHash,
    waiting::Waiting,
};
#[cfg(feature = "_sql")]
pub(crate) use self::{lookup::MAX_CANDIDATES, waiting::Left};
use crate::{error::StoreError, record::UserId};

/// Message of the conflict if an update requires a revision that the row no longer has.
pub(crate) const CHANGED_SINCE: &str = "the key was changed after it was read";

/// A store in which keys are looked up.
///
/// Only [`resolve`](Self::resolve) is required. The other methods report changes, count usage and grant budget leases.
/// The smallest useful store:
///
/// ```
/// use std::collections::HashMap;
/// use tower_api_key::{
///     StoreError,
///     record::{KeyRecord, User},
///     store::{Answer, KeyStore, Lookup, StoredKey},
/// };
///
/// /// Key ids and hashes by lookup id.
/// struct Users(HashMap<String, (i64, String)>);
///
/// impl KeyStore for Users {
///     async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
///         let Some((id, hash)) = self.0.get(lookup.id()) else { return lookup.verify([]).await };
///         let record = KeyRecord::new(*id, lookup.id(), User::new(7, "a@b.c"));
///         lookup.verify([StoredKey::new(record, hash.parse()?)]).await
///     }
/// }
/// ```
///
/// # What an implementer must never do
///
/// Never return an [`Answer`] to another [`Lookup`] (it is rejected). Never call
/// [`assume_verified`](Lookup::assume_verified) for a key that was not verified. Never return "unknown" when the
/// look-up could not be completed (return an error). Never store the presented key.
///
/// # Dyn compatibility
///
/// This trait is not dyn compatible: there is no `Box<dyn KeyStore>` and no `Arc<dyn KeyStore>`. [`DynKeyStore`] holds
/// any store as one type, for a field, or for a store that is chosen at run time. An `Arc` of a store is a store.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a key store",
    label = "this is not a `KeyStore`",
    note = "a store whose type is chosen at run time is a `DynKeyStore`: `DynKeyStore::new(store)`, in place of `Box<dyn KeyStore>` or `Arc<dyn KeyStore>`",
    note = "a builder becomes a store with `build()`, a path with `SqliteStore::open(path)?`, a URL with `PostgresStore::new(url)?`"
)]
pub trait KeyStore: Send + Sync + 'static {
    /// Looks up the key that `lookup` presents, and verifies it.
    ///
    /// # Errors
    ///
    /// If the look-up could not be completed; never for a key that is unknown or wrong.
    fn resolve(
        &self,
        lookup: &Lookup,
        // The compiler shows the next line where `dyn KeyStore` is tried.
    ) -> impl Future<Output = Result<Answer, StoreError>> + Send; // behind a pointer, use `DynKeyStore`

    /// Returns the changes since `since`, so that caches above the store can drop outdated entries. Each call creates
    /// an independent stream. The default is no feed.
    fn changes(&self, since: SystemTime) -> ChangeStream {
        let _ = since;
        ChangeStream::none()
    }

    /// Records a batch of usage and last-used times. It must be idempotent: a batch that is sent again must not be
    /// counted again.
    ///
    /// # Errors
    ///
    /// `Unsupported` by default. The node then logs a warning, counts no more usage, and reserves no budget.
    fn record_usage(
        &self,
        batch: &UsageBatch,
    ) -> impl Future<Output = Result<(), StoreError>> + Send {
        let _ = batch;
        async { Err(StoreError::unsupported("usage")) }
    }

    /// Acquires, renews or returns a lease on what is left of a key's budget. The store is the ledger.
    ///
    /// # Errors
    ///
    /// `Unsupported` by default. A reservation for a key with a budget is then answered 500, and logged as a warning
    /// once.
    fn lease(
        &self,
        request: &LeaseRequest,
    ) -> impl Future<Output = Result<Lease, StoreError>> + Send {
        let _ = request;
        async { Err(StoreError::unsupported("budget leases")) }
    }

    /// Whether [`read_keys`](Self::read_keys) and [`read_owners`](Self::read_owners) are implemented.
    /// [`Replica`](crate::Replica) requires it when it is built. `false` by default.
    fn can_read_keys(&self) -> bool {
        false
    }

    /// Returns many keys with their hashes and owners. A row that can't be decoded is returned as such, and never left
    /// out. The rows must not be older than the call.
    ///
    /// # Errors
    ///
    /// `Unsupported` by default. If the read could not be completed.
    fn read_keys(
        &self,
        selection: &KeySelection,
    ) -> impl Future<Output = Result<KeysRead, StoreError>> + Send {
        let _ = selection;
        async { Err(StoreError::unsupported("reading all keys")) }
    }

    /// Returns these users with the revisions of their rows. Users that do not exist are left out.
    ///
    /// # Errors
    ///
    /// `Unsupported` by default. If the read could not be completed.
    fn read_owners(
        &self,
        owners: &[UserId],
    ) -> impl Future<Output = Result<Vec<ReadOwner>, StoreError>> + Send {
        let _ = owners;
        async { Err(StoreError::unsupported("reading all keys")) }
    }

    /// Invalidates what the store has cached of the keys under a lookup id, for a change that no change event reports.
    /// [`Authenticator::invalidate`](crate::Authenticator::invalidate) calls it. No-op by default, for a store without a
    /// cache.
    fn invalidate(&self, lookup_id: &str) {
        let _ = lookup_id;
    }

    /// Returns the status of the replica in the store, if it has one. `None` by default.
    fn replica_status(&self) -> Option<ReplicaStatus> {
        None
    }

    /// Whether [`cache_secret`](Self::cache_secret) returns a secret. `RedisCache` requires one when it is built, from
    /// the store or from its builder. `false` by default.
    fn has_cache_secret(&self) -> bool {
        false
    }

    /// Returns the secret that authenticates shared cache entries. Called at first use, and again until it succeeds.
    /// `None` by default.
    ///
    /// # Errors
    ///
    /// When the store can't be reached.
    fn cache_secret(&self) -> impl Future<Output = Result<Option<CacheSecret>, StoreError>> + Send {
        async { Ok(None) }
    }
}
