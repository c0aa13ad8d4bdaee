//! The state of the database, Redis and the change feed, with what to do.

mod check;

use std::time::Duration;

use serde_json::json;
use tower_api_key::backend::{FeedCheck, MigrateError};

use self::check::{Check, Status};
use crate::{
    args::{DoctorArgs, Options},
    connect::{self, Database, Missing},
    failure::{Exit, Failure},
    output::Output,
};

/// Maximum time that the doctor waits for Redis.
const REDIS_PATIENCE: Duration = Duration::from_secs(3);

pub(super) async fn run(
    args: &DoctorArgs,
    options: &Options,
    output: &mut Output,
) -> Result<(), Failure> {
    let database = Database::open(options, Missing::Fail)?;
    let mut checks = Vec::new();
    let is_reachable = check_database(&database, args.timeout, &mut checks).await;
    if let Some(servers) = connect::redis(options) {
        let health = servers.health(REDIS_PATIENCE).await;
        let is_list = options.redis_url.as_deref().is_some_and(|url| url.contains(','));
        checks.extend(check::redis(health, is_list));
    }
    print(&checks, output)?;
    let has_error = checks.iter().any(|check| check.status == Status::Error);
    match (is_reachable, has_error) {
        (false, _) => Err(Failure::silent(Exit::Unavailable)),
        (true, true) => Err(Failure::silent(Exit::Failure)),
        (true, false) => Ok(()),
    }
}

/// Adds the checks of the database. Returns whether it can be reached.
async fn check_database(database: &Database, limit: Duration, checks: &mut Vec<Check>) -> bool {
    let health = match database.health().await {
        Ok(health) => health,
        Err(failure) => {
            let hint = "check the URL, the password, the network and the server";
            checks.push(Check::error("database", failure.to_string(), hint));
            return failure.exit != Exit::Unavailable;
        }
    };
    checks.push(Check::ok("database", format!("{} is connected", health.server)));
    let pending = database.pending().await;
    let is_complete = matches!(&pending, Ok(pending) if pending.is_empty());
    match pending {
        Ok(pending) => checks.extend(check::schema(&pending, health.schema)),
        Err(MigrateError::NotAdoptable(faults)) => checks.extend(faults.iter().map(|fault| {
            Check::error(
                "columns",
                fault.to_string(),
                "change the table, then run `tower-api-key migrate`",
            )
        })),
        Err(error) => checks.push(Check::error("schema", error.to_string(), "see the message")),
    }
    checks.push(check::writes(health.is_read_only));
    checks.extend(check::rights(&health.missing_privileges));
    checks.extend(health.clock.map(|it| check::clock(it.before, it.database, it.after)));
    checks.extend(health.is_encrypted.map(check::tls));
    let feed = match (is_complete, health.is_read_only) {
        (false, _) => Check::warning(
            "change feed",
            "not checked, because the schema is not up to date",
            "run `tower-api-key migrate`, then the doctor again",
        ),
        (_, true) => Check::warning(
            "change feed",
            "not checked, because the database is read-only",
            "check it with the URL of the primary",
        ),
        _ => match database.check_feed(limit).await {
            Ok(feed) => {
                checks.extend(check::notifications(&feed));
                check_event(&feed, limit)
            }
            Err(failure) => Check::error(
                "change feed",
                failure.to_string(),
                "see the message, and run the doctor again",
            ),
        },
    };
    checks.push(feed);
    true
}

fn check_event(feed: &FeedCheck, limit: Duration) -> Check {
    match (&feed.fault, feed.event_after) {
        (Some(fault), _) => {
            Check::error("change feed", fault.to_string(), "run `tower-api-key migrate`")
        }
        (None, Some(after)) => {
            Check::ok("change feed", format!("an event came back after {} ms", after.as_millis()))
        }
        (None, None) if !feed.is_written => Check::warning(
            "change feed",
            "the feed is in sync, but the role may not write a change event of its own",
            "run the doctor as the owner of the tables, to check the feed from end to end",
        ),
        (None, None) => Check::error(
            "change feed",
            format!("no event came back within {limit:?}"),
            "look for long transactions and for nodes of another version",
        ),
    }
}

fn print(checks: &[Check], output: &mut Output) -> Result<(), Failure> {
    if output.is_table() {
        let rows = checks
            .iter()
            .map(|check| [check.status.name(), check.subject, &check.message].map(str::to_owned));
        output.table(&[], rows)?;
        let hints: Vec<_> = checks.iter().filter(|check| !check.hint.is_empty()).collect();
        if !hints.is_empty() {
            output.line("\nWhat to do:")?;
        }
        return hints
            .into_iter()
            .try_for_each(|check| output.line(&format!("  {}: {}", check.subject, check.hint)));
    }
    let json: Vec<_> = checks
        .iter()
        .map(|check| {
            json!({
                "status": check.status.name(),
                "check": check.subject,
                "message": check.message,
                "hint": Some(&check.hint).filter(|hint| !hint.is_empty()),
            })
        })
        .collect();
    match super::is_one_value(output.form()) {
        true => output.value("", &json!(json)),
        false => json.iter().try_for_each(|check| output.value("", check)),
    }
}
