//! A shared cache in front of a store: [`RedisCache`].

mod builder;
mod entry;
mod flush;
mod keys;
mod names;
mod pub_sub;
mod reads;
mod repository;
mod script;
mod secret;
mod tombstones;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use deadpool_redis::redis::Value;
use tokio::sync::Semaphore;

pub use self::builder::{RedisCacheBuilder, RedisCacheError};
use self::{
    entry::{Entry, Kind, MAC, MAX_BYTES, Unreadable},
    keys::{Keys, keys_lifetime},
    names::Names,
    reads::EntryReads,
    script::Put,
    secret::Secrets,
    tombstones::TombstoneQueue,
};
use crate::{
    coherence::{Age, Subject},
    error::StoreError,
    record::UserId,
    redis::{Link, RedisServers, RedisState},
    runtime::{Clock, Moment},
    store::{
        Answer, CacheSecret, Candidate, ChangeStream, KeySelection, KeyStore, KeysRead, Lease,
        LeaseRequest, Lookup, Outcome, Proof, Read, ReadOwner, ReplicaStatus, Source, UsageBatch,
    },
    telemetry,
};

/// Redis, or Valkey, in front of a store. An answer that one node has read saves the other nodes a query and a slow
/// hash check.
///
/// A cache in front of a store is a store. A hit is one round trip, or one for up to 64 look-ups while many wait. If Redis rejects a command, hangs or returns
/// invalid data, the store below is used. Data that Redis loses, rolls back or receives from an attacker with write
/// access does not make a revoked key valid again: entries are authenticated, and each node receives changes from the
/// store itself. Neither keys nor their hashes are stored there; names, e-mail addresses and limits of their owners
/// are.
///
/// Entries are bound to the database: to PostgreSQL's system identifier, the id of the database, the timeline and the
/// schema of the table `api_keys`, or to the path of an SQLite file. Other databases on the same Redis have entries of
/// their own, also one that was made with `CREATE DATABASE … TEMPLATE` or from a dump.
///
/// A copy of a whole server can have the same identifiers: a snapshot of its disk, a cloned volume, a restored base
/// backup, one of two standbys that were both promoted. So can an SQLite file at the same path on another machine. Nodes
/// on such a copy that use the Redis of the original need a [`namespace`](RedisCacheBuilder::namespace) of their own, or
/// two new rows in the copy's `api_key_cache_secrets` before the first of them is started. Otherwise a key that was
/// revoked in the one can be accepted from entries of the other.
///
/// ```no_run
/// # #[cfg(feature = "postgres")]
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_api_key::{ApiKeyAuthLayer, PostgresStore, RedisCache};
///
/// let postgres = PostgresStore::new("postgres://app@db.internal/app?sslmode=verify-full")?;
/// postgres.migrate().await?;
/// let store = RedisCache::new(postgres, "rediss://:password@redis.internal")?;
/// let layer = ApiKeyAuthLayer::new(store);
/// # Ok(())
/// # }
/// ```
pub struct RedisCache<S>(Arc<Tier<S>>);

struct Tier<S> {
    store: S,
    link: Arc<Link>,
    secrets: Secrets,
    tombstones: Arc<TombstoneQueue>,
    reads: Arc<EntryReads>,
    /// Permits of the writes that wait or are under way.
    fills: Arc<Semaphore>,
    /// Permits of the writes that are under way.
    writes: Arc<Semaphore>,
    clock: Arc<dyn Clock>,
}

/// Lifetime of an entry of keys. A look-up reads the store at least once in this time.
const KEYS_LIFETIME: Duration = Duration::from_secs(300);
/// Lifetime of an entry for a verified key.
const VERIFIED_LIFETIME: Duration = Duration::from_secs(3600);

impl<S: KeyStore> RedisCache<S> {
    /// Creates a cache in front of `store` with the default settings.
    ///
    /// # Errors
    ///
    /// The errors of [`RedisCacheBuilder::build`].
    pub fn new(store: S, servers: impl Into<RedisServers>) -> Result<Self, RedisCacheError> {
        Self::builder(store, servers).build()
    }

    /// Creates a builder.
    pub fn builder(store: S, servers: impl Into<RedisServers>) -> RedisCacheBuilder<S> {
        RedisCacheBuilder::new(store, servers.into())
    }

    /// Returns the store behind the cache.
    pub fn get_ref(&self) -> &S {
        &self.0.store
    }

    /// Returns the state of Redis, for a health check. Keys are checked in every state.
    pub fn state(&self) -> RedisState {
        self.0.link.state()
    }
}

