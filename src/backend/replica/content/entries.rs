//! What is stored under a lookup id and of an owner.

use crate::{
    backend::replica::packed_key::PackedKey,
    error::StoreError,
    record::Revision,
    store::{ReadOwner, ReadRow},
};

/// What is stored under a lookup id.
pub(super) enum UnderId {
    Read(ReadId),
    Changed(Mark),
}

pub(super) struct ReadId {
    /// Revision of the last change under the lookup id; 0 if no change was reported since the load.
    pub(super) latest: Revision,
    /// The database's time at the read, in microseconds.
    pub(super) read_at: u64,
    pub(super) keys: Entries,
}

/// The keys under a lookup id. Almost always there is one.
pub(super) enum Entries {
    None,
    One(Entry),
    Many(Vec<Entry>),
}

pub(super) enum Entry {
    Key(PackedKey),
    /// The row can't be decoded.
    Unreadable(Box<StoreError>),
}

pub(super) enum Owner {
    Read(ReadOwner),
    Changed(Mark),
}

/// A change after which the subject was not read again.
#[derive(Clone, Copy)]
pub(super) struct Mark {
    pub(super) tick: u64,
    /// The revision that was reported. A read below it is of a standby that lags behind.
    pub(super) minimum: Revision,
}

/// Position among the marks at which a read was sent.
#[derive(Debug, Clone, Copy)]
pub(in crate::backend::replica) struct Tick(pub(super) u64);

impl Mark {
    /// Returns whether a read that was sent at `tick`, and returned this revision, includes the change.
    pub(super) fn is_included(self, tick: Tick, revision: Revision) -> bool {
        self.tick <= tick.0 && revision >= self.minimum
    }
}

impl Entries {
    pub(super) fn new(mut entries: Vec<Entry>) -> Self {
        match (entries.len(), entries.pop()) {
            (1, Some(entry)) => Self::One(entry),
            (_, None) => Self::None,
            (_, Some(last)) => {
                entries.push(last);
                Self::Many(entries)
            }
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        match self {
            Self::None => &[],
            Self::One(entry) => std::slice::from_ref(entry),
            Self::Many(entries) => entries.as_slice(),
        }
        .iter()
    }

    /// Returns the highest revision of the keys.
    pub(super) fn revision(&self) -> Revision {
        let keys = self.iter().filter_map(|entry| match entry {
            Entry::Key(key) => key.revision(),
            Entry::Unreadable(_) => None,
        });
        keys.max().unwrap_or_default()
    }

    pub(super) fn push(&mut self, entry: Entry) {
        *self = match std::mem::replace(self, Self::None) {
            Self::None => Self::One(entry),
            Self::One(first) => Self::Many(vec![first, entry]),
            Self::Many(mut entries) => {
                entries.push(entry);
                Self::Many(entries)
            }
        };
    }

    /// Returns whether the key of `row` was inserted by a read of its lookup id, before the page reached it.
    pub(super) fn contains(&self, entry: &Entry, row: &ReadRow) -> bool {
        self.iter().any(|known| match (known, entry) {
            (Entry::Key(known), _) => known.id().as_ref() == Some(&row.id),
            (Entry::Unreadable(known), Entry::Unreadable(error)) => {
                known.to_string() == error.to_string()
            }
            (Entry::Unreadable(_), Entry::Key(_)) => false,
        })
    }
}
