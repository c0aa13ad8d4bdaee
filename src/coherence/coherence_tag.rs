//! Coherence data of a cached answer: [`CoherenceTag`].

use super::{freshness::Age, minimum_revisions::Generation, view::View};
use crate::runtime::Moment;

/// The data that decides whether a cached answer may be served again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CoherenceTag {
    /// When the read was sent.
    pub(crate) as_of: Moment,
    /// Generations of the lookup id and the owner, read before the answer was judged. Without an owner, both are that of
    /// the lookup id.
    pub(crate) prefix: Generation,
    pub(crate) owner: Generation,
    /// Time from which on the answer applies, by the wall clock, in nanoseconds since the Unix epoch.
    pub(crate) applies_from: u64,
    /// Time from which on the answer no longer applies, by the same clock: the key expires, or becomes valid.
    pub(crate) expires_at: u64,
}

impl CoherenceTag {
    /// Returns the age of the answer. It is `Expired` if a change was notified after the read, or the wall clock is
    /// outside the time in which the answer applies.
    #[inline]
    pub(crate) fn age(&self, view: &View, now: Moment) -> Age {
        let is_current = view.minimum_revisions.is_current(self.prefix)
            && view.minimum_revisions.is_current(self.owner);
        let applies = (self.applies_from..self.expires_at).contains(&now.wall_nanos());
        if !is_current || !applies {
            return Age::Expired;
        }
        view.freshness.age(self.as_of, now)
    }
}
