//! Creating users, and issuing and revoking keys: [`KeyManager`].
//!
//! A [`KeyManager`] writes to a [`KeyRepository`](crate::store::KeyRepository), which all stores of this crate are.
//! Describe a key with [`NewKey`]. The key itself is in [`IssuedKey`] and nowhere else: show it to its owner once.
//!
//! ```
//! use tower_api_key::{KeyManager, MemoryStore, NewKey, management::ManageError};
//!
//! # async fn run() -> Result<(), ManageError> {
//! let manager = KeyManager::new(MemoryStore::new());
//! let user = manager.create_user("ada@example.com", "admin").await?;
//! let issued = manager.issue(NewKey::new(user.id, "laptop").scopes(["chat:*"])).await?;
//! println!("{}", issued.expose_secret());
//! manager.revoke(&issued.record().id).await?;
//! # Ok(())
//! # }
//! ```
//!
//! To list and edit keys, call the methods of [`KeyRepository`](crate::store::KeyRepository) on the store. Changes may
//! also be made with SQL: triggers report them to every node.

mod key_manager;

pub use self::key_manager::{IssuedKey, KeyManager, ManageError, NewKey};
pub use crate::policy::CeilingField;
