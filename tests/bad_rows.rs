//! A row that can't be decoded fails its key alone, closed, with a log line that names the row.

mod support;

use std::sync::{Arc, Mutex};

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use support::servers::Postgres;
use tower_api_key::*;
use tracing_subscriber::fmt::MakeWriter;

/// What was logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn take(&self) -> String {
        String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Breaks one column after the other of the row of `broken`, and asks for it and for `whole`.
async fn each_column_is_named<S: KeyRepository + Clone>(
    store: S,
    columns: &[(&str, &str)],
    update: impl AsyncFn(&str),
) {
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let broken = manager.issue(NewKey::new(user.clone(), "broken")).await.unwrap();
    let whole = manager.issue(NewKey::new(user, "whole")).await.unwrap();
    let authenticator = Authenticator::new(store.clone());
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_writer(log.clone()).with_ansi(false).finish();
    let _guard = tracing::subscriber::set_default(subscriber);

    let id = broken.record().id.clone();
    for (column, value) in columns {
        // A copy of the row keeps what it was.
        update(&format!("CREATE TABLE kept AS SELECT * FROM api_keys WHERE id = {id}")).await;
        update(&format!("UPDATE api_keys SET {column} = {value} WHERE id = {id}")).await;
        match authenticator.authenticate(broken.expose_secret()).await {
            Err(denial @ Denial::BadRow(_)) => assert_eq!(denial.status(), 500),
            other => panic!("{column} = {value}: {other:?}"),
        }
        let line = log.take();
        assert!(line.contains("ERROR"), "{line}");
        assert!(
            line.contains(&format!("api_keys row {id}, column {column}: ")),
            "{column}: {line}"
        );
        assert!(!line.contains("tak_live_") && !line.contains("hunter2"), "{line}");
        assert_eq!(store.find_key(&id).await.unwrap_err().kind(), StoreErrorKind::BadRow);
        assert!(authenticator.authenticate(whole.expose_secret()).await.is_ok());
        let restore =
            format!("UPDATE api_keys SET {column} = (SELECT {column} FROM kept) WHERE id = {id}");
        update(&restore).await;
        update("DROP TABLE kept").await;
        assert!(authenticator.authenticate(broken.expose_secret()).await.is_ok(), "{column}");
    }
}

const IN_BOTH: [(&str, &str); 8] = [
    ("key_hash", "'hunter2'"),
    ("key_hash", "'$2b$31$2iRmIfOV7sNRzgVr8qaLv.5HmcHtPJlNT174WrPSHmwhjETXs6PRC'"),
    ("key_hash", "'sha256$beef'"),
    ("budget_type", "'hourly'"),
    ("rate_limit_per_day", "-1"),
    ("allowed_ips", "'[\"10.0.0.0/33\"]'"),
    ("allowed_endpoints", "'[\"v1/chat\"]'"),
    ("scopes", "'[1]'"),
];

#[tokio::test]
async fn in_postgresql() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let client = server.client().await;
    let mut columns = IN_BOTH.to_vec();
    columns.push(("permissions", "'{\"read\": \"yes\"}'"));
    columns.push(("allowed_models", "'\"all\"'"));
    each_column_is_named(store, &columns, async |sql: &str| {
        client.batch_execute(sql).await.unwrap()
    })
    .await;
}

#[tokio::test]
async fn in_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    let mut columns = IN_BOTH.to_vec();
    columns.extend([
        ("permissions", "'not json'"),
        ("metadata", "'{'"),
        ("expires_at", "'tomorrow'"),
        ("is_active", "'maybe'"),
        ("rate_limit_per_hour", "1.5"),
        ("allowed_models", "x'00'"),
    ]);
    // Another process writes to the file.
    let other = Mutex::new(SqliteConnection::establish(file.to_str().unwrap()).unwrap());
    each_column_is_named(store, &columns, async |sql: &str| {
        other.lock().unwrap().batch_execute(&format!("PRAGMA busy_timeout = 5000; {sql}")).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_text_in_sqlite_that_is_not_utf_8_is_a_bad_row_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    let user = store.insert_user("ada@example.com", "user").await.unwrap().id;
    let issued = KeyManager::new(store.clone()).issue(NewKey::new(user, "k")).await.unwrap();
    let mut other = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
    other.batch_execute("UPDATE api_keys SET name = x'00ff'").unwrap();
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_writer(log.clone()).with_ansi(false).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let answer = Authenticator::new(store).authenticate(issued.expose_secret()).await;
    assert!(matches!(answer, Err(Denial::BadRow(_))), "{answer:?}");
    assert!(log.take().contains(&issued.record().prefix));
}

#[tokio::test]
async fn a_bad_row_beside_a_good_one_is_logged_and_does_not_stop_it() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let user = store.insert_user("ada@example.com", "user").await.unwrap();
    for n in 0..2 {
        let hash = KeyHash::bcrypt(&format!("sk-proj-{n}"), 4).unwrap();
        let key = StoredKey::new(KeyRecord::new(0, "sk-proj-", user.clone()), hash);
        store.insert_key(&key).await.unwrap();
    }
    let break_first = "UPDATE api_keys SET budget_type = 'hourly' WHERE id = 1";
    server.client().await.batch_execute(break_first).await.unwrap();
    let scheme = KeyScheme::builder().format(KeyFormat::first_chars(8).unwrap()).build().unwrap();
    let authenticator = Authenticator::builder(store).scheme(scheme).build();
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt().with_writer(log.clone()).with_ansi(false).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    assert!(authenticator.authenticate("sk-proj-1").await.is_ok());
    assert!(log.take().contains("api_keys row 1, column budget_type"));
    // It may be the broken one, so that it can't be called wrong.
    assert!(matches!(authenticator.authenticate("sk-proj-0").await, Err(Denial::BadRow(_))));
    assert!(matches!(authenticator.authenticate("sk-proj-2").await, Err(Denial::BadRow(_))));
}
