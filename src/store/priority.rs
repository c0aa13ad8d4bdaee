//! Priority of look-ups: [`Priority`].

/// Priority of a look-up. Higher priorities are served first, and are rejected last when the node is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Priority {
    /// The client's network has presented more unknown keys than its allowance.
    Suspect,
    Ordinary,
    /// This node has verified the key before.
    Known,
}

impl Priority {
    #[cfg(feature = "_sql")]
    pub(crate) const ALL: [Self; 3] = [Self::Suspect, Self::Ordinary, Self::Known];

    /// Returns the number of look-ups under way on a node, of `max` in all, from which on one of this priority is
    /// rejected. The last quarter is reserved for known keys, and half for look-ups that are not suspect.
    pub(crate) fn bound(self, max: usize) -> usize {
        match self {
            Self::Suspect => max.div_ceil(2),
            Self::Ordinary => max - max / 4,
            Self::Known => max,
        }
    }
}
