//! The commands, one file per topic. [`run`] runs one.

mod audit;
mod doctor;
mod explain;
mod import;
mod inspect;
mod key;
mod man;
mod migrate;
mod rights;
mod user;

use chrono::{DateTime, Utc};
use clap::CommandFactory;
use tower_api_key::{
    KeyManager, KeyScheme, chrono,
    clock::{Clock, SystemClock},
    record::User,
    store::KeyRepository,
};

use crate::{
    args::{Args, Command, Form, KeyCommand, Options, UserCommand},
    connect::{self, Database, Missing},
    failure::Failure,
    output::{Output, reject_secret},
    scheme,
    values::UserRef,
};

/// What a command that uses keys works with.
struct Session<R> {
    manager: KeyManager<R>,
    output: Output,
    is_confirmed: bool,
}

/// Runs a command.
pub(crate) async fn run(Args { command, options }: Args) -> Result<(), Failure> {
    let makes_secret =
        matches!(command, Command::Key(KeyCommand::Issue(_) | KeyCommand::Rotate(_)));
    if !makes_secret {
        reject_secret(options.output)?;
    }
    let mut output = Output::new(options.output);
    match command {
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "tower-api-key", &mut text);
            output.text(&text)
        }
        Command::Man { command } => output.text(&man::page(&command)?),
        Command::Migrate(args) => migrate::run(&args, &options, &mut output).await,
        Command::Doctor(args) => doctor::run(&args, &options, &mut output).await,
        Command::Key(KeyCommand::Inspect) => inspect::run(&options, &mut output),
        command => {
            // What is wrong with the options is reported before anything is opened.
            let scheme = scheme::scheme(&options)?;
            let database = Database::open(&options, Missing::Fail)?;
            // Before Redis, which needs the secret in the database.
            database.check_schema().await?;
            let outcome = with_database(&database, scheme, output, &command, &options).await;
            match outcome {
                Ok(()) => Ok(()),
                Err(failure) => Err(database.explain(failure).await),
            }
        }
    }
}

async fn with_database(
    database: &Database,
    scheme: KeyScheme,
    output: Output,
    command: &Command,
    options: &Options,
) -> Result<(), Failure> {
    // Only changes concern the entries in Redis.
    let servers = connect::redis(options).filter(|_| is_change(command));
    match (database.clone(), servers) {
        (Database::Sqlite(store), None) => manage(store, scheme, output, command, options).await,
        (Database::Postgres(store), None) => manage(store, scheme, output, command, options).await,
        (Database::Sqlite(store), Some(servers)) => {
            let cache = connect::cached(store, servers, options).await?;
            let outcome = manage(cache.clone(), scheme, output, command, options).await;
            connect::flushed(&cache).await;
            outcome
        }
        (Database::Postgres(store), Some(servers)) => {
            let cache = connect::cached(store, servers, options).await?;
            let outcome = manage(cache.clone(), scheme, output, command, options).await;
            connect::flushed(&cache).await;
            outcome
        }
    }
}

fn is_change(command: &Command) -> bool {
    match command {
        Command::User(command) => {
            !matches!(command, UserCommand::List { .. } | UserCommand::Show { .. })
        }
        Command::Key(command) => {
            !matches!(command, KeyCommand::List(_) | KeyCommand::Show { .. } | KeyCommand::Usage(_))
        }
        _ => false,
    }
}

async fn manage<R: KeyRepository + Clone>(
    repository: R,
    scheme: KeyScheme,
    output: Output,
    command: &Command,
    options: &Options,
) -> Result<(), Failure> {
    let mut manager = KeyManager::new(repository).scheme(scheme).actor(actor(options));
    if let Some(reason) = &options.reason {
        manager = manager.reason(reason);
    }
    let mut session = Session { manager, output, is_confirmed: options.yes };
    match command {
        Command::User(command) => session.user(command).await,
        Command::Key(command) => session.key(command).await,
        Command::Audit(args) => session.audit(args).await,
        Command::Explain(args) => session.explain(args).await,
        _ => Ok(()),
    }
}

/// Returns the actor in the audit.
fn actor(options: &Options) -> String {
    let user = || std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).ok();
    options.actor.clone().unwrap_or_else(|| match user().filter(|user| !user.is_empty()) {
        Some(user) => format!("cli:{user}"),
        None => "cli".to_owned(),
    })
}

fn now() -> DateTime<Utc> {
    SystemClock.now().into()
}

impl<R: KeyRepository + Clone> Session<R> {
    /// Returns the user that was named by id or e-mail address.
    async fn find_user(&self, user: &UserRef) -> Result<User, Failure> {
        Ok(match user {
            UserRef::Id(id) => self.manager.find_user(id).await?,
            UserRef::Email(email) => self.manager.find_user_by_email(email).await?,
        })
    }
}

/// Returns whether the output is one value and not a list.
fn is_one_value(form: Option<Form>) -> bool {
    form == Some(Form::Json)
}