/// The data in Redis for a look-up.
#[derive(Default)]
struct CacheRead {
    /// The answer and its age.
    answer: Option<(Answer, Age)>,
    proof: Option<Proof>,
    /// The last bytes of an entry that was rejected.
    rejected_tail: Vec<u8>,
}

impl<S: KeyStore> KeyStore for RedisCache<S> {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let tier = &self.0;
        if !lookup.is_presented() {
            // The name of the entry for a verified key is derived from the key itself.
            return tier.store.resolve(lookup).await;
        }
        let Some(secret) = tier.secrets.current(self) else {
            return tier.store.resolve(lookup).await;
        };
        let names = Names::new(lookup, &secret);
        let mut read = CacheRead::default();
        if !lookup.skips_copies() && lookup.view().minimum_revisions.is_caught_up() {
            read = self.find(lookup, &names, &secret).await;
        }
        let old = match read.answer {
            Some((answer, Age::Fresh)) => {
                telemetry::redis_hit(true);
                return Ok(answer);
            }
            old => old,
        };
        telemetry::redis_hit(false);
        let below = match read.proof {
            Some(proof) => tier.store.resolve(&lookup.clone().with_proof(proof)).await,
            None => tier.store.resolve(lookup).await,
        };
        match (below, old) {
            (Ok(answer), _) => {
                self.fill(lookup, &names, &secret, &answer, read.rejected_tail);
                Ok(answer)
            }
            (Err(error), Some((answer, Age::Stale)))
                if error.is_transient() && lookup.grants_access(&answer) =>
            {
                Ok(answer.with_source(Source::Fallback))
            }
            (Err(error), _) => Err(error),
        }
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        pub_sub::changes(self, since)
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.0.store.record_usage(batch).await
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.0.store.lease(request).await
    }

    fn can_read_keys(&self) -> bool {
        self.0.store.can_read_keys()
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        self.0.store.read_keys(selection).await
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        self.0.store.read_owners(owners).await
    }

    fn invalidate(&self, lookup_id: &str) {
        self.0.store.invalidate(lookup_id);
    }

    fn replica_status(&self) -> Option<ReplicaStatus> {
        self.0.store.replica_status()
    }

    fn has_cache_secret(&self) -> bool {
        self.0.store.has_cache_secret()
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        self.0.store.cache_secret().await
    }
}

impl<S: KeyStore> RedisCache<S> {
    /// Reads the entries, in one round trip unless many reads wait.
    async fn find(&self, lookup: &Lookup, names: &Names, secret: &CacheSecret) -> CacheRead {
        let Some(values) = self.0.reads.read(names).await else { return CacheRead::default() };
        let bytes = |at: usize| match values.get(at) {
            Some(Value::BulkString(bytes)) => Some(bytes.as_slice()),
            _ => None,
        };
        let now = lookup.clock().read();
        let database_now = lookup.view().freshness.database_now(now);
        let mut read = CacheRead::default();
        let end_of = |value: &[u8]| value[value.len().saturating_sub(MAC)..].to_vec();
        // Without its type, so that all values have one lifetime.
        let mut take = |name: &str, value| match Entry::decode(name, value, secret) {
            Ok(entry) if name == names.keys && lookup.view().is_ahead(entry.as_of, now) => {
                // A clock was set back: the age of the entry is unknown, and no other entry would be newer.
                read.rejected_tail = end_of(value);
                None
            }
            Ok(entry) if entry.expires_at > database_now => Some(entry),
            // The expiry of the entry was removed.
            Ok(_) => None,
            Err(Unreadable::UnknownSecret) => {
                self.0.secrets.refresh(self);
                None
            }
            // Its revisions are authentic: a newer answer replaces it.
            Err(Unreadable::OtherVersion) => None,
            Err(Unreadable::Retired) => {
                if name == names.keys {
                    read.rejected_tail = end_of(value);
                }
                None
            }
            Err(Unreadable::Forged) => {
                telemetry::redis_entry_invalid(name);
                if name == names.keys {
                    read.rejected_tail = end_of(value);
                }
                None
            }
        };
        let keys = bytes(0).and_then(|value| take(&names.keys, value));
        let verified = [
            (Some(&names.verified), 1, Some(secret)),
            (names.verified_before.as_ref(), 2, secret.previous()),
        ]
        .into_iter()
        .find_map(|(name, at, secret)| Some((take(name?, bytes(at)?)?, secret?)))
        .filter(|(entry, _)| entry.kind == Kind::Verified);
        if let Some((verified, secret)) = &verified
            && let Ok(mac) = <[u8; 32]>::try_from(verified.body)
        {
            // The entry identifies the hash by a MAC under the secret that it was made with.
            read.proof = Some(Proof::Shared(Box::new(((*secret).clone(), mac))));
        }
        let verified = verified.map(|(entry, _)| entry);
        match (keys, verified) {
            (Some(keys), _) if keys.kind == Kind::Tombstone => {
                let subject = Subject::Prefix(lookup.id().into());
                lookup.view().record_tombstone(
                    subject,
                    keys.key_revision,
                    keys.expires_at - KEYS_LIFETIME,
                    now,
                );
            }
            (Some(keys), Some(verified)) if keys.kind == Kind::Keys => {
                read.answer = answer(lookup, keys, (&verified, &read.proof), now);
            }
            _ => {}
        }
        read
    }

