//! Formats, hashes and policies of keys, and the bcrypt pool.

mod bcrypt_pool;
mod clock;
mod format;
mod hash;
mod policy;
mod rotated_key;
mod scheme;
mod secrets;
mod slow_hashes;
#[path = "../support/mod.rs"]
mod support;
