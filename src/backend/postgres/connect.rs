//! Settings and connections from a URL: [`PostgresStoreBuilder`].

use std::{fmt, str::FromStr, sync::Arc, time::Duration};

use diesel::ConnectionError;
use diesel_async::{
    AsyncPgConnection,
    pooled_connection::{
        AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod, deadpool::Pool,
    },
};
use tokio_postgres::{Config, Socket, config::SslMode, tls::MakeTlsConnect};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{
    Inner, PostgresStore,
    batch::MAX_BATCH,
    connections::Connections,
    hosts::{ConnectFault, Hosts},
    read_connections::ReadConnections,
    session::Sessions,
    tls::{self, TlsFault, Verification},
};
use crate::{
    backend::sql::gate::LookupGate,
    runtime::{Clock, SystemClock},
};

/// Number of connections for usage, leases and upgraded hashes.
const ACCOUNTING_CONNECTIONS: usize = 4;
/// Number of connections with which a replica reads keys.
const REPLICA_CONNECTIONS: usize = 1;
/// Number of connections for management and the cache secret.
const MANAGEMENT_CONNECTIONS: usize = 2;

/// Maximum number of waiting look-ups per connection: four batches, a wait of tens of milliseconds.
const WAITING_PER_CONNECTION: usize = 4 * MAX_BATCH;

/// Builds a [`PostgresStore`].
#[derive(Clone)]
pub struct PostgresStoreBuilder {
    url: String,
    max_connections: usize,
    deadline: Duration,
    connect_timeout: Duration,
    statement_timeout: Duration,
    poll_interval: Duration,
    clock: Arc<dyn Clock>,
}