    /// Writes the answer of the store to Redis, in the background.
    fn fill(
        &self,
        lookup: &Lookup,
        names: &Names,
        secret: &CacheSecret,
        answer: &Answer,
        rejected_tail: Vec<u8>,
    ) {
        let read = answer.read();
        let (Outcome::Match(at), Source::Store) = (answer.outcome(), answer.source()) else {
            return;
        };
        if !read.is_whole {
            return;
        }
        let Some(fingerprint) = read.candidates.get(at).and_then(|it| it.fingerprint()) else {
            return;
        };
        let Some(body) = Keys::new(read, secret).and_then(|keys| keys.encode()) else { return };
        let Ok(permit) = Arc::clone(&self.0.fills).try_acquire_owned() else { return };
        let owner_revision =
            read.candidates.iter().map(|it| it.owner_revision).max().unwrap_or_default();
        let entry = |kind, lifetime, body| Entry {
            kind,
            key_revision: read.key_revision,
            owner_revision,
            as_of: answer.as_of(),
            expires_at: answer.as_of() + lifetime,
            body,
        };
        let keys = entry(Kind::Keys, keys_lifetime(read, answer.as_of()), &body);
        let mac = secret.mac_of_hash(fingerprint);
        let verified = entry(Kind::Verified, VERIFIED_LIFETIME, &mac);
        let now = lookup.clock().read();
        let database_now = lookup.view().freshness.database_now(now);
        let left =
            |entry: &Entry| entry.expires_at.duration_since(database_now).unwrap_or_default();
        // The database's time is known to within the delay of its notification.
        let keys_left = left(&keys).min(KEYS_LIFETIME);
        let verified_left = left(&verified).min(VERIFIED_LIFETIME);
        if keys_left.is_zero() {
            return;
        }
        let keys = keys.encode(&names.keys, secret);
        let verified = verified.encode(&names.verified, secret);
        if keys.len() > MAX_BYTES {
            return;
        }
        let (link, keys_name, verified_name) =
            (Arc::clone(&self.0.link), names.keys.clone(), names.verified.clone());
        let writes = Arc::clone(&self.0.writes);
        tokio::spawn(async move {
            let Ok(_turn) = writes.acquire().await else { return };
            let put = Put {
                name: &keys_name,
                value: &keys,
                lifetime: keys_left,
                rejected_tail: &rejected_tail,
                verified: Some((&verified_name, &verified, verified_left)),
            };
            // After a failed write, the answer is read from the store again.
            let _ = put.run(&link).await;
            drop(permit);
        });
    }
}

/// Returns the answer in a copy, and its age; `None` if a change came after it.
fn answer(
    lookup: &Lookup,
    keys: Entry<'_>,
    (verified, proof): (&Entry<'_>, &Option<Proof>),
    now: Moment,
) -> Option<(Answer, Age)> {
    let key = Keys::decode(keys.body)?.into_key_with(verified.body)?;
    let owner_revision = key.owner_revision;
    let subjects = [
        (Subject::Prefix(lookup.id().into()), keys.key_revision),
        (Subject::Owner(key.record.user.id.clone()), owner_revision),
    ];
    let age = lookup.view().judge_copy(&subjects, keys.as_of, now)?;
    let candidate =
        Candidate { record: key.record, secret: key.secret, owner_revision, proof: proof.clone() };
    let read =
        Read { candidates: vec![candidate], key_revision: keys.key_revision, is_whole: false };
    Some((
        lookup.answer(Outcome::Match(0), read).with_as_of(keys.as_of).with_source(Source::Copy),
        age,
    ))
}

impl<S> Clone for RedisCache<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: fmt::Debug> fmt::Debug for RedisCache<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisCache")
            .field("store", &self.0.store)
            .field("servers", self.0.link.connector())
            .field("state", &self.0.link.state())
            .finish_non_exhaustive()
    }
}
