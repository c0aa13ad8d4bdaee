//! What is SQLite's own: files, other processes, tables that are already there.

use std::time::{Duration, SystemTime};

use diesel::{
    Connection, QueryableByName, RunQueryDsl, SqliteConnection, connection::SimpleConnection,
    sql_query, sql_types::Text,
};
use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, NewKey, SqliteStore,
    backend::MigrateError,
    denial::InvalidKey,
    key::{KeyFormat, KeyHash},
    management::ManageError,
    record::{Budget, BudgetPeriod},
    store::{KeyStore, KeyUsage, LeaseRequest, UsageBatch},
};

use crate::support::some_user;

#[derive(QueryableByName)]
struct OneText {
    #[diesel(sql_type = Text)]
    text: String,
}

/// Another process at the same file.
struct Other(SqliteConnection);

impl Other {
    fn at(file: &std::path::Path) -> Self {
        let mut connection = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
        connection.batch_execute("PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = ON").unwrap();
        Self(connection)
    }

    fn run(&mut self, sql: &str) {
        self.0.batch_execute(sql).unwrap();
    }

    fn text(&mut self, sql: &str) -> String {
        sql_query(format!("SELECT CAST(({sql}) AS TEXT) AS text"))
            .get_result::<OneText>(&mut self.0)
            .unwrap()
            .text
    }
}

/// As SQLAlchemy makes them on SQLite: defaults in the ORM and not in the database.
const ORM_TABLES: &str = "
    CREATE TABLE users (
        id INTEGER NOT NULL, email VARCHAR(255) NOT NULL, hashed_password VARCHAR, role VARCHAR(5) NOT NULL,
        is_active BOOLEAN, created_at DATETIME NOT NULL, PRIMARY KEY (id), UNIQUE (email)
    );
    CREATE TABLE api_keys (
        id INTEGER NOT NULL, user_id INTEGER NOT NULL, name VARCHAR(100) NOT NULL,
        key_prefix VARCHAR(20) NOT NULL, key_hash VARCHAR(255) NOT NULL, is_active BOOLEAN,
        scopes JSON, is_unlimited BOOLEAN NOT NULL, total_requests INTEGER NOT NULL,
        total_tokens INTEGER NOT NULL, total_cost NUMERIC(10, 4) NOT NULL, expires_at DATETIME,
        created_at DATETIME NOT NULL, department VARCHAR, PRIMARY KEY (id),
        FOREIGN KEY(user_id) REFERENCES users (id)
    );
    INSERT INTO users (email, hashed_password, role, is_active, created_at)
    VALUES ('ada@example.com', 'x', 'ADMIN', 1, '2026-01-02 03:04:05.000000');";

/// From the newest migration to the oldest.
const DOWN: [&str; 5] = [
    include_str!("../../schema/sqlite/2026-11-26-000005_management/down.sql"),
    include_str!("../../schema/sqlite/2026-11-23-000004_budgets/down.sql"),
    include_str!("../../schema/sqlite/2026-11-23-000003_usage/down.sql"),
    include_str!("../../schema/sqlite/2026-11-22-000002_revisions/down.sql"),
    include_str!("../../schema/sqlite/2026-11-22-000001_users_and_keys/down.sql"),
];

fn orm_key(key: &str) -> String {
    let hash = KeyHash::bcrypt(key, 4).unwrap().expose_hash();
    format!(
        "INSERT INTO api_keys (user_id, name, key_prefix, key_hash, is_active, scopes, is_unlimited,
            total_requests, total_tokens, total_cost, expires_at, created_at, department)
        VALUES (1, 'from before', '{}', '{hash}', 1, '[\"chat\"]', 0, 7, 8, 1.25,
            '2099-01-01 00:00:00.000000', '2026-01-02 03:04:05.000000', 'research')",
        &key[..8]
    )
}

