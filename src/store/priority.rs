//! The order of look-ups that wait: [`Priority`].

/// Who goes first where look-ups wait, and who is turned away last where there is no more room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Priority {
    /// The client's network presents keys that don't exist, beyond its allowance.
    Suspect,
    Ordinary,
    /// This node has verified the key before.
    Known,
}

impl Priority {
    #[cfg(feature = "_sql")]
    pub(crate) const ALL: [Self; 3] = [Self::Suspect, Self::Ordinary, Self::Known];

    /// Number of look-ups under way on a node from which on this one is turned away, of `max` in all. The
    /// last quarter is kept for known keys, and half for what is not suspect.
    pub(crate) fn bound(self, max: usize) -> usize {
        match self {
            Self::Suspect => max.div_ceil(2),
            Self::Ordinary => max - max / 4,
            Self::Known => max,
        }
    }
}
