//! Where keys are kept: [`KeyStore`], the plug, and [`KeyRepository`], its write side.

mod account;
mod answer;
mod change;
mod erased;
mod ledger;
mod lookup;
mod lookup_key;
mod page;
mod priority;
mod repository;
mod stored_key;
mod waiting;

use std::{future::Future, time::SystemTime};

#[cfg(feature = "redis")]
pub(crate) use self::answer::{Candidate, Read};
pub use self::{
    account::{CacheSecret, KeyUsage, Lease, LeaseRequest, UsageBatch},
    answer::{Answer, HashUpgrade},
    change::{Change, ChangeStream, FeedFault, FeedStatus},
    erased::DynKeyStore,
    lookup::Lookup,
    page::{KeyPage, ListKeys, UnreadableKey},
    repository::KeyRepository,
    stored_key::StoredKey,
};
pub(crate) use self::{
    answer::{Outcome, Source},
    ledger::{LedgerEntry, Slice, grant},
    lookup::needs_the_key,
    lookup_key::{LookupKey, Proof, VerifiedKey},
    priority::Priority,
    waiting::Waiting,
};
#[cfg(feature = "_sql")]
pub(crate) use self::{lookup::MAX_CANDIDATES, waiting::Left};
use crate::error::StoreError;

/// Why an update that requires a revision fails.
pub(crate) const CHANGED_SINCE: &str = "the key was changed after it was read";

/// Where keys are looked up.
///
/// A store is asked, listened to and told; only the first is required of it. The smallest one that
/// is of use:
///
/// ```
/// use std::collections::HashMap;
/// use tower_api_key::{Answer, KeyRecord, KeyStore, Lookup, StoreError, StoredKey, User};
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
/// Never return an [`Answer`] about another key than the [`Lookup`]'s (it is refused), never
/// [`assume_verified`](Lookup::assume_verified) for a key that was not proven, never say "unknown" when the truth is
/// "could not ask" (that is an error), and never keep the presented key.
///
/// # Dyn compatibility
///
/// This trait is not dyn compatible: there is no `Box<dyn KeyStore>` and no `Arc<dyn KeyStore>`. [`DynKeyStore`] holds any
/// store as one type, for a field, or for a store that is chosen at run time. An `Arc` of a store is a store.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a key store",
    label = "this is not a `KeyStore`",
    note = "a store whose type is chosen at run time is a `DynKeyStore`: `DynKeyStore::new(store)`, in place of `Box<dyn KeyStore>` or `Arc<dyn KeyStore>`",
    note = "a builder becomes a store with `build()`, a path with `SqliteStore::open(path)?`, a URL with `PostgresStore::new(url)?`"
)]
pub trait KeyStore: Send + Sync + 'static {
    /// Ask: what is stored under the key that `lookup` presents, and does it match?
    ///
    /// # Errors
    ///
    /// When the question could not be answered; never for a key that is unknown or wrong.
    fn resolve(
        &self,
        lookup: &Lookup,
        // The compiler shows the next line where `dyn KeyStore` is tried.
    ) -> impl Future<Output = Result<Answer, StoreError>> + Send; // behind a pointer, use `DynKeyStore`

    /// Listen: changes since then, so that caches above can drop what they hold. Each call is an
    /// independent stream. By default there is no feed.
    fn changes(&self, since: SystemTime) -> ChangeStream {
        let _ = since;
        ChangeStream::none()
    }

    /// Tell: a batch of usage and last-used times. Must count once however often the same batch comes.
    ///
    /// # Errors
    ///
    /// `Unsupported` by default: a node logs that as a warning, counts no usage from then on, and reserves no budget.
    fn record_usage(
        &self,
        batch: &UsageBatch,
    ) -> impl Future<Output = Result<(), StoreError>> + Send {
        let _ = batch;
        async { Err(StoreError::unsupported("usage")) }
    }

    /// Take, renew or hand back a slice of what is left of a key's budget: the store is the ledger.
    ///
    /// # Errors
    ///
    /// `Unsupported` by default: a reservation for a key with a budget is answered 500, and logged as a warning once.
    fn lease(&self, ask: &LeaseRequest) -> impl Future<Output = Result<Lease, StoreError>> + Send {
        let _ = ask;
        async { Err(StoreError::unsupported("budget leases")) }
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
