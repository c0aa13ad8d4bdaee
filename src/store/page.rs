//! Lists of keys and users in pages: [`ListKeys`] and [`KeyPage`], [`ListUsers`] and [`UserPage`].

use super::filter::KeyFilter;
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, User, UserId},
};

/// Selects the keys to list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListKeys {
    /// Lists only these keys.
    pub filter: KeyFilter,
    /// Lists only the keys after this one: [`KeyPage::next`] of the previous page.
    pub after: Option<KeyId>,
    /// Maximum number of keys: 100 by default.
    pub limit: u32,
}

impl ListKeys {
    /// Lists only the keys of one user.
    ///
    /// ```
    /// # async fn run(store: tower_api_key::MemoryStore) -> Result<(), tower_api_key::StoreError> {
    /// use tower_api_key::store::{KeyRepository, ListKeys};
    ///
    /// let mut page = ListKeys::default().owner(7).limit(50);
    /// loop {
    ///     let listed = store.list_keys(&page).await?;
    ///     listed.keys.iter().for_each(|key| println!("{}", key.name));
    ///     let Some(last) = listed.next else { break };
    ///     page = page.after(last);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn owner(self, owner: impl Into<UserId>) -> Self {
        let filter = self.filter.owner(owner);
        Self { filter, ..self }
    }

    /// Lists only the keys that a filter selects. A page may then have fewer keys than the limit, although it is not
    /// the last one.
    #[must_use]
    pub fn filter(self, filter: KeyFilter) -> Self {
        Self { filter, ..self }
    }

    /// Lists only the keys after this one: [`KeyPage::next`] of the previous page.
    #[must_use]
    pub fn after(self, key: impl Into<KeyId>) -> Self {
        Self { after: Some(key.into()), ..self }
    }

    /// Sets the maximum number of keys.
    #[must_use]
    pub fn limit(self, keys: u32) -> Self {
        Self { limit: keys, ..self }
    }
}

impl Default for ListKeys {
    fn default() -> Self {
        Self { filter: KeyFilter::default(), after: None, limit: 100 }
    }
}

/// A page of keys, ordered by id.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct KeyPage {
    /// The keys that can be decoded.
    pub keys: Vec<KeyRecord>,
    /// The keys that can't be decoded. They count towards [`ListKeys::limit`].
    pub unreadable: Vec<UnreadableKey>,
    /// The value of [`ListKeys::after`] for the next page; `None` on the last page.
    pub next: Option<KeyId>,
}

/// A key whose row can't be decoded.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct UnreadableKey {
    /// The key's id.
    pub id: KeyId,
    /// An error of the kind `BadRow`, which names the row and the column.
    pub error: StoreError,
}

impl KeyPage {
    /// Builds the page for `page` from its rows. The rows are ordered by id, and contain one more than the limit if
    /// there are that many: the extra row shows that this is not the last page. Rows that the filter does not select
    /// are left out.
    pub fn from_rows(
        page: &ListKeys,
        rows: impl IntoIterator<Item = (KeyId, Result<KeyRecord, StoreError>)>,
    ) -> Self {
        let (mut listed, mut last) = (Self::default(), None);
        for (number, (id, row)) in (0..).zip(rows) {
            if number == page.limit {
                listed.next = last;
                break;
            }
            last = Some(id.clone());
            match row {
                Ok(key) if !page.filter.selects(&key) => {}
                Ok(key) => listed.keys.push(key),
                Err(error) => listed.unreadable.push(UnreadableKey { id, error }),
            }
        }
        listed
    }
}

/// Selects the users to list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListUsers {
    /// Lists only the users after this one: [`UserPage::next`] of the previous page.
    pub after: Option<UserId>,
    /// Maximum number of users: 100 by default.
    pub limit: u32,
}

impl Default for ListUsers {
    fn default() -> Self {
        Self { after: None, limit: 100 }
    }
}

impl ListUsers {
    /// Lists only the users after this one: [`UserPage::next`] of the previous page.
    #[must_use]
    pub fn after(self, user: impl Into<UserId>) -> Self {
        Self { after: Some(user.into()), ..self }
    }

    /// Sets the maximum number of users.
    #[must_use]
    pub fn limit(self, users: u32) -> Self {
        Self { limit: users, ..self }
    }
}

/// A page of users, ordered by id.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct UserPage {
    /// The users.
    pub users: Vec<User>,
    /// The value of [`ListUsers::after`] for the next page; `None` on the last page.
    pub next: Option<UserId>,
}

impl UserPage {
    /// Builds a page from users ordered by id, which are one more than the limit if there are that many.
    pub fn from_users(list: &ListUsers, users: impl IntoIterator<Item = User>) -> Self {
        let limit = usize::try_from(list.limit).unwrap_or(usize::MAX);
        let mut users: Vec<_> = users.into_iter().take(limit.saturating_add(1)).collect();
        let has_more = users.len() > limit;
        users.truncate(limit);
        let next = users.last().filter(|_| has_more).map(|last| last.id.clone());
        Self { users, next }
    }
}
