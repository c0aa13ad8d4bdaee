//! What is left of a key's rate limits: [`Quota`].

use std::time::Duration;

use crate::record::RateLimits;

/// What a [`RateLimiter`](super::RateLimiter) says of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    is_allowed: bool,
    windows: [Option<RateWindow>; 3],
}

/// The window of a rate limit that a request came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateWindow {
    /// How long such a window is.
    pub period: RatePeriod,
    /// So many requests fit into it.
    pub limit: u64,
    /// So many more do.
    pub remaining: u64,
    /// How long until the next one begins.
    pub resets_in: Duration,
}

/// How long a window is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RatePeriod {
    /// 60 s.
    Minute,
    /// 3600 s.
    Hour,
    /// 86,400 s, from midnight UTC.
    Day,
}

impl RatePeriod {
    pub(super) const ALL: [Self; 3] = [Self::Minute, Self::Hour, Self::Day];

    /// In seconds.
    pub fn seconds(self) -> u64 {
        match self {
            Self::Minute => 60,
            Self::Hour => 3_600,
            Self::Day => 86_400,
        }
    }

    /// The name of its policy in the fields of a response.
    pub fn name(self) -> &'static str {
        match self {
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }

    /// The limit for such windows.
    pub fn limit(self, limits: &RateLimits) -> Option<u64> {
        match self {
            Self::Minute => limits.per_minute,
            Self::Hour => limits.per_hour,
            Self::Day => limits.per_day,
        }
    }
}

impl Quota {
    /// Whether the request may go on, and the windows that it came in: one of a period at most; of more, the
    /// last counts.
    pub fn new(is_allowed: bool, windows: impl IntoIterator<Item = RateWindow>) -> Self {
        let mut by_period = [None; 3];
        for window in windows {
            by_period[window.period as usize] = Some(window);
        }
        Self { is_allowed, windows: by_period }
    }

    /// Whether the request may go on.
    pub fn is_allowed(&self) -> bool {
        self.is_allowed
    }

    /// The windows that have a limit, the shortest first.
    pub fn windows(&self) -> impl Iterator<Item = &RateWindow> {
        self.windows.iter().flatten()
    }

    /// How long until there is room in every window that is full now.
    pub fn retry_after(&self) -> Duration {
        let full = self.windows().filter(|window| window.remaining == 0);
        full.map(|window| window.resets_in).max().unwrap_or_default()
    }
}
