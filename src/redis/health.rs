//! State of a Redis server, for operators: [`RedisHealth`].

use std::{
    fmt,
    time::{Duration, Instant},
};

use deadpool_redis::redis::{Value, cmd};

use super::servers::{Connection, Connector, RedisServers};
use crate::runtime::within;

/// State of the servers, read without changing anything.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RedisHealth {
    /// Duration of a `PING`.
    pub ping: Duration,
    /// Version of the server; `None` if the user may not read it.
    pub version: Option<String>,
    /// Memory limit in bytes; 0 means unlimited.
    pub max_memory: Option<u64>,
    /// What the server does at the memory limit, such as `noeviction` or `allkeys-lru`.
    pub eviction_policy: Option<String>,
    /// Role of the server: `master` or `slave`.
    pub role: Option<String>,
    /// Whether the server is part of a cluster.
    pub is_cluster: bool,
    /// Number of hash slots of the cluster that are served, of 16,384; `None` without a cluster.
    pub slots_ok: Option<u32>,
}

/// The reason why the state of Redis can't be read. It never shows a URL or a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisHealthError {
    message: String,
}

impl fmt::Display for RedisHealthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for RedisHealthError {}

impl RedisServers {
    /// Connects, and reads the state of the servers, within `limit`.
    ///
    /// # Errors
    ///
    /// If a URL can't be parsed, or no server answers or accepts the password.
    pub async fn health(&self, limit: Duration) -> Result<RedisHealth, RedisHealthError> {
        let failed = |message: String| RedisHealthError { message };
        let connector = Connector::new(self.clone()).map_err(|error| failed(error.to_string()))?;
        let read = within(limit, async {
            let mut connection = connector.connect().await?;
            let began = Instant::now();
            let pong: Result<Value, _> = cmd("PING").query_async(&mut connection).await;
            pong.map_err(|error| error.to_string())?;
            let ping = began.elapsed();
            Ok(read(&mut connection, ping).await)
        });
        let late = || Err(format!("no answer within {limit:?}"));
        // The pool's name for an error of the first connection.
        let plain = |message: String| {
            message.trim_start_matches("Error occurred while creating a new object: ").to_owned()
        };
        read.await.unwrap_or_else(late).map_err(|message| failed(plain(message)))
    }
}

async fn read(connection: &mut Connection, ping: Duration) -> RedisHealth {
    // A user without the right to read the state still has the state of the connection.
    let info = text(connection, &["INFO"]).await;
    let field = |name: &str| field(&info, name).map(str::to_owned);
    let is_cluster = field("cluster_enabled").as_deref() == Some("1");
    let slots =
        if is_cluster { text(connection, &["CLUSTER", "INFO"]).await } else { String::new() };
    RedisHealth {
        ping,
        version: field("valkey_version").or_else(|| field("redis_version")),
        max_memory: field("maxmemory").and_then(|bytes| bytes.parse().ok()),
        eviction_policy: field("maxmemory_policy"),
        role: field("role"),
        is_cluster,
        slots_ok: self::field(&slots, "cluster_slots_ok").and_then(|slots| slots.parse().ok()),
    }
}

/// Returns the answer as text. A cluster returns one text per node.
async fn text(connection: &mut Connection, words: &[&str]) -> String {
    let mut command = cmd(words.first().copied().unwrap_or_default());
    command.arg(words.get(1..).unwrap_or_default());
    let answer: Result<Value, _> = command.query_async(connection).await;
    let mut found = String::new();
    if let Ok(answer) = answer {
        collect(&answer, &mut found);
    }
    found
}

fn collect(value: &Value, found: &mut String) {
    match value {
        Value::BulkString(bytes) => {
            found.push_str(&String::from_utf8_lossy(bytes));
            found.push('\n');
        }
        Value::VerbatimString { text, .. } => {
            found.push_str(text);
            found.push('\n');
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, found)),
        Value::Map(pairs) => pairs.iter().for_each(|(_, value)| collect(value, found)),
        _ => {}
    }
}

/// Returns the first value of a field in lines of `name:value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix(':'))
}
