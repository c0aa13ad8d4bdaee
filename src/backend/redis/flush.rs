//! Preparing and completing the work of a short-lived process.

use std::time::Duration;

use deadpool_redis::redis::cmd;
use tokio::time::sleep;

use super::RedisCache;
use crate::{redis::RedisState, runtime::within, store::KeyStore};

/// Interval of the checks whether the work is complete.
const PAUSE: Duration = Duration::from_millis(5);

impl<S: KeyStore> RedisCache<S> {
    /// Connects and reads the secret of the cache, within `limit`. Returns whether Redis is ready. A process that makes a
    /// change and ends calls it first, so that the change deletes the entries in Redis.
    pub async fn prepare(&self, limit: Duration) -> bool {
        let link = &self.0.link;
        let prepared = within(limit, async {
            loop {
                // The first use of each starts it.
                let has_secret = self.0.secrets.current(self).is_some();
                if link.state() != RedisState::Up {
                    let _ = link.run(&cmd("PING")).await;
                }
                if has_secret && link.state() == RedisState::Up {
                    return;
                }
                sleep(PAUSE).await;
            }
        });
        prepared.await.is_some()
    }

    /// Waits until the changes that were made through this cache have deleted their entries in Redis, for at most `limit`.
    /// Returns whether they have. Correctness does not depend on it: nodes learn of each change from the store.
    pub async fn flush(&self, limit: Duration) -> bool {
        let flushed = within(limit, async {
            while !self.0.tombstones.is_empty() {
                sleep(PAUSE).await;
            }
        });
        flushed.await.is_some()
    }
}
