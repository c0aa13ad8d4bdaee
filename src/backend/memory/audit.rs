//! The audit in memory.

use std::{collections::VecDeque, time::SystemTime};

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::{
    record::{KeyId, UserId},
    store::{
        Attribution, AuditAction, AuditEntry, AuditPage, ListAudit, StoredKey, audited_key,
        audited_user,
    },
};

/// The last changes.
#[derive(Debug, Default)]
pub(super) struct Audit {
    entries: VecDeque<AuditEntry>,
    last_id: i64,
}

/// Maximum number of entries that are kept.
const MAX_ENTRIES: usize = 100_000;

/// The key or the user that is changed.
pub(super) enum Subject<'a> {
    Key(&'a KeyId, &'a UserId),
    User(&'a UserId),
}

impl Audit {
    /// Records a change of a key.
    pub(super) fn note_key(
        &mut self,
        (action, by, now): (AuditAction, &Attribution, SystemTime),
        old: Option<&StoredKey>,
        new: Option<&StoredKey>,
    ) {
        let Some(key) = new.or(old).map(|key| &key.record) else { return };
        let value = |key: &StoredKey| audited_key(&key.record);
        let values = (old.map(value), new.map(value));
        self.note((action, by, now), &Subject::Key(&key.id, &key.user.id), values);
    }

    /// Records a change of a user.
    pub(super) fn note_user(
        &mut self,
        change: (AuditAction, &Attribution, SystemTime),
        old: Option<&crate::record::User>,
        new: Option<&crate::record::User>,
    ) {
        let Some(user) = new.or(old) else { return };
        let values = (old.map(audited_user), new.map(audited_user));
        self.note(change, &Subject::User(&user.id), values);
    }

    fn note(
        &mut self,
        (action, by, now): (AuditAction, &Attribution, SystemTime),
        subject: &Subject<'_>,
        (before, after): (Option<Value>, Option<Value>),
    ) {
        let (key, user) = match subject {
            Subject::Key(key, user) => (Some((*key).clone()), (*user).clone()),
            Subject::User(user) => (None, (*user).clone()),
        };
        if self.entries.len() == MAX_ENTRIES {
            self.entries.pop_front();
        }
        self.last_id += 1;
        self.entries.push_back(AuditEntry {
            id: self.last_id,
            at: now.into(),
            action,
            actor: by.actor.clone(),
            actor_key: by.key.clone(),
            database_role: None,
            key,
            user: Some(user),
            before,
            after,
            reason: by.reason.clone(),
            request_id: by.request_id.clone(),
        });
    }

    pub(super) fn list(&self, page: &ListAudit) -> AuditPage {
        let entries = self.entries.iter().rev().filter(|entry| page.selects(entry)).cloned();
        AuditPage::from_entries(page, entries)
    }

    pub(super) fn prune(&mut self, before: DateTime<Utc>) -> u64 {
        let count = self.entries.len();
        self.entries.retain(|entry| entry.at >= before);
        u64::try_from(count - self.entries.len()).unwrap_or(u64::MAX)
    }
}
