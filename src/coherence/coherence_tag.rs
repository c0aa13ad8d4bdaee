//! What is kept beside an answer: [`CoherenceTag`].

use super::{freshness::Age, minimum_revisions::Generation, view::View};
use crate::runtime::Moment;

/// What counts for serving an answer again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CoherenceTag {
    /// When the read was sent.
    pub(crate) as_of: Moment,
    /// Those of the prefix and the owner from before the answer was judged.
    pub(crate) prefix: Generation,
    pub(crate) owner: Option<Generation>,
    /// By the wall clock, in nanoseconds since the Unix epoch.
    pub(crate) expires_at: u64,
}

impl CoherenceTag {
    /// How old the answer is; expired if a change has come since, or the key's time is over.
    #[inline]
    pub(crate) fn age(&self, view: &View, now: Moment) -> Age {
        let is_current = view.minimum_revisions.is_current(self.prefix)
            && self.owner.is_none_or(|owner| view.minimum_revisions.is_current(owner));
        if !is_current || now.wall_nanos() >= self.expires_at {
            return Age::Expired;
        }
        view.freshness.age(self.as_of, now)
    }
}
