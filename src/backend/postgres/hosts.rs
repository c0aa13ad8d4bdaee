//! The hosts of a URL, and the order in which they are tried: [`Hosts`].

use std::{
    fmt,
    future::Future,
    net::IpAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{net::lookup_host, time::timeout};
use tokio_postgres::{
    Config,
    config::{Host, LoadBalanceHosts},
};

use crate::error::StoreError;

/// With `load_balance_hosts=random`, time for which a failed host is tried after the others.
const AVOIDED: Duration = Duration::from_secs(10);

/// The hosts, at least one, each with its own configuration.
pub(super) struct Hosts {
    configs: Vec<Config>,
    is_random: bool,
    /// The host to which the next connection is tried first, unless the order is random.
    first: AtomicUsize,
    failed_at: Mutex<Vec<Option<Instant>>>,
}

/// The reason why a connection failed.
#[derive(Debug)]
pub(super) enum ConnectFault {
    Postgres(tokio_postgres::Error),
    Lookup(std::io::Error),
    Setup(diesel::ConnectionError),
    /// The host did not complete the connection in this time.
    Timeout(Duration),
}

impl Hosts {
    /// Splits a configuration by host. The error is the reason why it can't be used.
    pub(super) fn of(config: &Config) -> Result<Self, &'static str> {
        let (hosts, addresses) = (config.get_hosts(), config.get_hostaddrs());
        let (ports, count) = (config.get_ports(), hosts.len().max(addresses.len()));
        if count == 0 {
            return Err("it names no host");
        }
        if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
            return Err("the numbers of hosts and of hostaddr differ");
        }
        if ports.len() > 1 && ports.len() != count {
            return Err("the numbers of ports and of hosts differ");
        }
        let configs = (0..count).map(|at| {
            let mut single = without_hosts(config);
            match hosts.get(at) {
                Some(Host::Tcp(name)) => single.host(name.as_str()),
                #[cfg(unix)]
                Some(Host::Unix(path)) => single.host_path(path),
                None => &mut single,
            };
            if let Some(address) = addresses.get(at) {
                single.hostaddr(*address);
            }
            if let Some(port) = ports.get(at).or_else(|| ports.first()) {
                single.port(*port);
            }
            single
        });
        Ok(Self {
            configs: configs.collect(),
            is_random: config.get_load_balance_hosts() == LoadBalanceHosts::Random,
            first: AtomicUsize::new(0),
            failed_at: Mutex::new(vec![None; count]),
        })
    }

    /// Tries the hosts one after the other until `connect` succeeds.
    ///
    /// All hosts together take at most `budget`. One host takes at most `per_host`, and at most its share of what is
    /// left of the budget, so that an unresponsive host leaves time for the hosts after it.
    pub(super) async fn connect<T, F>(
        &self,
        budget: Duration,
        per_host: Duration,
        connect: impl Fn(Config) -> F,
    ) -> Result<T, ConnectFault>
    where
        F: Future<Output = Result<T, ConnectFault>>,
    {
        let begun = Instant::now();
        let mut fault = ConnectFault::Timeout(budget);
        for (tried, at) in self.order().into_iter().enumerate() {
            let share = share(budget, begun, self.configs.len() - tried).min(per_host);
            match self.connect_to(&self.configs[at], share, &connect).await {
                Ok(connection) => {
                    self.succeeded(at);
                    return Ok(connection);
                }
                Err(reason) => {
                    self.failed(at);
                    fault = reason;
                }
            }
        }
        Err(fault)
    }

    /// Connects to one host within `limit`, and tries its addresses one after the other.
    async fn connect_to<T, F>(
        &self,
        config: &Config,
        limit: Duration,
        connect: impl Fn(Config) -> F,
    ) -> Result<T, ConnectFault>
    where
        F: Future<Output = Result<T, ConnectFault>>,
    {
        let begun = Instant::now();
        let late = |_| ConnectFault::Timeout(limit);
        let mut addresses = timeout(limit, addresses(config)).await.map_err(late)??;
        if addresses.is_empty() {
            return timeout(limit, connect(config.clone())).await.map_err(late)?;
        }
        let count = addresses.len();
        if self.is_random {
            shuffle(&mut addresses);
        }
        let mut fault = ConnectFault::Timeout(limit);
        for (tried, address) in addresses.into_iter().enumerate() {
            let share = share(limit, begun, count - tried);
            let mut config = config.clone();
            config.hostaddr(address);
            match timeout(share, connect(config)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(reason)) => fault = reason,
                Err(_) => fault = ConnectFault::Timeout(share),
            }
        }
        Err(fault)
    }

    fn order(&self) -> Vec<usize> {
        let count = self.configs.len();
        if !self.is_random {
            let first = self.first.load(Ordering::Relaxed);
            return (first..first + count).map(|at| at % count).collect();
        }
        let failed_at = self.failed_at.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut order: Vec<_> = (0..count).collect();
        shuffle(&mut order);
        order.sort_by_key(|&at| failed_at[at].is_some_and(|failed| failed.elapsed() < AVOIDED));
        order
    }

    fn succeeded(&self, at: usize) {
        self.first.store(at, Ordering::Relaxed);
        self.failed_at.lock().unwrap_or_else(PoisonError::into_inner)[at] = None;
    }

    /// Makes the next connection start with the next host, even if the caller does not wait for the end of this one.
    fn failed(&self, at: usize) {
        let next = (at + 1) % self.configs.len();
        let _ = self.first.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed);
        self.failed_at.lock().unwrap_or_else(PoisonError::into_inner)[at] = Some(Instant::now());
    }
}

