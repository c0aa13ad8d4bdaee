//! Management of users and keys.

mod key_manager;

pub use self::key_manager::{IssuedKey, KeyManager, ManageError, NewKey};
