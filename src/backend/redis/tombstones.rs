//! Tombstones in Redis, written in the background: [`TombstoneQueue`].

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, SystemTime},
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
    runtime::{Background, Clock, Moment},
    store::CacheSecret,
    telemetry,
};

/// Tombstones that are still to be written to Redis. They are an optimization, with retries: no revocation waits for
/// them, and only a node that is cut off from the store depends on them.
pub(super) struct TombstoneQueue {
    link: Arc<Link>,
    pending: Mutex<VecDeque<Arc<PendingTombstone>>>,
    work: Background,
    clock: Arc<dyn Clock>,
}

struct PendingTombstone {
    prefix: String,
    revision: Revision,
    secret: CacheSecret,
    made_at: Moment,
}

/// Maximum number of pending tombstones. Beyond it, the oldest are dropped: entries expire anyway.
const MAX_PENDING: usize = 10_000;
const PAUSE: Duration = Duration::from_millis(200);

impl TombstoneQueue {
    pub(super) fn new(link: Arc<Link>, clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self { link, pending: Mutex::default(), work: Background::default(), clock })
    }

    /// Queues a tombstone that replaces the entry of the keys under `prefix`.
    pub(super) fn push(self: &Arc<Self>, prefix: &str, revision: Revision, secret: CacheSecret) {
        let tombstone = PendingTombstone {
            prefix: prefix.to_owned(),
            revision,
            secret,
            made_at: self.clock.read(),
        };
        let mut pending = self.pending();
        if pending.len() == MAX_PENDING {
            pending.pop_front();
        }
        pending.push_back(Arc::new(tombstone));
        drop(pending);
        self.work.ensure(|| work(Arc::downgrade(self)));
    }

    /// Returns whether every tombstone was written.
    pub(super) fn is_empty(&self) -> bool {
        self.pending().is_empty()
    }

    fn pending(&self) -> MutexGuard<'_, VecDeque<Arc<PendingTombstone>>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the oldest tombstone; returns `None` if there is none.
    async fn next(&self) -> Option<Result<(), Fault>> {
        let tombstone = self.pending().front().cloned()?;
        let outcome = tombstone.run(&self.link).await;
        // After this time, the entry itself has expired.
        let is_expired = self.clock.read().since(tombstone.made_at) > KEYS_LIFETIME;
        if outcome.is_ok() || is_expired {
            let mut pending = self.pending();
            // The front may be another one, if this was dropped meanwhile.
            if pending.front().is_some_and(|it| Arc::ptr_eq(it, &tombstone)) {
                pending.pop_front();
            }
        }
        Some(outcome)
    }
}

async fn work(queue: Weak<TombstoneQueue>) {
    // The task stays idle for a moment before it ends: a tombstone that is queued just as it ends would wait for the
    // next one.
    let mut idle = 0;
    while let Some(queue) = queue.upgrade() {
        match queue.next().await {
            Some(Ok(())) => idle = 0,
            Some(Err(fault)) => {
                telemetry::tombstone_not_written(&format!("{fault:?}"));
                queue.link.wait_until_up(PAUSE * 10).await;
                tokio::time::sleep(PAUSE).await;
            }
            None if idle == 10 => return,
            None => {
                idle += 1;
                drop(queue);
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

impl PendingTombstone {
    async fn run(&self, link: &Arc<Link>) -> Result<(), Fault> {
        let name = keys_name(&self.prefix, &self.secret);
        let made_at = self.made_at.wall();
        let tombstone = Entry {
            kind: Kind::Tombstone,
            key_revision: self.revision,
            owner_revision: Revision(0),
            // An entry of the same revision that was read after the change replaces the tombstone. Without revisions,
            // the later of the two wins.
            as_of: if self.revision == Revision(0) { made_at } else { SystemTime::UNIX_EPOCH },
            expires_at: made_at + KEYS_LIFETIME,
            body: &[],
        };
        let value = tombstone.encode(&name, &self.secret);
        let put = Put {
            name: &name,
            value: &value,
            lifetime: KEYS_LIFETIME,
            rejected_tail: &[],
            verified: None,
        };
        put.run(link).await.map(drop)
    }
}
