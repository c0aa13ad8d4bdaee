//! Rate limit fields of a response: draft-ietf-httpapi-ratelimit-headers-10.
//!
//! `RateLimit-Policy: "minute";q=1000;w=60` and `RateLimit: "minute";r=999;t=42`: the limit of a window and its
//! length in seconds, the number of remaining requests and the seconds until the next window.

use std::{cell::RefCell, mem};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::record::{Quota, RatePeriod, RateWindow};

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Rate limit fields of a response.
pub(crate) struct RateFields {
    policy: HeaderValue,
    remaining: HeaderValue,
}

impl RateFields {
    /// Adds the fields, and replaces existing ones.
    pub(crate) fn write(self, headers: &mut HeaderMap) {
        headers.insert(RATE_LIMIT_POLICY, self.policy);
        headers.insert(RATE_LIMIT, self.remaining);
    }
}

impl Quota {
    /// Returns the fields; `None` if there is no window.
    pub(crate) fn fields(&self) -> Option<RateFields> {
        Some(RateFields { policy: self.policy()?, remaining: self.remaining()? })
    }

    fn policy(&self) -> Option<HeaderValue> {
        let limits = self.limits();
        let known = POLICIES.try_with(|policies| {
            let mut policies = policies.borrow_mut();
            let slot = &mut policies[slot(&limits)];
            if slot.as_ref().is_none_or(|(known, _)| *known != limits) {
                *slot = Some((limits, self.write_policy()?));
            }
            slot.as_ref().map(|(_, policy)| policy.clone())
        });
        // The cache of a thread that ends is no longer accessible.
        known.unwrap_or_else(|_| self.write_policy())
    }

    fn write_policy(&self) -> Option<HeaderValue> {
        self.field(|text, window| {
            text.member(window, [b";w=", b";q="], window.period.seconds(), window.limit)
        })
    }

    fn remaining(&self) -> Option<HeaderValue> {
        self.field(|text, window| {
            // Rounded up to whole seconds, so that the client does not retry too early.
            let resets_in = window.resets_in;
            let resets_in = resets_in.as_secs() + u64::from(resets_in.subsec_nanos() > 0);
            text.member(window, [b";t=", b";r="], resets_in, window.remaining);
        })
    }

    fn field(&self, member: impl Fn(&mut Text<'_>, &RateWindow)) -> Option<HeaderValue> {
        let mut buffer = [0; MAX_LENGTH];
        let mut text = Text { room: &mut buffer };
        for window in self.windows().rev() {
            if text.room.len() < MAX_LENGTH {
                text.push(b", ");
            }
            member(&mut text, &window);
        }
        let start = text.room.len();
        let text = buffer.get(start..).filter(|text| !text.is_empty())?;
        // The text is ASCII.
        HeaderValue::from_bytes(text).ok()
    }
}

/// Limits, and the policy field that was written for them.
type Policy = ([Option<u64>; 3], HeaderValue);

thread_local! {
    /// Policy fields that this thread has written last. Keys share few policies, so most are cache hits. The cache is
    /// per thread, because clones of a value share one reference counter.
    static POLICIES: RefCell<[Option<Policy>; SLOTS]> = const { RefCell::new([const { None }; SLOTS]) };
}

const SLOTS: usize = 16;

fn slot(limits: &[Option<u64>; 3]) -> usize {
    // Multiplicative hashing: the upper bits depend on all limits.
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let add = |hash: u64, limit: &Option<u64>| (hash ^ limit.unwrap_or(u64::MAX)).wrapping_mul(ODD);
    (limits.iter().fold(0, add) >> 60) as usize % SLOTS
}

/// Maximum length of a field in bytes: three windows.
const MAX_LENGTH: usize = 3 * 48;
/// Largest integer of a structured field (RFC 9651 §3.3.1).
const MAX_INTEGER: u64 = 999_999_999_999_999;

/// Text that is written from its end, because conversion of a number yields its last digits first.
struct Text<'a> {
    /// Free space before the text.
    room: &'a mut [u8],
}

impl Text<'_> {
    /// Writes a window's name and its two parameters, the last one first.
    #[inline]
    fn member(&mut self, window: &RateWindow, names: [&[u8; 3]; 2], last: u64, first: u64) {
        self.number(last);
        self.push(names[0]);
        self.number(first);
        self.push(names[1]);
        match window.period {
            RatePeriod::Minute => self.push(b"\"minute\""),
            RatePeriod::Hour => self.push(b"\"hour\""),
            RatePeriod::Day => self.push(b"\"day\""),
        }
    }

    #[inline]
    fn number(&mut self, number: u64) {
        let mut remaining = number.min(MAX_INTEGER);
        while remaining >= 100 {
            self.digits((remaining % 100) as u8);
            remaining /= 100;
        }
        if remaining >= 10 {
            self.digits(remaining as u8);
        } else {
            self.push(&[b'0' + remaining as u8]);
        }
    }

    #[inline]
    fn digits(&mut self, two: u8) {
        self.push(&[b'0' + two / 10, b'0' + two % 10]);
    }

    #[inline]
    fn push<const N: usize>(&mut self, piece: &[u8; N]) {
        // The buffer always has room for the piece.
        if let Some((room, place)) = mem::take(&mut self.room).split_last_chunk_mut() {
            *place = *piece;
            self.room = room;
        }
    }
}
