//! Code that the two SQL stores share.

mod column;
pub(super) mod columns;
pub(super) mod fault;
pub(super) mod filter;
#[cfg(feature = "postgres")]
pub(super) mod found;
pub(super) mod gate;
pub(super) mod health;
pub(super) mod migrate;
pub(super) mod review;
pub(super) mod row;
pub(super) mod statement;
pub(super) mod values;

pub use self::{
    health::{
        ClockReading, DatabaseHealth, FeedCheck, MissingPrivilege, PrivilegePurpose, SchemaVersion,
    },
    migrate::{ColumnFault, MigrateError, MigrationReport},
    review::{FindingKind, KeyFinding, KeyReview},
};
