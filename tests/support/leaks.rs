//! A search for marked secrets and hashes in everything that leaves the process, and in what is stored.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use base64::{Engine, engine::general_purpose};
use diesel::{
    Connection, QueryableByName, RunQueryDsl, SqliteConnection, sql_query, sql_types::Text,
};
use futures_util::StreamExt;
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use sha2::{Digest, Sha256};
use tokio_postgres::Client;
use tower_api_key::key::KeyHash;

use super::log::Log;

/// The columns of `api_keys` where a hash may be.
const HASH_COLUMNS: [&str; 6] = [
    "key_hash",
    "fast_hash",
    "fast_hash_of",
    "previous_key_hash",
    "previous_fast_hash",
    "previous_fast_hash_of",
];

/// Texts and bytes that must not be found.
#[derive(Default)]
pub struct Marked {
    secrets: BTreeSet<String>,
    hashes: BTreeSet<String>,
}

/// Bytes as a text with a character for each, which can be searched.
fn characters(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}

/// Returns the text around the first of the needles that is found.
fn find(needles: &BTreeSet<String>, text: impl AsRef<[u8]>) -> Option<String> {
    let text = characters(text.as_ref());
    let at = needles.iter().find_map(|needle| text.find(needle))?;
    let before = text[..at].chars().rev().take(200).collect::<Vec<_>>();
    Some(before.into_iter().rev().chain(text[at..].chars().take(200)).collect())
}

/// The forms in which bytes may be written.
fn forms(bytes: &[u8]) -> Vec<String> {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let listed = bytes.iter().map(u8::to_string).collect::<Vec<_>>();
    vec![
        characters(bytes),
        hex.to_uppercase(),
        hex,
        general_purpose::STANDARD_NO_PAD.encode(bytes),
        general_purpose::URL_SAFE_NO_PAD.encode(bytes),
        // As `Debug` prints them.
        listed.join(", "),
        listed.join(","),
    ]
}

impl Marked {
    /// Marks a key. Twelve characters of its secret show too much of it.
    pub fn key(&mut self, key: &str) {
        let secret = key.rsplit(['_', '-']).next().unwrap();
        assert!(secret.len() >= 12, "a marked secret is long enough to be found: {secret}");
        self.secret(key);
        self.secret(&secret[..12]);
        self.secret(&secret[secret.len() - 12..]);
        self.hashes.extend(forms(&Sha256::digest(key)));
    }

    /// Marks another secret, such as a pepper.
    pub fn secret(&mut self, secret: &str) {
        self.secrets.extend(forms(secret.as_bytes()));
    }

    /// Marks a stored hash.
    pub fn hash(&mut self, hash: &KeyHash) {
        let text = hash.expose_hash();
        let last = text.rsplit('$').next().unwrap().to_owned();
        self.hashes.extend(forms(text.as_bytes()));
        let digest = |at| u8::from_str_radix(last.get(at..at + 2)?, 16).ok();
        let digest: Option<Vec<u8>> = (0..last.len()).step_by(2).map(digest).collect();
        self.hashes.extend(digest.iter().flat_map(|digest| forms(digest)));
        self.hashes.insert(last);
    }

    pub fn has_secret(&self, text: impl AsRef<[u8]>) -> bool {
        find(&self.secrets, text).is_some()
    }

    pub fn has_hash(&self, text: impl AsRef<[u8]>) -> bool {
        find(&self.hashes, text).is_some()
    }

    /// Asserts that a text shows neither a secret nor a hash.
    #[track_caller]
    pub fn assert_hidden(&self, place: &str, text: impl AsRef<[u8]>) {
        for (what, needles) in [("secret", &self.secrets), ("hash", &self.hashes)] {
            if let Some(around) = find(needles, &text) {
                panic!("a {what} is in {place}: {around}");
            }
        }
    }

    /// Asserts that no value of the tables shows a secret, and that only the columns for hashes have some. Returns the
    /// number of hashes.
    #[track_caller]
    pub fn assert_stored_as_hashes(&self, values: &[StoredValue]) -> usize {
        let mut hashes = 0;
        for StoredValue { table, column, text } in values {
            if table == "api_keys" && HASH_COLUMNS.contains(&&**column) {
                assert!(!self.has_secret(text), "a secret is in {table}.{column}: {text}");
                hashes += usize::from(self.has_hash(text));
            } else {
                self.assert_hidden(&format!("{table}.{column}"), text);
            }
        }
        hashes
    }
}

/// A value of a row, as text; bytes in hex.
#[derive(Debug)]
pub struct StoredValue {
    pub table: String,
    pub column: String,
    pub text: String,
}