impl PostgresStoreBuilder {
    pub(super) fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            max_connections: 16,
            deadline: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(3),
            statement_timeout: Duration::from_secs(2),
            poll_interval: Duration::from_secs(5),
            clock: Arc::new(SystemClock),
        }
    }

    /// Sets the maximum number of connections for look-ups: 16 by default; 0 counts as 1. While all of them are in use,
    /// look-ups wait, and the next free connection reads up to 256 keys in one query. Per connection, at most 1,024
    /// look-ups wait; beyond that, requests are answered 503. Usage and leases have up to 4 connections of their own,
    /// management up to 2, a [`Replica`](crate::Replica) and the change feed one each, so that no number of look-ups
    /// delays them.
    #[must_use]
    pub fn max_connections(self, connections: usize) -> Self {
        Self { max_connections: connections.max(1), ..self }
    }

    /// Sets the deadline of a look-up or any other call, including the wait for a connection: 5 s by default.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { deadline: timeout, ..self }
    }

    /// Sets the timeout for connecting to one host, including TLS and authentication: 3 s by default. It is at most
    /// four fifths of [`timeout`](Self::timeout) divided by the number of hosts, so that the last host can still
    /// answer.
    #[must_use]
    pub fn connect_timeout(self, timeout: Duration) -> Self {
        Self { connect_timeout: timeout, ..self }
    }

    /// Sets the statement timeout of the server: 2 s by default; 0 means unlimited. Behind a connection pooler that
    /// accepts no start-up options (PgBouncer), the server's own setting applies, except for usage and leases.
    #[must_use]
    pub fn statement_timeout(self, timeout: Duration) -> Self {
        Self { statement_timeout: timeout, ..self }
    }

    /// Sets the poll interval of the table of changes, for the case that no notification arrives: 5 s by default, at
    /// least 1 ms. It bounds how long a revoked key remains valid behind a pooler that drops `LISTEN`, as PgBouncer
    /// does.
    #[must_use]
    pub fn poll_interval(self, interval: Duration) -> Self {
        // Without a pause, every node would read the table all the time.
        Self { poll_interval: interval.max(Duration::from_millis(1)), ..self }
    }

    /// Sets the clock, which decides how old the changes are that a new node reads first:
    /// [`SystemClock`] by default. Use the same clock for the
    /// [`Authenticator`](crate::Authenticator). Leases and budget periods end by the clock of the database.
    #[must_use]
    pub fn clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    /// Builds the store. It needs no runtime, and connects at first use.
    ///
    /// # Errors
    ///
    /// If the URL can't be parsed, or its certificates can't be used.
    pub fn build(self) -> Result<PostgresStore, PostgresUrlError> {
        let target = Target::parse(&self)?;
        let reads = |size| {
            ReadConnections::new(&target, size, self.statement_timeout, self.connect_budget())
        };
        let (lookups, replica_reads) = (reads(self.max_connections), reads(REPLICA_CONNECTIONS));
        let gate = LookupGate::new(self.max_connections, WAITING_PER_CONNECTION);
        let pool = |size| self.pool(&target, size);
        let (accounting, management) =
            (pool(ACCOUNTING_CONNECTIONS)?, pool(MANAGEMENT_CONNECTIONS)?);
        let Self { deadline, poll_interval, clock, .. } = self;
        Ok(PostgresStore(Arc::new(Inner {
            lookups,
            gate,
            replica_reads,
            accounting,
            management,
            target,
            deadline,
            poll_interval,
            clock,
        })))
    }

    /// Returns the maximum time for a connect to all hosts. The rest of the deadline is for the query.
    fn connect_budget(&self) -> Duration {
        self.deadline / 5 * 4
    }

    /// Creates a pool of connections to `target` that are opened on demand.
    fn pool(&self, target: &Target, size: usize) -> Result<Connections, PostgresUrlError> {
        let mut config = ManagerConfig::default();
        // This saves one round trip per query compared with a ping. A dead connection is detected in use.
        config.recycling_method = RecyclingMethod::Fast;
        let (connect_to, statement_timeout) = (target.clone(), self.statement_timeout);
        let budget = self.connect_budget();
        config.custom_setup = Box::new(move |_url| {
            let target = connect_to.clone();
            Box::pin(async move {
                let connected = target.connect(statement_timeout, budget).await;
                connected.map_err(|fault| ConnectionError::BadConnection(fault.to_string()))
            })
        });
        // The URL is not passed to the manager: `target` has the parsed settings.
        let manager = AsyncDieselConnectionManager::new_with_config(String::new(), config);
        let pool = Pool::builder(manager).max_size(size).build();
        let pool = pool.map_err(|_| PostgresUrlError::new("the pool can't be built"))?;
        Ok(Connections::new(pool, target.clone(), statement_timeout))
    }
}

impl fmt::Debug for PostgresStoreBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStoreBuilder")
            .field("max_connections", &self.max_connections)
            .finish_non_exhaustive()
    }
}

pub(super) type RawConnection = (
    tokio_postgres::Client,
    tokio_postgres::Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>,
);

/// The settings for connecting to a database.
#[derive(Clone)]
pub(super) struct Target {
    config: Config,
    tls: MakeRustlsConnect,
    connect_timeout: Duration,
    hosts: Arc<Hosts>,
    sessions: Arc<Sessions>,
}

