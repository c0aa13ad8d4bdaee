//! Settings of a connection, which must not leak to other clients of a connection pooler: [`Sessions`].
//!
//! They are start-up options. A pooler such as PgBouncer assigns a server connection to one client after the other and
//! resets nothing between transactions, so that a `SET` would remain for the next client. PgBouncer rejects start-up
//! options that it doesn't track (SQLSTATE 08P01) or, with `ignore_startup_parameters = options`, drops them.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::atomic::{AtomicBool, Ordering},
    task::Poll,
    time::Duration,
};

use tokio_postgres::{Client, Config, SimpleQueryMessage, error::SqlState};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{connect::RawConnection, hosts::ConnectFault};

/// A setting without a meaning to the server. If it is set after the connect, so are the other settings.
const MARKER: &str = "tower_api_key.session";

/// Whether each connection has its own session.
#[derive(Default)]
pub(super) struct Sessions {
    are_pooled: AtomicBool,
}

impl Sessions {
    /// Returns whether a connection may lack the settings, so that transactions must apply their own.
    pub(super) fn are_pooled(&self) -> bool {
        self.are_pooled.load(Ordering::Relaxed)
    }

    /// Connects with the settings or, if they are rejected, without them.
    pub(super) async fn connect(
        &self,
        config: &Config,
        tls: &MakeRustlsConnect,
        statement_timeout: Duration,
    ) -> Result<RawConnection, ConnectFault> {
        if !self.are_pooled() {
            let mut with_settings = config.clone();
            with_settings.options(options(config.get_options(), statement_timeout));
            match with_settings.connect(tls.clone()).await {
                Ok((client, mut connection)) => {
                    let has_settings = driven(&mut connection, has_marker(&client)).await?;
                    if !has_settings {
                        self.are_pooled.store(true, Ordering::Relaxed);
                    }
                    return Ok((client, connection));
                }
                Err(error) if is_rejection(&error) => {
                    self.are_pooled.store(true, Ordering::Relaxed);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(config.connect(tls.clone()).await?)
    }
}

/// Returns the statement that sets the statement timeout of the current transaction.
pub(super) fn local_settings(statement_timeout: Duration) -> String {
    format!("SET LOCAL statement_timeout = {}", millis(statement_timeout))
}

/// Returns the timeout in milliseconds. The server uses 31 bits, and 0 means unlimited, so that a timeout other than 0
/// must not become 0.
fn millis(statement_timeout: Duration) -> u128 {
    statement_timeout.as_micros().div_ceil(1000).min(i32::MAX as u128)
}

/// Returns the start-up options. Those of the URL come first: of two values for one setting, the server uses the last.
fn options(given: Option<&str>, statement_timeout: Duration) -> String {
    // With READ COMMITTED, functions read what was committed while they waited for a lock, whatever the database's
    // default is.
    format!(
        "{} -c statement_timeout={} -c default_transaction_isolation=read\\ committed -c {MARKER}=on",
        given.unwrap_or_default(),
        millis(statement_timeout)
    )
}

/// Returns whether a pooler rejected the options. PgBouncer returns 08P01, Amazon's RDS Proxy 0A000.
fn is_rejection(error: &tokio_postgres::Error) -> bool {
    let refusals = [&SqlState::PROTOCOL_VIOLATION, &SqlState::FEATURE_NOT_SUPPORTED];
    error.code().is_some_and(|code| refusals.contains(&code))
}

async fn has_marker(client: &Client) -> Result<bool, tokio_postgres::Error> {
    let rows = client.simple_query(&format!("SELECT current_setting('{MARKER}', true)")).await?;
    Ok(rows
        .iter()
        .any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("on"))))
}

/// Returns the output of a query on a connection that no task drives yet.
async fn driven<T>(
    connection: &mut (impl Future<Output = Result<(), tokio_postgres::Error>> + Unpin),
    query: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, tokio_postgres::Error> {
    let mut query = pin!(query);
    let mut has_ended = false;
    poll_fn(|cx| {
        if !has_ended && let Poll::Ready(ended) = Pin::new(&mut *connection).poll(cx) {
            has_ended = true;
            if let Err(error) = ended {
                return Poll::Ready(Err(error));
            }
        }
        // The error of the query itself reports a closed connection.
        query.as_mut().poll(cx)
    })
    .await
}