/// Every value in every table of a file, also of SQLite's own.
pub fn values_of_file(path: &std::path::Path) -> Vec<StoredValue> {
    #[derive(QueryableByName)]
    struct Row {
        #[diesel(sql_type = Text)]
        a: String,
        #[diesel(sql_type = Text)]
        b: String,
    }
    let mut file = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    let columns = "SELECT m.name AS a, c.name AS b FROM sqlite_master AS m
        JOIN pragma_table_info(m.name) AS c WHERE m.type = 'table'";
    let columns: Vec<Row> = sql_query(columns).load(&mut file).unwrap();
    let mut values = Vec::new();
    for Row { a: table, b: column } in columns {
        let select = format!(
            r#"SELECT '' AS a, CASE typeof("{column}") WHEN 'blob' THEN hex("{column}")
                ELSE coalesce(CAST("{column}" AS TEXT), '') END AS b FROM "{table}""#
        );
        let rows: Vec<Row> = sql_query(select).load(&mut file).unwrap();
        values.extend(rows.into_iter().map(|row| StoredValue {
            table: table.clone(),
            column: column.clone(),
            text: row.b,
        }));
    }
    values
}

/// Every value in every table of a database, and the comments.
pub async fn values_of_server(client: &Client) -> Vec<StoredValue> {
    let tables = "SELECT c.oid::regclass::text FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.relkind = 'r' AND n.nspname NOT IN ('pg_catalog', 'information_schema')
        UNION ALL SELECT 'pg_description'";
    let mut values = Vec::new();
    for row in client.query(tables, &[]).await.unwrap() {
        let table: String = row.get(0);
        let select = format!(
            "SELECT e.key, coalesce(e.value, '') FROM {table} AS t, jsonb_each_text(to_jsonb(t)) AS e"
        );
        values.extend(client.query(&select, &[]).await.unwrap().iter().map(|row| StoredValue {
            table: table.clone(),
            column: row.get(0),
            text: row.get(1),
        }));
    }
    values
}

/// Everything in Redis: names, and values as bytes.
pub async fn values_of_redis(url: &str) -> Vec<u8> {
    let client = redis::Client::open(url).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let names: Vec<Vec<u8>> =
        redis::cmd("KEYS").arg("*").query_async(&mut connection).await.unwrap();
    let mut all = Vec::new();
    for name in names {
        let kind: String =
            redis::cmd("TYPE").arg(&name).query_async(&mut connection).await.unwrap();
        let read = match &*kind {
            "string" => redis::cmd("GET").arg(&name).clone(),
            "hash" => redis::cmd("HGETALL").arg(&name).clone(),
            "set" => redis::cmd("SMEMBERS").arg(&name).clone(),
            "list" => redis::cmd("LRANGE").arg(&name).arg(0).arg(-1).clone(),
            "zset" => redis::cmd("ZRANGE").arg(&name).arg(0).arg(-1).clone(),
            other => panic!("a value of type {other}"),
        };
        all.extend_from_slice(&name);
        all.push(b'\n');
        add(&read.query_async(&mut connection).await.unwrap(), &mut all);
    }
    all
}

/// Collects what is published in Redis.
pub async fn published(url: &str) -> Arc<Mutex<Vec<u8>>> {
    let client = redis::Client::open(url).unwrap();
    let mut subscription = client.get_async_pubsub().await.unwrap();
    subscription.psubscribe("*").await.unwrap();
    let messages = Arc::new(Mutex::new(Vec::new()));
    let collected = Arc::clone(&messages);
    tokio::spawn(async move {
        let mut stream = subscription.into_on_message();
        while let Some(message) = stream.next().await {
            let mut collected = collected.lock().unwrap();
            collected.extend_from_slice(message.get_channel_name().as_bytes());
            collected.extend_from_slice(message.get_payload_bytes());
            collected.push(b'\n');
        }
    });
    messages
}

fn add(value: &redis::Value, all: &mut Vec<u8>) {
    match value {
        redis::Value::BulkString(bytes) => all.extend_from_slice(bytes),
        redis::Value::Array(values) | redis::Value::Set(values) => {
            values.iter().for_each(|value| add(value, all));
        }
        redis::Value::Map(pairs) => pairs.iter().for_each(|(name, value)| {
            add(name, all);
            add(value, all);
        }),
        other => all.extend_from_slice(format!("{other:?}").as_bytes()),
    }
    all.push(b'\n');
}

/// Captures what every thread of this process logs, at every level, also through the crate `log`. The process runs one
/// test ([`super::alone`]). The client of PostgreSQL is left out, as the documentation of `telemetry` says.
pub fn capture_all() -> Log {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(log.clone());
    subscriber.with_env_filter("trace,tokio_postgres=info").init();
    log
}

/// The names and labels of the metrics that this process records.
#[derive(Clone, Default)]
pub struct Metrics(Arc<Mutex<String>>);

impl Metrics {
    /// Becomes the recorder of this process.
    pub fn install() -> Self {
        let metrics = Self::default();
        metrics::set_global_recorder(metrics.clone()).unwrap();
        metrics
    }

    pub fn text(&self) -> String {
        self.0.lock().unwrap().clone()
    }

    fn add(&self, key: &Key) {
        *self.0.lock().unwrap() += &format!("{key}\n");
    }
}

impl Recorder for Metrics {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        self.add(key);
        Counter::noop()
    }
    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        self.add(key);
        Gauge::noop()
    }
    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        self.add(key);
        Histogram::noop()
    }
}
