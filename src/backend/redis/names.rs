//! Names of entries in Redis: [`Names`].

use crate::{
    redis::slot,
    runtime::hex_in,
    store::{CacheSecret, Lookup},
};

/// The names of the entries of one look-up. All of them are in one slot of a cluster.
pub(super) struct Names {
    pub(super) keys: String,
    pub(super) verified: String,
    /// The name under the previous secret.
    pub(super) verified_before: Option<String>,
}

impl Names {
    pub(super) fn new(lookup: &Lookup, secret: &CacheSecret) -> Self {
        let slot = slot(lookup.id());
        let verified = |secret: &CacheSecret| {
            let mut digits = [0; 32];
            let key = hex_in(&secret.mac_of_key(lookup.expose_secret()), &mut digits);
            ["api_key:verified:", secret.tag(), &slot, ":", key].concat()
        };
        Self {
            keys: ["api_key:data:", secret.tag(), &slot].concat(),
            verified: verified(secret),
            verified_before: secret.previous().map(verified),
        }
    }

    /// Returns the names in the order in which they are read.
    pub(super) fn all(&self) -> impl Iterator<Item = &str> + Clone {
        let verified_before = self.verified_before.as_deref();
        [&*self.keys, &*self.verified].into_iter().chain(verified_before)
    }
}

pub(super) fn keys_name(prefix: &str, secret: &CacheSecret) -> String {
    ["api_key:data:", secret.tag(), &slot(prefix)].concat()
}

/// Returns the pub/sub channel of changes.
pub(super) fn channel(secret: &CacheSecret) -> String {
    format!("api_key:changes:{}", secret.tag()).trim_end_matches(':').to_owned()
}
