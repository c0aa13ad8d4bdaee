//! Management of keys and users: every store, rotation, the ceiling, the audit, import.

mod ceiling;
mod every_store;
mod rotation;
mod secrecy;
#[path = "../support/mod.rs"]
mod support;
