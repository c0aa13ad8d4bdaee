//! Under which names entries lie in Redis: [`Names`].

use crate::{
    key::hex,
    store::{CacheSecret, Lookup},
};

/// Where the entries of one look-up lie. The braces put them into one slot of a cluster; the prefix is in
/// hexadecimal, because it may have braces in it as well.
pub(super) struct Names {
    pub(super) keys: String,
    pub(super) verified: String,
    /// Under the secret from before.
    pub(super) verified_before: Option<String>,
}

impl Names {
    pub(super) fn new(lookup: &Lookup, secret: &CacheSecret) -> Self {
        let tag = tag(lookup.id());
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

fn tag(prefix: &str) -> String {
    format!("{{{}}}", hex(prefix.as_bytes()))
}

pub(super) fn keys_name(prefix: &str) -> String {
    format!("api_key:data:{}", tag(prefix))
}
