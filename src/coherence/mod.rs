//! The rules that decide whether an answer may still be served.
//!
//! Copies of answers are stored in the local cache and in Redis. They can be outdated: a fill may run late, and Redis
//! may be restored from a snapshot. Two rules keep an outdated copy from being served. Minimum revisions
//! ([`minimum_revisions`]): a node that has received a change serves no answer from before it. Freshness
//! ([`freshness`]): an answer is served only for a limited time after it was read, or after the node was last in sync
//! with the changes of the store.

mod coherence_tag;
mod freshness;
mod minimum_revisions;
mod view;

pub(crate) use self::{
    coherence_tag::CoherenceTag,
    freshness::Age,
    minimum_revisions::{Generation, MINIMUM_REVISION_LIFETIME, Seen, Standing, Subject},
    view::View,
};
