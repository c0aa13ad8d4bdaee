//! What is left of a key's rate limits: [`Quota`].

use std::time::Duration;

use super::key_record::RateLimits;

/// What a [`RateLimiter`](super::RateLimiter) says of a request.
///
/// Kept small, because it goes with the request: by period, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    is_allowed: bool,
    has_window: [bool; 3],
    limits: [u64; 3],
    remaining: [u64; 3],
    resets_in: [u32; 3],
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
    /// How long until the next one begins, to the millisecond.
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
    pub(crate) const ALL: [Self; 3] = [Self::Minute, Self::Hour, Self::Day];

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
        let mut quota = Self::empty(is_allowed);
        for window in windows {
            let millis = window.resets_in.as_nanos().div_ceil(1_000_000);
            let millis = u32::try_from(millis).unwrap_or(u32::MAX);
            quota.put(window.period, window.limit, window.remaining, millis);
        }
        quota
    }

    pub(crate) fn empty(is_allowed: bool) -> Self {
        let (limits, remaining, resets_in) = ([0; 3], [0; 3], [0; 3]);
        Self { is_allowed, has_window: [false; 3], limits, remaining, resets_in }
    }

    #[inline]
    pub(crate) fn put(&mut self, period: RatePeriod, limit: u64, remaining: u64, millis: u32) {
        let at = period as usize;
        self.has_window[at] = true;
        (self.limits[at], self.remaining[at], self.resets_in[at]) = (limit, remaining, millis);
    }

    pub(crate) fn take_one(&mut self) {
        self.remaining = self.remaining.map(|remaining| remaining.saturating_sub(1));
    }

    /// Whether the request may go on.
    pub fn is_allowed(&self) -> bool {
        self.is_allowed
    }

    pub(crate) fn refuse(&mut self) {
        self.is_allowed = false;
    }

    /// The windows that have a limit, the shortest first.
    #[inline]
    pub fn windows(&self) -> impl DoubleEndedIterator<Item = RateWindow> {
        let with_limit = RatePeriod::ALL.into_iter().filter(|&it| self.has_window[it as usize]);
        with_limit.map(|period| RateWindow {
            period,
            limit: self.limits[period as usize],
            remaining: self.remaining[period as usize],
            resets_in: Duration::from_millis(self.resets_in[period as usize].into()),
        })
    }

    /// By period.
    #[inline]
    pub(crate) fn limits(&self) -> [Option<u64>; 3] {
        RatePeriod::ALL.map(|period| {
            let at = period as usize;
            self.has_window[at].then_some(self.limits[at])
        })
    }

    /// How long until there is room in every window that is full now.
    pub fn retry_after(&self) -> Duration {
        let full = self.windows().filter(|window| window.remaining == 0);
        full.map(|window| window.resets_in).max().unwrap_or_default()
    }
}
