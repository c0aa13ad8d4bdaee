//! The text of a `StoreError`: the cause, what to do where the schema lacks something, and no secret.

use std::{
    error::Error,
    time::{Duration, SystemTime},
};

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, NewKey, PostgresStore, SqliteStore, StoreError,
    error::StoreErrorKind,
    key::KeyHash,
    record::{KeyId, KeyRecord, User},
    store::{Attribution, KeyRepository, KeyStore, KeyUsage, StoredKey, UsageBatch},
};

use crate::support::{log::capture, servers::Postgres, some_user};

const HINT: &str = "; call migrate() of the store";

/// What a look-up fails with, and that the cause is in its text once.
async fn denied(store: impl KeyStore) -> String {
    let node = Authenticator::new(store);
    let key = KeyScheme::default().mint().unwrap();
    let denial = node.authenticate(key.expose_secret()).await.unwrap_err();
    let Denial::Unavailable(error) = denial else { panic!("{denial:?}") };
    assert_eq!(error.kind(), StoreErrorKind::Rejected, "{error:?}");
    let cause = error.source().expect("it keeps its cause").to_string();
    assert_eq!(error.to_string().matches(&cause).count(), 1, "{error}");
    error.to_string()
}

/// A migrated database in a file, altered by `sql`.
fn alter(file: &std::path::Path, sql: &str) {
    let mut connection = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
    connection.batch_execute(&format!("PRAGMA busy_timeout = 20000; {sql}")).unwrap();
}

#[tokio::test]
async fn sqlite_errors_name_the_missing_table_or_column_and_migrate() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let (log, _guard) = capture();
    let missing = denied(SqliteStore::open(&file).unwrap()).await;
    let table = "the key store rejected the request: no such table: api_key";
    assert!(missing.starts_with(table) && missing.ends_with(HINT), "{missing}");
    // Once in the line that is logged.
    let logged = log.lines().into_iter().find(|line| line.contains("can't be checked")).unwrap();
    assert_eq!(logged.matches("no such table").count(), 1, "{logged}");

    SqliteStore::open(&file).unwrap().migrate().await.unwrap();
    alter(&file, "ALTER TABLE api_keys RENAME COLUMN expires_at TO ends_at");
    let missing = denied(SqliteStore::open(&file).unwrap()).await;
    assert!(missing.contains("no such column: k.expires_at; call migrate()"), "{missing}");
}

#[tokio::test]
async fn postgres_errors_name_migrate_where_the_schema_lacks_something_in_any_language() {
    for server in [Some(Postgres::start()), Postgres::in_german()].into_iter().flatten() {
        let store = || PostgresStore::new(&server.url()).unwrap();
        let missing = denied(store()).await;
        assert!(missing.starts_with("the key store rejected the request: "), "{missing}");
        assert!(missing.contains("api_keys") && missing.ends_with(HINT), "{missing}");

        store().migrate().await.unwrap();
        let admin = server.client().await;
        let rename = "ALTER TABLE api_keys RENAME COLUMN expires_at TO ends_at";
        admin.batch_execute(rename).await.unwrap();
        let missing = denied(store()).await;
        assert!(missing.contains("expires_at") && missing.ends_with(HINT), "{missing}");
        admin
            .batch_execute("ALTER TABLE api_keys RENAME COLUMN ends_at TO expires_at")
            .await
            .unwrap();

        // What is missing here is a right.
        admin.batch_execute("CREATE ROLE reader LOGIN").await.unwrap();
        let url = server.url().replacen("app@", "reader@", 1);
        let denied = denied(PostgresStore::new(&url).unwrap()).await;
        let is_named = denied.contains("users") || denied.contains("api_keys");
        assert!(is_named && !denied.contains("migrate()"), "{denied}");
    }
}