/// Returns the share of one of `parts` in what is left of `whole` since `begun`.
fn share(whole: Duration, begun: Instant, parts: usize) -> Duration {
    whole.saturating_sub(begun.elapsed()) / u32::try_from(parts).unwrap_or(u32::MAX).max(1)
}

/// Returns the addresses of a name; none for a socket, or if the configuration contains the address.
async fn addresses(config: &Config) -> Result<Vec<IpAddr>, ConnectFault> {
    let port = config.get_ports().first().copied().unwrap_or(5432);
    match config.get_hosts().first() {
        Some(Host::Tcp(name)) if config.get_hostaddrs().is_empty() => {
            let found = lookup_host((name.clone(), port)).await.map_err(ConnectFault::Lookup)?;
            Ok(found.map(|address| address.ip()).collect())
        }
        _ => Ok(Vec::new()),
    }
}

/// Shuffles the items. Without random bytes the order does not change.
fn shuffle<T>(items: &mut [T]) {
    for last in (1..items.len()).rev() {
        let mut random = [0; 8];
        if getrandom::fill(&mut random).is_ok() {
            let below = last as u64 + 1;
            items.swap(last, (u64::from_ne_bytes(random) % below) as usize);
        }
    }
}

/// Returns a copy of the configuration without hosts, ports and their order. tokio-postgres has no method to remove a
/// host.
fn without_hosts(config: &Config) -> Config {
    let mut single = Config::new();
    if let Some(user) = config.get_user() {
        single.user(user);
    }
    if let Some(password) = config.get_password() {
        single.password(password);
    }
    if let Some(database) = config.get_dbname() {
        single.dbname(database);
    }
    if let Some(options) = config.get_options() {
        single.options(options);
    }
    if let Some(name) = config.get_application_name() {
        single.application_name(name);
    }
    if let Some(timeout) = config.get_tcp_user_timeout() {
        single.tcp_user_timeout(*timeout);
    }
    if let Some(interval) = config.get_keepalives_interval() {
        single.keepalives_interval(interval);
    }
    if let Some(retries) = config.get_keepalives_retries() {
        single.keepalives_retries(retries);
    }
    single
        .ssl_mode(config.get_ssl_mode())
        .ssl_negotiation(config.get_ssl_negotiation())
        .keepalives(config.get_keepalives())
        .keepalives_idle(config.get_keepalives_idle())
        .target_session_attrs(config.get_target_session_attrs())
        .channel_binding(config.get_channel_binding());
    single
}

impl From<tokio_postgres::Error> for ConnectFault {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Postgres(error)
    }
}

impl From<ConnectFault> for StoreError {
    fn from(fault: ConnectFault) -> Self {
        match fault {
            ConnectFault::Timeout(limit) => Self::timeout(limit),
            fault => Self::unavailable(fault),
        }
    }
}

impl fmt::Display for ConnectFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Postgres(error) => {
                error.fmt(f)?;
                // The text of the error itself is only "db error" and the like.
                match std::error::Error::source(error) {
                    Some(cause) => write!(f, ": {cause}"),
                    None => Ok(()),
                }
            }
            Self::Lookup(error) => write!(f, "the host's name can't be resolved: {error}"),
            Self::Setup(error) => error.fmt(f),
            Self::Timeout(limit) => {
                write!(f, "the host did not accept a connection within {limit:?}")
            }
        }
    }
}

impl std::error::Error for ConnectFault {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Postgres(error) => Some(error),
            Self::Lookup(error) => Some(error),
            Self::Setup(error) => Some(error),
            Self::Timeout(_) => None,
        }
    }
}
