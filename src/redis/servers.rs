//! Redis servers and connections to them: [`RedisServers`].

use std::fmt;

use deadpool_redis::{
    self as single, cluster,
    redis::{
        Client, Cmd, Pipeline, RedisError, RedisFuture, RedisResult, Value,
        aio::{ConnectionLike, MultiplexedConnection, PubSub},
        cluster_async::ClusterConnection,
        sentinel::{SentinelClient, SentinelNodeConnectionInfo, SentinelServerType},
    },
    sentinel,
};

/// Addresses of Redis, or of another server with its protocol, such as Valkey: one server, a cluster, or Sentinel.
///
/// A text is the URL of one server. URLs start with `redis://`, `rediss://` (TLS, with the certificates that the system
/// trusts) or `redis+unix://`.
///
/// `Debug` shows no URL, because a URL may contain a password.
#[derive(Clone)]
pub struct RedisServers(Kind);

#[derive(Clone)]
enum Kind {
    Single(String),
    Cluster(Vec<String>),
    Sentinel { sentinels: Vec<String>, master: String, nodes_like: Option<String> },
}

impl RedisServers {
    /// Uses one server.
    pub fn single(url: impl Into<String>) -> Self {
        Self(Kind::Single(url.into()))
    }

    /// Uses a cluster, of which some nodes are known. Only its primaries are queried, because a replica may lag.
    pub fn cluster<T: Into<String>>(urls: impl IntoIterator<Item = T>) -> Self {
        Self(Kind::Cluster(urls.into_iter().map(Into::into).collect()))
    }

    /// Uses the server that these sentinels report as the master with the name `master`.
    pub fn sentinel<T: Into<String>>(
        urls: impl IntoIterator<Item = T>,
        master: impl Into<String>,
    ) -> Self {
        let sentinels = urls.into_iter().map(Into::into).collect();
        Self(Kind::Sentinel { sentinels, master: master.into(), nodes_like: None })
    }

    /// Sets the scheme, user, password and database number for the servers behind sentinels to those of `url`. The host
    /// of `url` is ignored.
    #[must_use]
    pub fn nodes_like(mut self, url: impl Into<String>) -> Self {
        if let Kind::Sentinel { nodes_like, .. } = &mut self.0 {
            *nodes_like = Some(url.into());
        }
        self
    }

    fn urls(&self) -> Vec<&str> {
        match &self.0 {
            Kind::Single(url) => vec![url],
            Kind::Cluster(urls) => urls.iter().map(String::as_str).collect(),
            Kind::Sentinel { sentinels, nodes_like, .. } => {
                sentinels.iter().chain(nodes_like).map(String::as_str).collect()
            }
        }
    }
}

impl From<&str> for RedisServers {
    fn from(url: &str) -> Self {
        Self::single(url)
    }
}

impl From<&String> for RedisServers {
    fn from(url: &String) -> Self {
        Self::single(url)
    }
}

impl From<String> for RedisServers {
    fn from(url: String) -> Self {
        Self::single(url)
    }
}

impl fmt::Debug for RedisServers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Kind::Single(_) => "RedisServers(single)",
            Kind::Cluster(_) => "RedisServers(cluster)",
            Kind::Sentinel { .. } => "RedisServers(sentinel)",
        })
    }
}

/// Creates connections. They are multiplexed: a connection is held and cloned, not checked out.
pub(crate) struct Connector {
    servers: RedisServers,
    pool: Pool,
}

/// deadpool's pools create the connections. A connection is taken out of the pool at once, because the pool pings each
/// connection that it hands out again.
enum Pool {
    Single(single::Pool),
    Cluster(cluster::Pool),
    Sentinel(sentinel::Pool),
}

impl Connector {
    /// Returns whether a command can use only entries of one slot.
    pub(crate) fn is_cluster(&self) -> bool {
        matches!(self.pool, Pool::Cluster(_))
    }

