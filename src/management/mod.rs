//! Users and keys are made and revoked here.

mod key_manager;

pub use self::key_manager::{IssuedKey, KeyManager, ManageError, NewKey};
