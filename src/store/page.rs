//! Lists of keys in pages: [`ListKeys`] and [`KeyPage`].

use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, UserId},
};

/// Selects the keys to list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListKeys {
    /// Lists only the keys of this user.
    pub owner: Option<UserId>,
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
        Self { owner: Some(owner.into()), ..self }
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
        Self { owner: None, after: None, limit: 100 }
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
    /// there are that many: the extra row shows that this is not the last page.
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
                Ok(key) => listed.keys.push(key),
                Err(error) => listed.unreadable.push(UnreadableKey { id, error }),
            }
        }
        listed
    }
}