    pub(crate) fn new(servers: RedisServers) -> Result<Self, RedisUrlError> {
        let urls = servers.urls();
        if urls.is_empty() {
            return Err(RedisUrlError("no URL was given"));
        }
        if urls.iter().any(|url| url.starts_with("rediss:")) {
            use_a_crypto_provider();
        }
        // The library's error may quote the URL.
        let malformed = |_| RedisUrlError("it can't be parsed");
        let pool = match &servers.0 {
            Kind::Single(url) => {
                let manager = single::Manager::new(url.as_str()).map_err(malformed)?;
                let pool = single::Pool::builder(manager).max_size(1).build();
                Pool::Single(pool.map_err(|_| RedisUrlError("the pool can't be built"))?)
            }
            Kind::Cluster(urls) => {
                let urls = urls.iter().map(String::as_str).collect();
                let manager = cluster::Manager::new(urls, false).map_err(malformed)?;
                let pool = cluster::Pool::builder(manager).max_size(1).build();
                Pool::Cluster(pool.map_err(|_| RedisUrlError("the pool can't be built"))?)
            }
            Kind::Sentinel { sentinels, master, nodes_like } => {
                let nodes = nodes_like.as_deref().map(node_info).transpose()?;
                let manager = sentinel::Manager::new(
                    sentinels.iter().map(String::as_str).collect(),
                    master.clone(),
                    nodes,
                    sentinel::SentinelServerType::Master,
                );
                let manager = manager.map_err(malformed)?;
                let pool = sentinel::Pool::builder(manager).max_size(1).build();
                Pool::Sentinel(pool.map_err(|_| RedisUrlError("the pool can't be built"))?)
            }
        };
        Ok(Self { servers, pool })
    }

    /// Creates a connection.
    pub(crate) async fn connect(&self) -> Result<Connection, String> {
        // A pool's error contains the server's error.
        let text = |error: &dyn fmt::Display| error.to_string();
        Ok(match &self.pool {
            Pool::Single(pool) => {
                let connection = pool.get().await.map_err(|error| text(&error))?;
                Connection::Single(single::Connection::take(connection))
            }
            Pool::Cluster(pool) => {
                let connection = pool.get().await.map_err(|error| text(&error))?;
                Connection::Cluster(cluster::Connection::take(connection))
            }
            Pool::Sentinel(pool) => {
                let connection = pool.get().await.map_err(|error| text(&error))?;
                Connection::Single(sentinel::Connection::take(connection))
            }
        })
    }

    /// Creates a connection that receives the messages of `channel`.
    pub(crate) async fn subscribe(&self, channel: &str) -> RedisResult<PubSub> {
        let mut messages = self.client().await?.get_async_pubsub().await?;
        messages.subscribe(channel).await?;
        Ok(messages)
    }

    async fn client(&self) -> RedisResult<Client> {
        match &self.servers.0 {
            Kind::Single(url) => Client::open(url.as_str()),
            // Each node of a cluster forwards messages to all nodes.
            Kind::Cluster(urls) => {
                let mut last = Err(no_servers());
                for url in urls {
                    let client = Client::open(url.as_str())?;
                    last = client.get_multiplexed_async_connection().await.map(|_| client);
                    if last.is_ok() {
                        break;
                    }
                }
                last
            }
            Kind::Sentinel { sentinels, master, nodes_like } => {
                let nodes = nodes_like.as_deref().and_then(|url| node_info(url).ok());
                let mut sentinels = SentinelClient::build(
                    sentinels.iter().map(String::as_str).collect(),
                    master.clone(),
                    nodes.map(SentinelNodeConnectionInfo::from),
                    SentinelServerType::Master,
                )?;
                sentinels.async_get_client().await
            }
        }
    }
}

fn no_servers() -> RedisError {
    RedisError::from(std::io::Error::other("no server is configured"))
}

fn node_info(url: &str) -> Result<sentinel::SentinelNodeConnectionInfo, RedisUrlError> {
    let malformed = |_| RedisUrlError("it can't be parsed");
    let client = Client::open(url).map_err(malformed)?;
    let settings = client.get_connection_info().redis_settings();
    let mut info = single::RedisConnectionInfo {
        db: settings.db(),
        username: settings.username().map(str::to_owned),
        password: settings.password().map(str::to_owned),
        ..Default::default()
    };
    info.protocol = Default::default();
    Ok(sentinel::SentinelNodeConnectionInfo {
        tls_mode: url.starts_with("rediss:").then_some(sentinel::TlsMode::Secure),
        redis_connection_info: Some(info),
    })
}

/// Installs a crypto provider, because rustls requires one for the process. A provider that is already installed is
/// kept.
fn use_a_crypto_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // An error means that another one was installed first, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

/// A connection to one server or to a cluster.
#[derive(Clone)]
pub(crate) enum Connection {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Single(connection) => connection.req_packed_command(command),
            Self::Cluster(connection) => connection.req_packed_command(command),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        commands: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Single(connection) => connection.req_packed_commands(commands, offset, count),
            Self::Cluster(connection) => connection.req_packed_commands(commands, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Single(connection) => connection.get_db(),
            Self::Cluster(connection) => connection.get_db(),
        }
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("servers", &self.servers).finish_non_exhaustive()
    }
}

/// The reason why a Redis URL can't be used. It never shows the URL, which may contain a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedisUrlError(&'static str);

impl fmt::Display for RedisUrlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the Redis URL can't be used: {}", self.0)
    }
}

impl std::error::Error for RedisUrlError {}