impl Target {
    fn parse(builder: &PostgresStoreBuilder) -> Result<Self, PostgresUrlError> {
        let url = builder.url.as_str();
        if !["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme)) {
            return Err(PostgresUrlError::new("it does not start with postgres://"));
        }
        let (base, query) = url.split_once('?').unwrap_or((url, ""));
        // tokio-postgres supports neither all of libpq's modes nor its certificate settings.
        let (mut mode, mut root_cert, mut rest) = (None, None, Vec::new());
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("sslmode", value)) => mode = Some(value.to_owned()),
                Some(("sslrootcert", value)) => root_cert = Some(decoded(value)?),
                _ => rest.push(pair),
            }
        }
        let mut config = Config::from_str(&format!("{base}?{}", rest.join("&")))
            // The parser's error may quote the URL, and with it the password.
            .map_err(|_| {
                PostgresUrlError::new("its host, port, user or a parameter can't be parsed")
            })?;
        let mode = mode.as_deref().unwrap_or("prefer");
        let (ssl_mode, verification) = match (mode, &root_cert) {
            ("disable", _) => (SslMode::Disable, Verification::None),
            ("allow" | "prefer", _) => (SslMode::Prefer, Verification::None),
            ("require", None) => (SslMode::Require, Verification::None),
            // As in libpq, a given root certificate implies verification.
            ("require", Some(_)) | ("verify-ca", _) => (SslMode::Require, Verification::Chain),
            ("verify-full", _) => (SslMode::Require, Verification::Full),
            _ => {
                return Err(PostgresUrlError::new(
                    "its sslmode is not disable, allow, prefer, require, verify-ca or verify-full",
                ));
            }
        };
        config.ssl_mode(ssl_mode);
        if config.get_application_name().is_none() {
            config.application_name("tower-api-key");
        }
        let tls = tls::connector(verification, root_cert.as_deref())?;
        let hosts = Arc::new(Hosts::of(&config).map_err(PostgresUrlError::new)?);
        let connect_timeout = builder.connect_timeout;
        Ok(Self { config, tls, connect_timeout, hosts, sessions: Arc::default() })
    }

    /// Returns whether transactions must apply their own settings.
    pub(super) fn is_pooled(&self) -> bool {
        self.sessions.are_pooled()
    }

    /// Opens a connection without diesel and without settings, which the caller must drive. All hosts together take at
    /// most `budget`.
    pub(super) async fn connect_raw(
        &self,
        budget: Duration,
    ) -> Result<RawConnection, ConnectFault> {
        let connect = |config: Config| async move { Ok(config.connect(self.tls.clone()).await?) };
        self.hosts.connect(budget, self.connect_timeout, connect).await
    }

    /// Opens a connection without diesel, which the caller must drive. All hosts together take at most `budget`.
    pub(super) async fn connect_read(
        &self,
        statement_timeout: Duration,
        budget: Duration,
    ) -> Result<RawConnection, ConnectFault> {
        let connect = |config: Config| async move {
            self.sessions.connect(&config, &self.tls, statement_timeout).await
        };
        self.hosts.connect(budget, self.connect_timeout, connect).await
    }

    /// Opens a connection. All hosts together take at most `budget`.
    pub(super) async fn connect(
        &self,
        statement_timeout: Duration,
        budget: Duration,
    ) -> Result<AsyncPgConnection, ConnectFault> {
        let connect = |config: Config| async move {
            let connected = self.sessions.connect(&config, &self.tls, statement_timeout).await;
            let (client, connection) = connected?;
            let connected = AsyncPgConnection::try_from_client_and_connection(client, connection);
            connected.await.map_err(ConnectFault::Setup)
        };
        self.hosts.connect(budget, self.connect_timeout, connect).await
    }
}

fn decoded(value: &str) -> Result<String, PostgresUrlError> {
    let decoded = percent_encoding::percent_decode_str(value).decode_utf8();
    Ok(decoded.map_err(|_| PostgresUrlError::new("its sslrootcert is not UTF-8"))?.into_owned())
}

/// Shows hosts and database, but no user and no password.
impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("hosts", &self.config.get_hosts())
            .field("ports", &self.config.get_ports())
            .field("database", &self.config.get_dbname())
            .finish_non_exhaustive()
    }
}

/// The reason why a PostgreSQL URL can't be used. It never shows the URL, which may contain a password.
#[derive(Debug, Clone)]
pub struct PostgresUrlError {
    reason: &'static str,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl PostgresUrlError {
    fn new(reason: &'static str) -> Self {
        Self { reason, source: None }
    }
}

impl From<TlsFault> for PostgresUrlError {
    fn from(TlsFault { reason, source }: TlsFault) -> Self {
        Self { reason, source: source.map(Arc::from) }
    }
}

impl fmt::Display for PostgresUrlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the PostgreSQL URL can't be used: {}", self.reason)
    }
}

impl std::error::Error for PostgresUrlError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
