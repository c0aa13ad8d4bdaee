//! What can be typed: [`Args`].

mod key;
mod user;

use std::path::PathBuf;

use chrono::{DateTime, Utc};
use clap::{Parser, Subcommand, ValueEnum};
use tower_api_key::chrono;

pub(crate) use self::{
    key::{
        Clear, ImportArgs, InputFormat, IssueArgs, KeyCommand, ListArgs, RevokeArgs, RightsArgs,
        RotateArgs, UpdateArgs, UsageArgs,
    },
    user::{UserCommand, UserUpdateArgs},
};
use crate::values::{self, UserRef, When};

/// Manages the users and API keys of services that use the crate tower-api-key.
///
/// Keys are in SQLite or PostgreSQL. With --redis-url, a change also deletes the entries of the shared cache. Every
/// change is written to the audit, with the actor and the reason.
///
/// No secret is an argument: pepper and mint secret come from the environment (TOWER_API_KEY_PEPPER,
/// TOWER_API_KEY_MINT_SECRET) or from files, and a key is read from standard input. Prefer DATABASE_URL and REDIS_URL to
/// the flags if the URLs have passwords.
// Without Debug, because the URLs of the options may have passwords.
#[derive(Parser)]
#[command(version, propagate_version = true, max_term_width = 100, after_help = AFTER_HELP)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
    #[command(flatten)]
    pub(crate) options: Options,
}

const AFTER_HELP: &str = "Exit codes: 0 success, 1 failure, 2 usage, 3 not found, 4 conflict, 5 not permitted, 6 unavailable.";

/// Options of every command.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Database: sqlite:PATH, or postgres://USER@HOST/DATABASE
    #[arg(long, global = true, env = "DATABASE_URL", hide_env_values = true, value_name = "URL", help_heading = GLOBAL)]
    pub(crate) database_url: Option<String>,
    /// Redis in front of the database; several URLs, separated by commas, are nodes of a cluster
    #[arg(long, global = true, env = "REDIS_URL", hide_env_values = true, value_name = "URL", help_heading = GLOBAL)]
    pub(crate) redis_url: Option<String>,
    /// Namespace of the service in Redis
    #[arg(long, global = true, env = "TOWER_API_KEY_REDIS_NAMESPACE", value_name = "NAME", help_heading = GLOBAL)]
    pub(crate) redis_namespace: Option<String>,
    /// Brand and environment of keys: tak_live by default
    #[arg(long, global = true, env = "TOWER_API_KEY_FORMAT", value_name = "BRAND_ENV", help_heading = GLOBAL)]
    pub(crate) format: Option<String>,
    /// Number of first characters that are the lookup id of keys in the format of an earlier service
    #[arg(long, global = true, env = "TOWER_API_KEY_LEGACY_PREFIX_LENGTH", value_name = "N", help_heading = GLOBAL)]
    pub(crate) legacy_prefix_length: Option<usize>,
    /// File with the pepper of hashes (or set TOWER_API_KEY_PEPPER)
    #[arg(long, global = true, env = "TOWER_API_KEY_PEPPER_FILE", value_name = "FILE", help_heading = GLOBAL)]
    pub(crate) pepper_file: Option<PathBuf>,
    /// File with the secret that the checks of keys are made under (or set TOWER_API_KEY_MINT_SECRET)
    #[arg(long, global = true, env = "TOWER_API_KEY_MINT_SECRET_FILE", value_name = "FILE", help_heading = GLOBAL)]
    pub(crate) mint_secret_file: Option<PathBuf>,
    /// File with a retired mint secret, the latest first
    #[arg(long, global = true, value_name = "FILE", help_heading = GLOBAL)]
    pub(crate) retired_mint_secret_file: Vec<PathBuf>,
    /// Form of the output: a table by default
    #[arg(short, long, global = true, value_enum, value_name = "FORM", help_heading = GLOBAL)]
    pub(crate) output: Option<Form>,
    /// Actor in the audit: cli:$USER by default
    #[arg(long, global = true, env = "TOWER_API_KEY_ACTOR", value_name = "NAME", help_heading = GLOBAL)]
    pub(crate) actor: Option<String>,
    /// Reason in the audit
    #[arg(long, global = true, value_name = "TEXT", help_heading = GLOBAL)]
    pub(crate) reason: Option<String>,
    /// Does not ask before a change that can't be undone
    #[arg(short, long, global = true, help_heading = GLOBAL)]
    pub(crate) yes: bool,
}

