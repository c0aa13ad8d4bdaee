//! State of a database, for operators: [`DatabaseHealth`] and [`FeedCheck`].

use std::{
    cmp::Ordering,
    future::poll_fn,
    pin::Pin,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use futures_core::Stream;

use crate::{
    error::StoreError,
    runtime::{hex, within},
    store::{Change, ChangeStream, FeedFault},
    telemetry,
};

/// State of the database of a store. It is read without changing anything.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DatabaseHealth {
    /// Name and version of the server.
    pub server: String,
    /// Clock of the server; `None` if it is that of this machine.
    pub clock: Option<ClockReading>,
    /// Whether the database rejects writes, as a standby does.
    pub is_read_only: bool,
    /// Whether the connection is encrypted; `None` if it does not leave this machine.
    pub is_encrypted: Option<bool>,
    /// Rights that the role lacks.
    pub missing_privileges: Vec<MissingPrivilege>,
    /// Whether the role may migrate: it may create tables, and owns those that exist.
    pub can_migrate: bool,
    /// Version of the schema.
    pub schema: SchemaVersion,
}

/// Version of the schema in a database, compared with that of this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SchemaVersion {
    /// There is no schema yet: `migrate()` creates it.
    None,
    /// An older version of this crate made the schema: `migrate()` brings it up to date.
    Older,
    /// The schema has the version of this crate. Objects may be missing all the same.
    Current,
    /// A newer version of this crate made the schema. `migrate()` leaves it as it is.
    Newer,
}

impl SchemaVersion {
    pub(in crate::backend) fn of(stored: i64, known: i64) -> Self {
        match stored.cmp(&known) {
            Ordering::Less => Self::Older,
            Ordering::Equal => Self::Current,
            Ordering::Greater => Self::Newer,
        }
    }

    /// Logs a difference from this crate.
    pub(in crate::backend) fn log(self) {
        match self {
            Self::Older => telemetry::schema_is_older(),
            Self::Newer => telemetry::schema_is_newer(),
            Self::None | Self::Current => {}
        }
    }
}

/// A time of the database, and the times of this machine before and after it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClockReading {
    /// Time of this machine before the read.
    pub before: DateTime<Utc>,
    /// Time of the database.
    pub database: DateTime<Utc>,
    /// Time of this machine after the read.
    pub after: DateTime<Utc>,
}

/// A right that the role of the store lacks.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[non_exhaustive]
pub struct MissingPrivilege {
    /// The right, such as `UPDATE`.
    pub privilege: String,
    /// The table.
    pub table: String,
    /// What needs the right.
    pub purpose: PrivilegePurpose,
}

/// What a right is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PrivilegePurpose {
    /// Checking keys.
    Check,
    /// Counting usage and reserving budgets.
    Usage,
    /// Managing users and keys.
    Manage,
}

/// Result of a check of the change feed, for which a change event of its own was written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FeedCheck {
    /// Whether the role may write a change event.
    pub is_written: bool,
    /// Time from the write to the event; `None` if it was not written, or did not arrive within the limit.
    pub event_after: Option<Duration>,
    /// Whether notifications arrive; `None` if the database sends none.
    pub is_notified: Option<bool>,
    /// Why changes may be missing.
    pub fault: Option<FeedFault>,
}

/// Returns a lookup id that no key can have: a key has no spaces.
fn probe() -> Result<String, StoreError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| StoreError::unavailable(error.to_string()))?;
    Ok(format!("feed check {}", hex(&random)))
}

/// Waits until the feed is synced, writes a change with `write`, and measures the time until the feed reports it. `write`
/// returns whether the role has the right to write it.
pub(in crate::backend) async fn check_feed<F>(
    mut changes: ChangeStream,
    limit: Duration,
    write: impl FnOnce(String) -> F,
) -> Result<FeedCheck, StoreError>
where
    F: Future<Output = Result<bool, StoreError>>,
{
    let mut check =
        FeedCheck { is_written: false, event_after: None, is_notified: None, fault: None };
    let synced = within(limit, async {
        loop {
            match next(&mut changes).await {
                Some(Change::Synced(_)) => return None,
                Some(Change::Status(status)) if status.fault.is_some() => return status.fault,
                Some(_) => {}
                None => return Some(FeedFault::Disconnected("the feed has ended".into())),
            }
        }
    });
    let timed_out = || Some(FeedFault::Disconnected(format!("no sync within {limit:?}").into()));
    check.fault = synced.await.unwrap_or_else(timed_out);
    if check.fault.is_some() {
        return Ok(check);
    }
    let probe = probe()?;
    let written = Instant::now();
    check.is_written = write(probe.clone()).await?;
    if !check.is_written {
        return Ok(check);
    }
    let arrived = within(limit, async {
        while let Some(change) = next(&mut changes).await {
            match change {
                Change::Prefix(prefix, _) if prefix == probe => return true,
                Change::Status(status) if status.fault.is_some() => {
                    check.fault = status.fault;
                    return false;
                }
                _ => {}
            }
        }
        false
    });
    check.event_after = (arrived.await == Some(true)).then(|| written.elapsed());
    Ok(check)
}

async fn next(changes: &mut ChangeStream) -> Option<Change> {
    poll_fn(|cx| Pin::new(&mut *changes).poll_next(cx)).await
}
