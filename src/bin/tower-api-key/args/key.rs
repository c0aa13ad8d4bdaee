//! The commands for keys.

use std::{path::PathBuf, time::Duration};

use chrono::NaiveDate;
use clap::{Subcommand, ValueEnum};
use serde_json::Value;
use tower_api_key::{
    chrono,
    record::{AllowedNetwork, Budget, EndpointRule},
};

use crate::values::{self, Limit, UserRef, When};

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Issues a key, and shows it once
    Issue(Box<IssueArgs>),
    /// Lists keys, ordered by id
    List(ListArgs),
    /// Shows a key
    Show {
        /// Id of the key
        id: i64,
    },
    /// Changes a key; what is not given is kept
    Update(Box<UpdateArgs>),
    /// Gives a key a new secret, and shows it once; the previous secret works until the end of the grace period
    Rotate(RotateArgs),
    /// Ends the grace period of the previous secret at once
    EndGrace {
        /// Id of the key
        id: i64,
    },
    /// Revokes a key, or all active keys that the options select
    Revoke(RevokeArgs),
    /// Makes a revoked key active again
    Reactivate {
        /// Id of the key
        id: i64,
    },
    /// Deletes a key; its usage and its audit are kept
    Delete {
        /// Id of the key
        id: i64,
    },
    /// Imports hashes of keys of another service, from CSV or JSON lines
    ///
    /// Columns: key_prefix, key_hash, user (id or e-mail address), name, description, permissions, scopes,
    /// rate_limit_per_minute, rate_limit_per_hour, rate_limit_per_day, allowed_models, allowed_endpoints, allowed_ips,
    /// is_unlimited, budget_limit_cents, budget_type, expires_at, not_before, metadata, is_active. In CSV, a list is a JSON
    /// array, or has semicolons or commas between its entries.
    ///
    /// Rows are stored in batches. An import that was interrupted can be repeated: rows that are stored are skipped.
    Import(ImportArgs),
    /// Shows the usage of a key by day (UTC)
    Usage(UsageArgs),
    /// Reads a key from standard input, and shows its format, lookup id and check, offline
    Inspect,
}

#[derive(Debug, clap::Args)]
pub(crate) struct IssueArgs {
    /// Owner: id or e-mail address
    #[arg(long, value_parser = values::user)]
    pub(crate) user: UserRef,
    /// Name of the key
    #[arg(long)]
    pub(crate) name: String,
    /// Starts from everything that this key allows
    #[arg(long, value_name = "KEY_ID")]
    pub(crate) like: Option<i64>,
    #[command(flatten)]
    pub(crate) rights: RightsArgs,
}

