//! The remaining requests of a key's rate limits: [`Quota`].

use std::time::Duration;

use super::key_record::RateLimits;

/// The result of a [`RateLimiter`](crate::rate_limit::RateLimiter) for a request.
///
/// It is small, because it is stored in the request: one entry per period, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quota {
    is_allowed: bool,
    has_window: [bool; 3],
    limits: [u64; 3],
    remaining: [u64; 3],
    resets_in: [u32; 3],
}

/// The window of a rate limit that counted a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateWindow {
    /// Length of the window.
    pub period: RatePeriod,
    /// Maximum number of requests in the window.
    pub limit: u64,
    /// Number of requests left in the window.
    pub remaining: u64,
    /// Time until the next window begins, in milliseconds precision.
    pub resets_in: Duration,
}

/// The length of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RatePeriod {
    /// A minute: 60 s.
    Minute,
    /// An hour: 3600 s.
    Hour,
    /// A day: 86,400 s, from midnight UTC.
    Day,
}

impl RatePeriod {
    pub(crate) const ALL: [Self; 3] = [Self::Minute, Self::Hour, Self::Day];

    /// Returns the length in seconds.
    pub fn seconds(self) -> u64 {
        match self {
            Self::Minute => 60,
            Self::Hour => 3_600,
            Self::Day => 86_400,
        }
    }

    /// Returns the policy name of the window in response header fields.
    pub fn name(self) -> &'static str {
        match self {
            Self::Minute => "minute",
            Self::Hour => "hour",
            Self::Day => "day",
        }
    }

    /// Returns the limit for windows of this length.
    pub fn limit(self, limits: &RateLimits) -> Option<u64> {
        match self {
            Self::Minute => limits.per_minute,
            Self::Hour => limits.per_hour,
            Self::Day => limits.per_day,
        }
    }
}

impl Quota {
    /// Creates a result from whether the request is allowed, and the windows that counted it. A period has at most one
    /// window; of several, the last is used.
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

    /// Returns whether the request is allowed.
    pub fn is_allowed(&self) -> bool {
        self.is_allowed
    }

    pub(crate) fn refuse(&mut self) {
        self.is_allowed = false;
    }

    /// Returns the windows that have a limit, the shortest first.
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

    /// Returns the limits by period.
    #[inline]
    pub(crate) fn limits(&self) -> [Option<u64>; 3] {
        RatePeriod::ALL.map(|period| {
            let at = period as usize;
            self.has_window[at].then_some(self.limits[at])
        })
    }

    /// Returns the time until every full window has room again.
    pub fn retry_after(&self) -> Duration {
        let full = self.windows().filter(|window| window.remaining == 0);
        full.map(|window| window.resets_in).max().unwrap_or_default()
    }
}
