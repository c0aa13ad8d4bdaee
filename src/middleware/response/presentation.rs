//! Settings for the responses to denied requests: [`Presentation`].

use std::{
    fmt,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use http::Response;

use super::denied_request::DeniedRequest;
use crate::middleware::discard::DiscardLimits;

/// Realm of a challenge, escaped for a quoted string.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Realm(pub(super) String);

impl Realm {
    /// Creates a realm. Returns `None` if a quoted string can't contain `text` or it is longer than 256 bytes.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let is_valid = text.len() <= 256 && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
        is_valid.then(|| Self(quoted(text)))
    }
}

type Respond = dyn Fn(&DeniedRequest<'_>) -> Response<Bytes> + Send + Sync;

/// Closure that creates the response to a denied request, instead of the default.
#[derive(Clone)]
pub(crate) struct OnDenial(pub(crate) Arc<Respond>);

impl PartialEq for OnDenial {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for OnDenial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnDenial")
    }
}

/// Settings of a layer for the responses to denied requests.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Presentation {
    pub(crate) realm: Realm,
    /// Also true if neither scheme is accepted, because a 401 must have a challenge (RFC 9110 §15.5.2).
    pub(crate) offers_bearer: bool,
    pub(crate) offers_basic: bool,
    pub(crate) verbose: bool,
    pub(crate) on_denial: Option<OnDenial>,
    /// Whether gRPC callers get HTTP responses.
    pub(crate) is_http_only: bool,
    pub(crate) discard: DiscardLimits,
}

impl Default for Presentation {
    fn default() -> Self {
        Self {
            realm: Realm("api".to_owned()),
            offers_bearer: true,
            offers_basic: false,
            verbose: false,
            on_denial: None,
            is_http_only: false,
            discard: DiscardLimits::default(),
        }
    }
}

impl Presentation {
    /// Returns the default settings.
    pub(super) fn default_settings() -> &'static Self {
        static DEFAULT: LazyLock<Presentation> = LazyLock::new(Presentation::default);
        &DEFAULT
    }

    /// Returns the settings for sharing between the requests of a layer; `None` if they are the default. Requests
    /// then update no reference counter, which would be contended on all cores.
    pub(crate) fn shared(self) -> Option<Arc<Self>> {
        (self != *Self::default_settings()).then(|| Arc::new(self))
    }
}

/// Escapes the characters that end a quoted string (RFC 9110 §5.6.4) and drops those that it can't contain.
pub(super) fn quoted(text: &str) -> String {
    let visible = text.chars().filter(|c| *c == ' ' || c.is_ascii_graphic());
    visible.flat_map(|c| matches!(c, '"' | '\\').then_some('\\').into_iter().chain([c])).collect()
}
