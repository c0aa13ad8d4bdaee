//! Managing users and keys: [`KeyManager`].
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
//! # Changes
//!
//! | operation | what it does |
//! |---|---|
//! | [`issue`](KeyManager::issue) | stores a new key; [`NewKey::from_template`] copies what another key allows |
//! | [`update`](KeyManager::update) | changes fields with a [`KeyPatch`]; unset fields are kept, `None` clears |
//! | [`rotate`](KeyManager::rotate) | gives the key a new secret; the previous one is accepted until the grace period ends |
//! | [`end_grace`](KeyManager::end_grace) | rejects the previous secret at once |
//! | [`revoke`](KeyManager::revoke), [`reactivate`](KeyManager::reactivate) | with a [reason](KeyManager::reason) |
//! | [`revoke_all`](KeyManager::revoke_all) | by owner, maker, lookup id, age, in one transaction |
//! | [`delete`](KeyManager::delete) | deletes the row; usage and audit are kept |
//! | [`import`](KeyManager::import) | stores keys of another service by their hashes; can be repeated |
//!
//! Every change is one transaction with its audit row, and reaches every node as a change event. Changes may also be made
//! with SQL: triggers report them to every node and write the audit row.
//!
//! **Concurrent edits.** The [revision](crate::record::KeyRecord::revision) of a key rises with each change, except of
//! usage and the times of use. An update can require it, and is a conflict otherwise. Without one, the edit is repeated on
//! the changed key, so that two edits of different fields are both kept.
//!
//! # Rotation
//!
//! ```
//! # use std::time::Duration;
//! # use tower_api_key::{KeyManager, MemoryStore, management::{ManageError, Rotation}, record::KeyId};
//! # async fn run(manager: KeyManager<MemoryStore>, id: KeyId) -> Result<(), ManageError> {
//! let how = Rotation::default().grace(Duration::from_secs(3600));
//! let rotated = manager.rotate(&id, how).await?;
//! println!("{}", rotated.expose_secret());
//! # Ok(())
//! # }
//! ```
//!
//! Both secrets are the same key: limits, budget and usage count together.
//! [`AuthContext::secret`](crate::AuthContext::secret) distinguishes them, and
//! [`GracePeriod::last_used_at`](crate::record::GracePeriod::last_used_at) shows whether the previous one is still in use. A
//! node logs a warning once a day for each key whose previous secret is in use. The grace period ends by the clock of each
//! node, without an event, also on a node that is cut off: a node whose clock is behind by *s* accepts the secret *s* longer.
//! A node that is cut off before it has received the rotation takes the previous secret for the current one, for at most
//! `max_staleness + stale_if_error` (90 s by default), like a key that was revoked.
//!
//! # The ceiling
//!
//! A manager that [acts for a caller](KeyManager::acting_for) sees only the keys of the caller's owner, and no key that it
//! issues, changes, rotates, imports or reactivates grants more than the caller's key has: scopes with wildcards,
//! permissions, models, endpoints, networks, rate limits, budget, expiry, start, owner. An empty allow-list is "everything",
//! hence wider than any list. Each key is compared alone: two keys together may use twice the limits.
//!
//! # The audit
//!
//! [`KeyManager::audit`] lists the changes by key, user, actor and time. An entry has the action, the actor, the reason, the
//! id of the request, and the row before and after the change, without hashes and usage. The names in `before` and `after`
//! are those of the columns. Users are audited while they own keys, and whenever a `KeyManager` changes them. Entries are
//! kept until [`KeyManager::prune_audit`] deletes them.

mod caller;
mod error;
mod explain;
mod import;
mod key_manager;
mod new_key;
mod patch;
mod rotation;
mod validation;

pub use self::{
    error::ManageError,
    explain::{ExplainedRequest, Explanation, RuleOutcome},
    import::Imported,
    key_manager::KeyManager,
    new_key::{ImportedKey, IssuedKey, NewKey, Rotation},
    patch::{KeyPatch, UserPatch},
};
pub use crate::policy::CeilingField;