const GLOBAL: &str = "Options of every command";

/// Form of the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// One JSON value
    Json,
    /// One JSON value per line
    Jsonl,
    /// The id alone
    Id,
    /// The new secret alone
    Secret,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Creates the tables and triggers, or brings them up to date
    Migrate(MigrateArgs),
    /// Manages users, who own keys
    #[command(subcommand)]
    User(UserCommand),
    /// Manages keys
    #[command(subcommand)]
    Key(KeyCommand),
    /// Lists the changes of users and keys, the latest first
    Audit(AuditArgs),
    /// Checks the database, Redis and the change feed, and prints what to do
    Doctor(DoctorArgs),
    /// Shows why a request with a key is allowed or denied, rule by rule
    Explain(ExplainArgs),
    /// Prints the completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Prints the man page, of the program or of a command: man key issue
    Man {
        /// The command
        command: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct MigrateArgs {
    /// Lists what is missing, and changes nothing; exit code 1 if something is
    #[arg(long, conflicts_with = "dry_run")]
    pub(crate) check: bool,
    /// Prints the SQL, and changes nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct AuditArgs {
    /// Only changes of this key
    #[arg(long, value_name = "ID")]
    pub(crate) key: Option<i64>,
    /// Only changes of this user and of this user's keys (id, or e-mail address of an existing user)
    #[arg(long, value_name = "USER", value_parser = values::user)]
    pub(crate) user: Option<UserRef>,
    /// Only changes by this actor
    #[arg(long, value_name = "NAME")]
    pub(crate) by: Option<String>,
    /// Only changes from this time on: 7d (that long ago), 2027-01-01 or RFC 3339
    #[arg(long, value_name = "TIME", value_parser = values::past)]
    pub(crate) since: Option<When>,
    /// Only changes before this time
    #[arg(long, value_name = "TIME", value_parser = values::past)]
    pub(crate) until: Option<When>,
    /// Only entries with a lower id, for the next page
    #[arg(long, value_name = "ID")]
    pub(crate) before: Option<i64>,
    /// Maximum number of entries
    #[arg(long, default_value_t = 100, value_name = "N")]
    pub(crate) limit: u32,
    /// Lists every entry
    #[arg(long, conflicts_with = "limit")]
    pub(crate) all: bool,
    /// Deletes the entries from before this time instead: 365d (that long ago), 2027-01-01 or RFC 3339
    #[arg(long, value_name = "TIME", value_parser = values::past,
        conflicts_with_all = ["key", "user", "by", "since", "until", "before", "all"])]
    pub(crate) prune_before: Option<When>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    /// How long to wait for the own change event
    #[arg(long, default_value = "10s", value_name = "DURATION", value_parser = values::duration)]
    pub(crate) timeout: std::time::Duration,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    /// The key
    #[arg(long, value_name = "ID")]
    pub(crate) key_id: i64,
    /// Method of the request
    #[arg(long, requires = "path")]
    pub(crate) method: Option<http::Method>,
    /// Path of the request
    #[arg(long, requires = "method")]
    pub(crate) path: Option<String>,
    /// Address of the client
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) ip: Option<std::net::IpAddr>,
    /// Model that the request uses
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Scope that the handler requires (repeatable)
    #[arg(long)]
    pub(crate) scope: Vec<String>,
    /// Time of the request: now by default
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    pub(crate) at: Option<DateTime<Utc>>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_declaration_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_forms_of_the_documentation_are_accepted() {
        for line in [
            "migrate",
            "user create ada@example.com --role admin -o json",
            "key issue --user 1 --name laptop --scope chat:write --expires 90d --limit 100/min -o secret",
            "key inspect",
            "key list -o json",
            "key rotate 1 --grace 24h -o secret",
            "key revoke 1 --reason lost --yes",
            "audit -o jsonl",
            "doctor",
            "explain --key-id 7 --method POST --path /v1/chat --ip 1.2.3.4 --model m --at 2027-01-01",
        ] {
            let words = std::iter::once("tower-api-key").chain(line.split(' '));
            Args::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }
}
