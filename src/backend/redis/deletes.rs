//! Deletes in Redis, in the background: [`Deletes`].

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant, SystemTime},
};

use super::{
    KEYS_LIFETIME,
    entry::{Entry, Kind},
    names::keys_name,
    script::Put,
};
use crate::{
    record::Revision,
    redis::{Fault, Link},
    runtime::Background,
    store::CacheSecret,
    telemetry,
};

/// What has changed and is still to be deleted in Redis. No revoke waits for it, and nothing but the node
/// that is cut off from the store depends on it: good manners, with retries.
pub(super) struct Deletes {
    link: Arc<Link>,
    pending: Mutex<VecDeque<Delete>>,
    work: Background,
}

#[derive(Clone)]
struct Delete {
    prefix: String,
    revision: Revision,
    secret: CacheSecret,
    since: Instant,
    made_at: SystemTime,
}

/// So many wait. Past that the oldest are forgotten: entries end on their own.
const MAX_PENDING: usize = 10_000;
const PAUSE: Duration = Duration::from_millis(200);

impl Deletes {
    pub(super) fn new(link: Arc<Link>) -> Arc<Self> {
        Arc::new(Self { link, pending: Mutex::default(), work: Background::default() })
    }

    /// Deletes the entry of the keys under `prefix`, and leaves a tombstone in its place.
    pub(super) fn push(self: &Arc<Self>, prefix: &str, revision: Revision, secret: CacheSecret) {
        let delete = Delete {
            prefix: prefix.to_owned(),
            revision,
            secret,
            since: Instant::now(),
            made_at: SystemTime::now(),
        };
        let mut pending = self.pending();
        if pending.len() == MAX_PENDING {
            pending.pop_front();
        }
        pending.push_back(delete);
        drop(pending);
        self.work.ensure(|| work(Arc::downgrade(self)));
    }

    fn pending(&self) -> MutexGuard<'_, VecDeque<Delete>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out the oldest delete; `None` if there is none.
    async fn next(&self) -> Option<Result<(), Fault>> {
        let delete = self.pending().front().cloned()?;
        let outcome = delete.run(&self.link).await;
        // After this, what the entry held has ended on its own.
        if outcome.is_ok() || delete.since.elapsed() > KEYS_LIFETIME {
            let mut pending = self.pending();
            // Not another one, if this was pushed out meanwhile.
            if pending.front().is_some_and(|it| it.since == delete.since) {
                pending.pop_front();
            }
        }
        Some(outcome)
    }
}

async fn work(deletes: Weak<Deletes>) {
    // A moment longer than it has to: a delete that comes just as this ends would wait for the next.
    let mut idle = 0;
    while let Some(deletes) = deletes.upgrade() {
        match deletes.next().await {
            Some(Ok(())) => idle = 0,
            Some(Err(fault)) => {
                telemetry::not_deleted_in_redis(&format!("{fault:?}"));
                deletes.link.wait_until_up(PAUSE * 10).await;
                tokio::time::sleep(PAUSE).await;
            }
            None if idle == 10 => return,
            None => {
                idle += 1;
                drop(deletes);
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

impl Delete {
    async fn run(&self, link: &Arc<Link>) -> Result<(), Fault> {
        let name = keys_name(&self.prefix, &self.secret);
        let tombstone = Entry {
            kind: Kind::Tombstone,
            key_revision: self.revision,
            owner_revision: Revision(0),
            // Against an entry of the same revision, which was read after the change, it does not stand; where
            // there are no revisions, the later one counts.
            as_of: if self.revision == Revision(0) { self.made_at } else { SystemTime::UNIX_EPOCH },
            expires_at: self.made_at + KEYS_LIFETIME,
            body: Vec::new(),
        };
        let value = tombstone.encode(&name, &self.secret);
        let put = Put {
            name: &name,
            value: &value,
            lifetime: KEYS_LIFETIME,
            unbelieved: &[],
            verified: None,
        };
        put.run(link).await.map(drop)
    }
}