#[tokio::test]
async fn tables_of_an_orm_are_adopted_and_its_statements_go_on_working() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("app.db");
    let mut orm = Other::at(&file);
    orm.run(ORM_TABLES);
    orm.run(&orm_key("sk-12345-a-secret"));
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    store.migrate().await.unwrap();

    let scheme = KeyScheme::builder()
        .format(KeyFormat::structured("acme", "live").unwrap())
        .format(KeyFormat::first_chars(8).unwrap())
        .build()
        .unwrap();
    let authenticator = Authenticator::builder(store.clone()).scheme(scheme.clone()).build();
    let caller = authenticator.authenticate("sk-12345-a-secret").await.unwrap();
    assert_eq!(
        (caller.user().role.as_str(), caller.scopes()),
        ("ADMIN", ["chat".to_owned()].as_slice())
    );
    assert_eq!(caller.key().expires_at.unwrap().to_rfc3339(), "2099-01-01T00:00:00+00:00");
    assert_eq!(caller.key().usage.cost_micro_cents, 1_250_000);

    let manager = KeyManager::new(store).scheme(scheme);
    let user = manager.create_user("bob@example.com", "user").await.unwrap();
    let expiry = chrono::DateTime::from_timestamp(4_000_000_000, 0).unwrap();
    let issued = manager.issue(NewKey::new(user.id, "new").expires_at(expiry)).await.unwrap();
    let row = "SELECT expires_at || ' ' || (created_at LIKE '____-__-__ __:__:__.%') FROM api_keys WHERE name = 'new'";
    assert_eq!(orm.text(row), "2096-10-02 07:06:40.000000 1");
    orm.run(&orm_key("sk-67890-a-secret"));
    assert!(authenticator.authenticate("sk-67890-a-secret").await.is_ok());
    orm.run("UPDATE users SET is_active = 0 WHERE email = 'bob@example.com'");
    let denial = authenticator.authenticate(issued.expose_secret()).await.unwrap_err();
    assert!(matches!(denial, Denial::InvalidKey(InvalidKey::OwnerInactive)), "{denial}");

    let [later @ .., first] = DOWN;
    later.iter().for_each(|down| orm.run(down));
    let error = orm.0.transaction(|connection| connection.batch_execute(first)).unwrap_err();
    assert!(error.to_string().contains("adopted_tables_are_not_dropped"), "{error}");
    assert_eq!(orm.text("SELECT count(*) FROM api_keys"), "3");
    // No trigger is left that would fail without its table, and no column.
    orm.run("UPDATE users SET is_active = 0; DELETE FROM api_keys");
    assert_eq!(orm.text("SELECT count(*) FROM sqlite_master WHERE type = 'trigger'"), "0");
    let revisions = "SELECT count(*) FROM pragma_table_info('users') WHERE name LIKE 'api_key%'";
    assert_eq!(orm.text(revisions), "0");
}

#[tokio::test]
async fn going_down_takes_away_what_was_made() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    SqliteStore::open(&file).unwrap().migrate().await.unwrap();
    let mut other = Other::at(&file);
    // Tables, indexes, triggers.
    let left = "SELECT coalesce(group_concat(type || ' ' || name, ', '), '') FROM sqlite_master
        WHERE name NOT LIKE '%diesel%' AND name NOT LIKE 'sqlite_%'";
    let made = other.text(left);
    for thing in ["table api_key_changes", "table api_key_cache_secrets", "trigger api_key_note"] {
        assert!(made.split(", ").any(|made| made == thing), "{thing} in {made}");
    }
    for down in DOWN {
        other.run(down);
    }
    assert_eq!(other.text(left), "");
}

