//! How much is left, in the fields of a response: draft-ietf-httpapi-ratelimit-headers-10.
//!
//! `RateLimit-Policy: "minute";q=1000;w=60` and `RateLimit: "minute";r=999;t=42`: the limit of a window and its
//! seconds, how many requests are left and the seconds until the next window.

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::Quota;

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// As much as three windows take.
const LONGEST: usize = 3 * 40;

impl Quota {
    /// Writes the fields, in place of those that are there.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        if self.windows().next().is_none() {
            return;
        }
        let mut text = BytesMut::with_capacity(2 * LONGEST);
        for (at, window) in self.windows().enumerate() {
            let end = [("\";q=", window.limit), (";w=", window.period.seconds())];
            member(&mut text, at, window.period.name(), end);
        }
        let policy = text.split().freeze();
        for (at, window) in self.windows().enumerate() {
            // Whole seconds, and never too early.
            let resets_in = (window.resets_in.as_millis() as u64).div_ceil(1_000);
            let end = [("\";r=", window.remaining), (";t=", resets_in)];
            member(&mut text, at, window.period.name(), end);
        }
        insert(headers, RATE_LIMIT_POLICY, policy);
        insert(headers, RATE_LIMIT, text.freeze());
    }
}

fn member(text: &mut BytesMut, at: usize, name: &str, parameters: [(&str, u64); 2]) {
    text.put_slice(if at == 0 { b"\"" } else { b", \"" });
    text.put_slice(name.as_bytes());
    for (parameter, value) in parameters {
        text.put_slice(parameter.as_bytes());
        text.put_slice(itoa::Buffer::new().format(value.min(LARGEST)).as_bytes());
    }
}

/// The largest integer of a structured field (RFC 9651 §3.3.1).
const LARGEST: u64 = 999_999_999_999_999;

fn insert(headers: &mut HeaderMap, name: HeaderName, value: Bytes) {
    // It is ASCII.
    if let Ok(value) = HeaderValue::from_maybe_shared(value) {
        headers.insert(name, value);
    }
}
