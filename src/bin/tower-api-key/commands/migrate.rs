//! The schema.

use serde_json::json;
use tower_api_key::backend::{KeyReview, SchemaVersion};

use crate::{
    args::{MigrateArgs, Options},
    connect::{Database, Missing},
    failure::{Exit, Failure},
    output::{Output, count, note},
};

/// Maximum number of keys of an adopted table that are listed.
const MAX_LISTED: usize = 20;

pub(super) async fn run(
    args: &MigrateArgs,
    options: &Options,
    output: &mut Output,
) -> Result<(), Failure> {
    let is_read = args.check || args.dry_run;
    let missing = if is_read { Missing::InMemory } else { Missing::Create };
    let database = Database::open(options, missing)?;
    let outcome = match (args.check, args.dry_run) {
        (true, _) => check(&database, output).await,
        (_, true) => match database.migration_sql().await {
            Ok(Some(sql)) => output.text(sql.as_bytes()),
            Ok(None) => output.line("-- The schema is up to date."),
            Err(error) => Err(error.into()),
        },
        _ => migrate(&database, output).await,
    };
    match outcome {
        Err(failure) => Err(database.explain_migration(failure).await),
        Ok(()) => Ok(()),
    }
}

async fn check(database: &Database, output: &mut Output) -> Result<(), Failure> {
    let pending = database.pending().await?;
    if output.is_table() {
        match pending.as_slice() {
            [] => output.line(up_to_date(database).await?)?,
            pending => {
                output.line(match database.health().await?.schema {
                    SchemaVersion::Older => {
                        "The schema was made by an older version; run `tower-api-key migrate`. Missing:"
                    }
                    _ => "Missing; run `tower-api-key migrate`:",
                })?;
                pending.iter().try_for_each(|what| output.line(&format!("  {what}")))?;
            }
        }
    } else {
        output.value(&pending.len().to_string(), &json!({ "missing": pending }))?;
    }
    if pending.is_empty() { Ok(()) } else { Err(Failure::silent(Exit::Failure)) }
}

async fn migrate(database: &Database, output: &mut Output) -> Result<(), Failure> {
    let pending = database.pending().await?;
    let report = database.migrate().await?;
    if output.is_table() {
        match pending.len() {
            0 => output.line(up_to_date(database).await?)?,
            number => {
                let made = count(number as u64, "object");
                output.line(&format!("The schema is up to date: {made} made."))?;
            }
        }
    } else {
        output.value(&pending.len().to_string(), &json!({ "made": pending }))?;
    }
    if let Some(review) = report.adopted_keys {
        show(&review);
    }
    Ok(())
}

/// Returns what is printed if there is nothing to do.
async fn up_to_date(database: &Database) -> Result<&'static str, Failure> {
    Ok(match database.health().await?.schema {
        SchemaVersion::Newer => {
            "The schema was made by a newer version of tower-api-key, and is left as it is."
        }
        _ => "The schema is up to date.",
    })
}

/// Lists keys of an adopted table that fail, and those whose meaning changes.
fn show(review: &KeyReview) {
    note(format_args!(
        "The tables were adopted: {} keys fail, and {} change their meaning.",
        review.failing_keys, review.changed_keys
    ));
    for finding in review.findings.iter().take(MAX_LISTED) {
        note(format_args!("  key {}: {} {}", finding.key, finding.column, finding.reason));
    }
}