#[tokio::test]
async fn what_cannot_be_adopted_is_reported_column_by_column_and_nothing_is_changed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("app.db");
    let mut orm = Other::at(&file);
    orm.run("CREATE TABLE users (id CHAR(36) PRIMARY KEY, email TEXT); CREATE TABLE api_keys (id INTEGER, user_id CHAR(36), key_prefix TEXT)");
    let error = SqliteStore::open(&file).unwrap().migrate().await.unwrap_err();
    let MigrateError::NotAdoptable(faults) = &error else { panic!("{error:?}") };
    let named: Vec<_> =
        faults.iter().map(|fault| format!("{}.{}", fault.table, fault.column)).collect();
    assert_eq!(named, ["users.id", "api_keys.id", "api_keys.user_id", "api_keys.key_hash"]);
    assert_eq!(orm.text("SELECT count(*) FROM sqlite_master WHERE type = 'table'"), "2");
}

#[tokio::test]
async fn an_id_that_is_not_the_row_id_cannot_be_adopted() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("app.db");
    Other::at(&file).run("CREATE TABLE Users (id BIGINT PRIMARY KEY, email TEXT)");
    let error = SqliteStore::open(&file).unwrap().migrate().await.unwrap_err().to_string();
    assert!(error.contains("users.id must be INTEGER and the primary key"), "{error}");
}

#[tokio::test]
async fn a_migration_that_is_dropped_halfway_can_be_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let store = SqliteStore::open(&file).unwrap();
    let mut other = Other::at(&file);
    other.run("BEGIN IMMEDIATE");
    {
        let mut migration = std::pin::pin!(store.migrate());
        let context = &mut std::task::Context::from_waker(std::task::Waker::noop());
        assert!(migration.as_mut().poll(context).is_pending());
    }
    other.run("ROLLBACK");
    store.migrate().await.unwrap();
    assert_eq!(other.text("SELECT count(*) FROM __diesel_schema_migrations"), "5");
}

#[tokio::test]
async fn several_processes_migrate_a_file_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let stores: Vec<_> = (0..6).map(|_| SqliteStore::open(&file).unwrap()).collect();
    let migrations: Vec<_> = stores
        .into_iter()
        .map(|store| tokio::spawn(async move { store.migrate().await }))
        .collect();
    for migration in migrations {
        migration.await.unwrap().unwrap();
    }
    assert_eq!(Other::at(&file).text("SELECT count(*) FROM __diesel_schema_migrations"), "5");
}

#[tokio::test]
async fn several_processes_open_a_new_file_at_once() {
    for _ in 0..10 {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys.db");
        let opened = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..8).map(|_| scope.spawn(|| SqliteStore::open(&file))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        for store in opened {
            store.unwrap();
        }
    }
}

#[tokio::test]
async fn a_file_that_is_no_database_or_cannot_be_opened_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("notes.txt");
    std::fs::write(
        &file,
        "this is not a database, and long enough to be taken for a header of one",
    )
    .unwrap();
    let missing = folder.path().join("no/such/folder/keys.db");
    // Each connection would have a memory of its own: there is `in_memory` for that.
    let (memory, nothing) = (std::path::Path::new(":memory:"), std::path::Path::new(""));
    for path in [file.as_path(), folder.path(), &missing, memory, nothing] {
        assert!(SqliteStore::open(path).is_err(), "{path:?}");
    }
    assert!(std::fs::read_to_string(file).unwrap().starts_with("this is not"));
}

#[tokio::test]
async fn look_ups_go_on_while_another_process_writes_and_a_blocked_write_ends_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let store = SqliteStore::builder(&file).timeout(Duration::from_millis(300)).open().unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id, "k")).await.unwrap();
    let mut other = Other::at(&file);
    other.run("BEGIN IMMEDIATE");
    assert!(Authenticator::new(store).authenticate(issued.expose_secret()).await.is_ok());
    let Err(ManageError::Store(error)) = manager.revoke(&issued.record().id).await else {
        panic!()
    };
    assert!(error.is_transient(), "{error:?}");
    other.run("ROLLBACK");
    // The write that was given up may run now or have failed; a new one works.
    manager.revoke(&issued.record().id).await.unwrap();
}

