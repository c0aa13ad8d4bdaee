//! How a layer's refusals look: [`Presentation`].

use std::{
    fmt,
    sync::{Arc, LazyLock},
};

use bytes::Bytes;
use http::Response;

use super::denied_request::DeniedRequest;
use crate::middleware::discard::DiscardLimits;

/// The realm of a challenge, as it stands between the quotes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Realm(pub(super) String);

impl Realm {
    /// `None` if a quoted string can't hold `text` or it is longer than 256 bytes.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let holds = text.len() <= 256 && text.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
        holds.then(|| Self(quoted(text)))
    }
}

type Respond = dyn Fn(&DeniedRequest<'_>) -> Response<Bytes> + Send + Sync;

/// What makes the body of a refusal instead of the default.
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

/// How a layer's refusals look.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Presentation {
    pub(crate) realm: Realm,
    /// Also where neither scheme is: a 401 has a challenge (RFC 9110 §15.5.2).
    pub(crate) offers_bearer: bool,
    pub(crate) offers_basic: bool,
    pub(crate) verbose: bool,
    pub(crate) on_denial: Option<OnDenial>,
    /// Whether gRPC callers get HTTP responses as well.
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
    /// The one that a layer has if nobody says otherwise.
    pub(super) fn common() -> &'static Self {
        static COMMON: LazyLock<Presentation> = LazyLock::new(Presentation::default);
        &COMMON
    }

    /// To be shared by the requests of a layer; `None` if it is the common one, so that they need not count
    /// who has it: that counter would be in demand on all cores.
    pub(crate) fn shared(self) -> Option<Arc<Self>> {
        (self != *Self::common()).then(|| Arc::new(self))
    }
}

/// Escapes what ends a quoted string (RFC 9110 §5.6.4) and drops what it can't hold.
pub(super) fn quoted(text: &str) -> String {
    let visible = text.chars().filter(|c| *c == ' ' || c.is_ascii_graphic());
    visible.flat_map(|c| matches!(c, '"' | '\\').then_some('\\').into_iter().chain([c])).collect()
}
