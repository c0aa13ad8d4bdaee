//! A row that can't be decoded fails its key alone, closed, with a log line that names the row.

use std::sync::Mutex;

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, NewKey, PostgresStore, SqliteStore, StoreError,
    authenticator::AuthenticatorBuilder,
    error::StoreErrorKind,
    key::{KeyFormat, KeyHash},
    record::{KeyId, KeyRecord},
    store::{Attribution, KeyRepository, KeyStore, ListKeys, StoredKey},
};

use crate::support::{self, log::capture, servers::Postgres};

/// An authenticator that asks its store each time.
fn asking(store: impl KeyStore) -> AuthenticatorBuilder {
    Authenticator::builder(store).cache_capacity(0)
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
    let authenticator = asking(store.clone()).build();
    let (log, _guard) = capture();

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
        lists_the_others_and_gets_past(&store, &id, &whole.record().id, column).await;
        assert!(authenticator.authenticate(whole.expose_secret()).await.is_ok());
        let restore =
            format!("UPDATE api_keys SET {column} = (SELECT {column} FROM kept) WHERE id = {id}");
        update(&restore).await;
        update("DROP TABLE kept").await;
        assert!(authenticator.authenticate(broken.expose_secret()).await.is_ok(), "{column}");
    }
}

/// The page that has the broken key alone leads on to the next one.
async fn lists_the_others_and_gets_past<S: KeyRepository>(
    store: &S,
    broken: &KeyId,
    whole: &KeyId,
    column: &str,
) {
    let page = store.list_keys(&ListKeys::default()).await.unwrap();
    let [key] = page.keys.as_slice() else { panic!("{column}: {page:?}") };
    let [unreadable] = page.unreadable.as_slice() else { panic!("{column}: {page:?}") };
    assert_eq!((&key.id, &unreadable.id, page.next), (whole, broken, None));
    assert_eq!(unreadable.error.kind(), StoreErrorKind::BadRow);
    let text = unreadable.error.to_string();
    assert!(text.contains(&format!("api_keys row {broken}")) && text.contains(column), "{text}");
    let mut one = ListKeys::default().limit(1);
    let first = store.list_keys(&one).await.unwrap();
    assert_eq!((first.keys.len(), first.unreadable.len()), (0, 1));
    one.after = first.next;
    assert!(one.after.is_some());
    let second = store.list_keys(&one).await.unwrap();
    assert_eq!((&second.keys[0].id, second.next), (whole, None));
}

const IN_BOTH: [(&str, &str); 8] = [
    ("key_hash", "'hunter2'"),
    ("key_hash", "'$2b$31$2iRmIfOV7sNRzgVr8qaLv.5HmcHtPJlNT174WrPSHmwhjETXs6PRC'"),
    ("key_hash", "'sha256$beef'"),
    ("budget_limit_cents", "-2"),
    ("rate_limit_per_day", "-2"),
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
    columns.push(("permissions", "'[\"read\", 1]'"));
    columns.push(("allowed_models", "'\"all\"'"));
    // No flag is set, but an empty allow-list would allow everything.
    columns.push(("allowed_ips", "'{\"10.0.0.1\": false}'"));
    columns.push(("allowed_models", "'{\"small\": true}'"));
    // Beyond what a number can be in Rust.
    columns.push(("metadata", "'1e400'"));
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
async fn bytes_in_sqlite_where_a_text_or_a_number_should_be_are_a_bad_row_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    let user =
        store.insert_user("ada@example.com", "user", &Attribution::default()).await.unwrap().id;
    let issued = KeyManager::new(store.clone()).issue(NewKey::new(user, "k")).await.unwrap();
    let mut other = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
    // The feed deletes old changes.
    other.batch_execute("PRAGMA busy_timeout = 5000").unwrap();
    let (log, _guard) = capture();
    let authenticator = asking(store.clone()).build();
    for (broken, whole) in [
        ("name = x'00ff'", "name = 'k'"),
        ("rate_limit_per_day = x'01'", "rate_limit_per_day = NULL"),
        ("is_active = x'01'", "is_active = 1"),
    ] {
        other.batch_execute(&format!("UPDATE api_keys SET {broken}")).unwrap();
        let answer = authenticator.authenticate(issued.expose_secret()).await;
        assert!(matches!(answer, Err(Denial::BadRow(_))), "{broken}: {answer:?}");
        assert!(log.take().contains(&issued.record().prefix));
        let page = store.list_keys(&ListKeys::default()).await.unwrap();
        assert_eq!((page.keys.len(), page.unreadable[0].id.as_i64()), (0, Some(1)), "{broken}");
        other.batch_execute(&format!("UPDATE api_keys SET {whole}")).unwrap();
    }
}

#[tokio::test]
async fn a_bad_row_beside_a_good_one_is_logged_and_does_not_stop_it() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let user = store.insert_user("ada@example.com", "user", &Attribution::default()).await.unwrap();
    for n in 0..2 {
        let hash = KeyHash::bcrypt(&format!("sk-proj-{n}"), 4).unwrap();
        let key = StoredKey::new(KeyRecord::new(0, "sk-proj-", user.clone()), hash);
        store.insert_key(&key, &Attribution::default()).await.unwrap();
    }
    let break_first =
        "UPDATE api_keys SET budget_type = 'hourly', budget_limit_cents = 5 WHERE id = 1";
    server.client().await.batch_execute(break_first).await.unwrap();
    let scheme = KeyScheme::builder().format(KeyFormat::first_chars(8).unwrap()).build().unwrap();
    let authenticator = asking(store).scheme(scheme).build();
    let (log, _guard) = capture();
    assert!(authenticator.authenticate("sk-proj-1").await.is_ok());
    assert!(log.take().contains("api_keys row 1, column budget_type"));
    // It may be the broken one, so that it can't be called wrong.
    assert!(matches!(authenticator.authenticate("sk-proj-0").await, Err(Denial::BadRow(_))));
    assert!(matches!(authenticator.authenticate("sk-proj-2").await, Err(Denial::BadRow(_))));
}

#[tokio::test]
async fn a_bad_row_is_logged_once_a_minute_and_each_request_is_a_500() {
    let node = support::scripted::Node::over(support::scripted::Scripted::new());
    let (one, other) = (node.store.issue(1).await, node.store.issue(2).await);
    node.store.fail_with(StoreError::bad_row("api_keys row 1, column scopes: unusable"));
    let (log, _guard) = capture();
    let lines = || log.take().lines().filter(|line| line.contains("ERROR")).count();
    for _ in 0..50 {
        assert_eq!(node.ask(&one.key).await.0, 500);
    }
    assert_eq!(lines(), 1);
    assert_eq!(node.ask(&other.key).await.0, 500);
    assert_eq!(lines(), 1, "of another key");
    node.seconds(61);
    for _ in 0..50 {
        assert_eq!(node.ask(&one.key).await.0, 500);
    }
    assert_eq!(lines(), 1);
}