/// What a key allows.
#[derive(Debug, clap::Args)]
pub(crate) struct RightsArgs {
    /// What the key is for
    #[arg(long, value_name = "TEXT")]
    pub(crate) description: Option<String>,
    /// Scope (repeatable); chat:* grants every scope that begins with chat:
    #[arg(long)]
    pub(crate) scope: Vec<String>,
    /// Permission (repeatable)
    #[arg(long)]
    pub(crate) permission: Vec<String>,
    /// Model that the key may use (repeatable); all if none is given
    #[arg(long)]
    pub(crate) model: Vec<String>,
    /// Endpoint that the key may call (repeatable): "POST /v1/chat" or "/v1/*"; all if none is given
    #[arg(long, value_name = "RULE")]
    pub(crate) endpoint: Vec<EndpointRule>,
    /// Network from which the key may be used (repeatable): 10.0.0.0/8; all if none is given
    #[arg(long, value_name = "CIDR")]
    pub(crate) ip: Vec<AllowedNetwork>,
    /// Rate limit (repeatable): 100/min, 1000/hour, 10000/day
    #[arg(long, value_parser = values::limit)]
    pub(crate) limit: Vec<Limit>,
    /// Budget in the main unit of the currency: 20.00/month, 5/day, 10/week, 100/total
    #[arg(long, value_name = "AMOUNT/PERIOD", value_parser = values::budget)]
    pub(crate) budget: Option<Budget>,
    /// Expiry: 90d (from now), 2027-01-01, RFC 3339, or never
    #[arg(long, value_name = "TIME", value_parser = values::when)]
    pub(crate) expires: Option<When>,
    /// Time before which the key is denied
    #[arg(long, value_name = "TIME", value_parser = values::when)]
    pub(crate) not_before: Option<When>,
    /// Rate limits do not apply to the key
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub(crate) unlimited: Option<bool>,
    /// Data of the service
    #[arg(long, value_name = "JSON", value_parser = values::json)]
    pub(crate) metadata: Option<Value>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct UpdateArgs {
    /// Id of the key
    pub(crate) id: i64,
    /// New name
    #[arg(long)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) rights: RightsArgs,
    /// Clears a field (repeatable). A cleared list of models, endpoints or networks allows all of them
    #[arg(long, value_enum, value_name = "FIELD")]
    pub(crate) clear: Vec<Clear>,
    /// Changes the key only if it has this revision
    #[arg(long, value_name = "N")]
    pub(crate) if_revision: Option<u64>,
}

/// A field that can be cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Clear {
    Description,
    Scopes,
    Permissions,
    Models,
    Endpoints,
    Ips,
    /// All rate limits
    Limits,
    LimitPerMinute,
    LimitPerHour,
    LimitPerDay,
    Budget,
    Expires,
    NotBefore,
    Metadata,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// Only keys of this user: id or e-mail address
    #[arg(long, value_name = "USER", value_parser = values::user)]
    pub(crate) owner: Option<UserRef>,
    /// Only keys that were not revoked
    #[arg(long, conflicts_with = "revoked")]
    pub(crate) active: bool,
    /// Only revoked keys
    #[arg(long)]
    pub(crate) revoked: bool,
    /// Only keys that expire within this time, or have expired
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub(crate) expiring_within: Option<Duration>,
    /// Only keys that were not used for this time
    #[arg(long, value_name = "DURATION", value_parser = values::duration)]
    pub(crate) unused_for: Option<Duration>,
    /// Only keys whose name or description contains this text
    #[arg(long, value_name = "TEXT")]
    pub(crate) contains: Option<String>,
    /// Only keys with exactly this scope
    #[arg(long)]
    pub(crate) scope: Option<String>,
    /// Only keys that were created with this key
    #[arg(long, value_name = "ID")]
    pub(crate) created_by_key: Option<i64>,
    /// Only keys after this id, for the next page
    #[arg(long, value_name = "ID")]
    pub(crate) after: Option<i64>,
    /// Maximum number of keys
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub(crate) limit: u32,
    /// Lists every key
    #[arg(long, conflicts_with = "limit")]
    pub(crate) all: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RotateArgs {
    /// Id of the key
    pub(crate) id: i64,
    /// Time in which the previous secret still works; 0 ends it at once
    #[arg(long, default_value = "24h", value_name = "DURATION", value_parser = values::duration)]
    pub(crate) grace: Duration,
    /// Ends the grace period of an earlier rotation, which is a conflict otherwise
    #[arg(long)]
    pub(crate) end_previous: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub(crate) struct RevokeArgs {
    /// Id of the key
    #[arg(conflicts_with_all = ["owner", "created_by_key", "prefix", "created_before"])]
    pub(crate) id: Option<i64>,
    /// All keys of this user: id or e-mail address
    #[arg(long, value_name = "USER", value_parser = values::user)]
    pub(crate) owner: Option<UserRef>,
    /// All keys that were created with this key
    #[arg(long, value_name = "ID")]
    pub(crate) created_by_key: Option<i64>,
    /// All keys whose lookup id begins with this text
    #[arg(long, value_name = "TEXT")]
    pub(crate) prefix: Option<String>,
    /// All keys from before this time: 365d (that long ago), 2027-01-01 or RFC 3339
    #[arg(long, value_name = "TIME", value_parser = values::past)]
    pub(crate) created_before: Option<When>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ImportArgs {
    /// File, or - for standard input
    pub(crate) file: PathBuf,
    /// Format of the file: by its extension (.csv, .jsonl, .ndjson) by default
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) input_format: Option<InputFormat>,
    /// Owner of rows without a user: id or e-mail address
    #[arg(long, value_parser = values::user)]
    pub(crate) user: Option<UserRef>,
    /// Checks the rows, and stores nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Checks the whole file first, and stores nothing if a row is broken
    #[arg(long)]
    pub(crate) all_or_nothing: bool,
}

/// Format of the rows of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum InputFormat {
    /// CSV with a header
    Csv,
    /// One JSON object per line
    Jsonl,
}

#[derive(Debug, clap::Args)]
pub(crate) struct UsageArgs {
    /// Id of the key
    pub(crate) id: i64,
    /// First day: 30 days ago by default
    #[arg(long, value_name = "DAY")]
    pub(crate) from: Option<NaiveDate>,
    /// Last day: today by default
    #[arg(long, value_name = "DAY")]
    pub(crate) to: Option<NaiveDate>,
}
