//! Under which names entries lie in Redis: [`Names`].

use crate::{
    redis::slot,
    store::{CacheSecret, Lookup},
};

/// Where the entries of one look-up lie. All of them are in one slot of a cluster.
pub(super) struct Names {
    pub(super) keys: String,
    pub(super) verified: String,
    /// Under the secret from before.
    pub(super) verified_before: Option<String>,
}

impl Names {
    pub(super) fn new(lookup: &Lookup, secret: &CacheSecret) -> Self {
        let tag = slot(lookup.id());
        let verified = |secret: &CacheSecret| {
            format!("api_key:verified:{tag}:{}", secret.name_of_key(lookup.expose_secret()))
        };
        Self {
            keys: format!("api_key:data:{tag}"),
            verified: verified(secret),
            verified_before: secret.previous().map(verified),
        }
    }
}

pub(super) fn keys_name(prefix: &str) -> String {
    format!("api_key:data:{}", slot(prefix))
}
