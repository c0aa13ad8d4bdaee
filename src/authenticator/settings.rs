//! The settings of an authenticator: [`Settings`].

use std::time::Duration;

/// How much a node remembers and for how long, and how often it writes what was used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// So many keys.
    pub(crate) capacity: usize,
    /// Number of look-ups that may be under way.
    pub(crate) max_lookups: usize,
    pub(crate) max_staleness: Duration,
    pub(crate) stale_if_error: Duration,
    /// `None` records no usage.
    pub(crate) usage_interval: Option<Duration>,
    pub(crate) lease_lifetime: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            capacity: 100_000,
            max_lookups: 4096,
            max_staleness: Duration::from_secs(30),
            stale_if_error: Duration::from_secs(60),
            usage_interval: Some(Duration::from_secs(1)),
            lease_lifetime: Duration::from_secs(30),
        }
    }
}