async fn store_and_other(folder: &std::path::Path) -> (SqliteStore, Other) {
    let file = folder.join("app.db");
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    (store, Other::at(&file))
}

#[tokio::test]
async fn a_row_whose_totals_cannot_be_written_is_charged_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (store, mut other) = store_and_other(folder.path()).await;
    let manager = KeyManager::new(store.clone());
    let user = some_user(store.clone()).await;
    let budget = Budget { limit_cents: 1, period: BudgetPeriod::Total };
    let key = manager.issue(NewKey::new(user, "k").budget(budget)).await.unwrap();
    other.run(
        "CREATE TRIGGER no_totals BEFORE UPDATE OF total_tokens ON api_keys
        BEGIN SELECT RAISE(ABORT, 'not these'); END",
    );
    let id = key.record().id.clone();
    let lease = async |sequence, amount| {
        let mut ask = LeaseRequest::new(id.clone(), "node", sequence, amount);
        ask.needed_micro_cents = amount;
        store.lease(&ask).await.unwrap().amount_micro_cents
    };
    assert_eq!(lease(1, 600_000).await, 600_000);
    let mut usage = KeyUsage::new(id.clone());
    (usage.cost_micro_cents, usage.settled_micro_cents) = (600_000, 600_000);
    let mut batch = UsageBatch::new("node", 1, SystemTime::now());
    batch.entries.push(usage);
    store.record_usage(&batch).await.unwrap();
    assert_eq!(lease(2, 400_001).await, 0);
    assert_eq!(lease(3, 400_000).await, 400_000);
}

#[tokio::test]
async fn the_id_of_a_key_that_is_gone_is_not_given_again() {
    let folder = tempfile::tempdir().unwrap();
    let (store, mut other) = store_and_other(folder.path()).await;
    let manager = KeyManager::new(store.clone());
    let user = some_user(store.clone()).await;
    let gone = manager.issue(NewKey::new(user.clone(), "k")).await.unwrap();
    other.run("DELETE FROM api_keys");
    let new = manager.issue(NewKey::new(user, "k")).await.unwrap();
    assert_ne!(new.record().id, gone.record().id);
}

/// The modes of the database's files, by what their names end in.
#[cfg(unix)]
fn modes(path: &std::path::Path) -> Vec<(&'static str, u32)> {
    use std::os::unix::fs::PermissionsExt;
    let of = |suffix| {
        let file = format!("{}{suffix}", path.display());
        let metadata = std::fs::metadata(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        (suffix, metadata.permissions().mode() & 0o777)
    };
    ["", "-wal", "-shm"].map(of).into()
}

#[cfg(unix)]
#[tokio::test]
async fn a_new_file_is_for_its_owner_alone_and_an_existing_one_keeps_its_mode() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    // The umask of this process is what the test was started with: usually 022, under which files are 0644.
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let plain = path("plain.db");
    symlink("target.db", path("link.db")).unwrap();
    let uri = format!("file://{}/u%72i%20x.db?mode=rwc", folder.path().display());
    for (opened, file) in [
        (plain.clone(), plain),
        (path("link.db"), path("target.db")),
        (uri.into(), path("uri x.db")),
    ] {
        let store = SqliteStore::open(&opened).unwrap();
        store.migrate().await.unwrap();
        let private = [("", 0o600), ("-wal", 0o600), ("-shm", 0o600)];
        assert_eq!(modes(&file), private, "{opened:?}");
    }

    let shared = path("shared.db");
    std::fs::write(&shared, "").unwrap();
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o640)).unwrap();
    let store = SqliteStore::open(&shared).unwrap();
    store.migrate().await.unwrap();
    assert_eq!(modes(&shared), [("", 0o640), ("-wal", 0o640), ("-shm", 0o640)]);
    let in_a_missing_folder = SqliteStore::open(path("none/keys.db"));
    assert!(in_a_missing_folder.is_err());
}
