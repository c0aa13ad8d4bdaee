//! The keys and owners that have to be read again: [`PendingReads`].

use std::{
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::record::UserId;

/// What has to be read again.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Pending {
    /// The keys under a lookup id.
    Id(Box<str>),
    Owner(UserId),
}

/// What has to be read again, each once. It is bounded by the number of entries in memory.
#[derive(Debug, Default)]
pub(super) struct PendingReads(Mutex<BTreeSet<Pending>>);

/// A batch of one kind.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Batch {
    Ids(Vec<String>),
    Owners(Vec<UserId>),
}

/// Maximum number of lookup ids or owners that are read at once.
pub(super) const BATCH: usize = 256;

impl PendingReads {
    pub(super) fn push(&self, subject: Pending) {
        self.subjects().insert(subject);
    }

    /// Takes a batch of at most `limit`; `None` if nothing has to be read. Lookup ids come first.
    pub(super) fn take(&self, limit: usize) -> Option<Batch> {
        let mut subjects = self.subjects();
        match subjects.pop_first()? {
            Pending::Id(id) => {
                let mut ids = vec![String::from(id)];
                while ids.len() < limit
                    && let Some(Pending::Id(_)) = subjects.first()
                    && let Some(Pending::Id(id)) = subjects.pop_first()
                {
                    ids.push(id.into());
                }
                Some(Batch::Ids(ids))
            }
            Pending::Owner(owner) => {
                let mut owners = vec![owner];
                while owners.len() < limit
                    && let Some(Pending::Owner(owner)) = subjects.pop_first()
                {
                    owners.push(owner);
                }
                Some(Batch::Owners(owners))
            }
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.subjects().is_empty()
    }

    pub(super) fn clear(&self) {
        self.subjects().clear();
    }

    fn subjects(&self) -> MutexGuard<'_, BTreeSet<Pending>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Batch {
    /// Returns the subjects, to queue them again.
    pub(super) fn into_pending(self) -> Vec<Pending> {
        match self {
            Self::Ids(ids) => ids.into_iter().map(|id| Pending::Id(id.into())).collect(),
            Self::Owners(owners) => owners.into_iter().map(Pending::Owner).collect(),
        }
    }
}