#[tokio::test]
async fn usage_that_a_missing_table_keeps_from_being_written_names_it_in_the_log() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let user = some_user(store.clone()).await;
    let issued = KeyManager::new(store.clone()).issue(NewKey::new(user, "k")).await.unwrap();
    server.client().await.batch_execute("DROP TABLE api_key_usage CASCADE").await.unwrap();
    let mut batch = UsageBatch::new("a writer", 1, SystemTime::now());
    let mut usage = KeyUsage::new(issued.record().id.clone());
    usage.requests = 1;
    batch.entries = vec![usage];
    let error = store.record_usage(&batch).await.unwrap_err().to_string();
    // As data from api_key_try, with its SQLSTATE.
    assert!(error.contains("42P01") && error.ends_with(HINT), "{error}");
}

/// Writes that the database rejects.
async fn rejected_writes<R: KeyRepository>(store: &R) -> (Vec<StoreError>, Vec<String>) {
    let user = store.insert_user("ada@example.com", "user", &Attribution::default()).await.unwrap();
    let key = KeyScheme::default().mint().unwrap();
    let bcrypt = KeyHash::bcrypt("another key", 4).unwrap();
    let mut errors = Vec::new();
    let mut insert = async |id: &str, hash: &KeyHash, user: &User| {
        let record = KeyRecord::new(0, id, user.clone());
        let inserted =
            store.insert_key(&StoredKey::new(record, hash.clone()), &Attribution::default()).await;
        inserted.map_or_else(|error| errors.push(error), |_| {});
    };
    insert(key.lookup_id(), key.hash(), &user).await;
    insert(key.lookup_id(), key.hash(), &user).await;
    insert("another", &bcrypt, &User::new(4711, "")).await;
    insert(&"long".repeat(10_000), &bcrypt, &user).await;
    let secrets = vec![
        key.expose_secret()[20..].to_owned(),
        key.hash().expose_hash().replace("sha256$", ""),
        bcrypt.expose_hash()[7..].to_owned(),
    ];
    (errors, secrets)
}

fn assert_hides_all(errors: &[StoreError], secrets: &[String]) {
    for error in errors {
        let mut cause: Option<&dyn Error> = Some(error);
        while let Some(shown) = cause {
            for text in [shown.to_string(), format!("{shown:?}")] {
                for secret in secrets {
                    assert!(!text.contains(secret), "{text}");
                }
            }
            cause = shown.source();
        }
    }
}

#[tokio::test]
async fn no_error_of_a_database_shows_a_key_or_a_hash() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let sqlite = SqliteStore::open(&file).unwrap();
    sqlite.migrate().await.unwrap();
    // Triggers and constraints of another service.
    alter(
        &file,
        "CREATE TRIGGER theirs BEFORE INSERT ON api_keys WHEN length(NEW.key_prefix) > 1000
         BEGIN SELECT raise(ABORT, 'too long'); END",
    );
    let (errors, secrets) = rejected_writes(&sqlite).await;
    assert_eq!(errors.len(), 3, "{errors:?}");
    assert_hides_all(&errors, &secrets);

    let server = Postgres::start();
    let postgres = PostgresStore::new(&server.url()).unwrap();
    postgres.migrate().await.unwrap();
    let check = "ALTER TABLE api_keys ADD CHECK (length(key_prefix) < 1000)";
    server.client().await.batch_execute(check).await.unwrap();
    let (errors, secrets) = rejected_writes(&postgres).await;
    assert_eq!(errors.len(), 3, "{errors:?}");
    assert_hides_all(&errors, &secrets);
}

#[tokio::test]
async fn no_error_of_a_connection_shows_the_password_of_its_url() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let unreachable = format!("postgres://app:hunter2@127.0.0.1:{port}/app?sslmode=disable");
    let server = Postgres::start();
    let no_such_role = server.url().replacen("app@", "nobody:hunter2@", 1);
    for url in [unreachable, no_such_role] {
        let store = PostgresStore::builder(&url).connect_timeout(Duration::from_secs(1));
        let error = store.build().unwrap().find_key(&KeyId::from(1)).await.unwrap_err();
        assert!(error.to_string().contains(": "), "{error}");
        assert_hides_all(&[error], &["hunter2".to_owned()]);
    }
}
