//! Settings of an authenticator: [`Settings`].

use std::{sync::Arc, time::Duration};

use crate::runtime::{Clock, SystemClock};

/// Clock, sizes, staleness bounds and intervals of a node.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) clock: Arc<dyn Clock>,
    /// Maximum number of valid keys in the local cache.
    pub(crate) capacity: usize,
    /// Maximum number of concurrent look-ups.
    pub(crate) max_lookups: usize,
    pub(crate) max_staleness: Duration,
    pub(crate) stale_if_error: Duration,
    /// Interval of usage writes; `None` disables usage recording.
    pub(crate) usage_interval: Option<Duration>,
    pub(crate) lease_lifetime: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            clock: Arc::new(SystemClock),
            capacity: 100_000,
            max_lookups: 4096,
            max_staleness: Duration::from_secs(30),
            stale_if_error: Duration::from_secs(60),
            usage_interval: Some(Duration::from_secs(1)),
            lease_lifetime: Duration::from_secs(30),
        }
    }
}
