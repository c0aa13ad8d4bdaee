//! Which changes in an SQLite file a node receives, from any writer.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use futures_util::StreamExt;
use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, NewKey, SqliteStore,
    clock::{Clock, ManualClock},
    denial::InvalidKey,
    key::{KeyFormat, KeyHash},
    store::{Attribution, Change, KeyRepository, KeyStore},
};

use crate::support::feed::{FeedRecorder, in_sync, within};

/// A migrated file and another process at it, with the settings of the `sqlite3` shell.
struct Database {
    folder: tempfile::TempDir,
    store: SqliteStore,
    shell: SqliteConnection,
}

struct Key {
    id: i64,
    prefix: String,
    secret: String,
    owner: i64,
}

const NOTIFIED_WITHIN: Duration = Duration::from_millis(700);

async fn database() -> Database {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path().join("keys.db")).unwrap();
    store.migrate().await.unwrap();
    let shell = shell(&folder.path().join("keys.db"));
    Database { folder, store, shell }
}

fn shell(file: &Path) -> SqliteConnection {
    let mut connection = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
    connection.batch_execute("PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = OFF").unwrap();
    connection
}

impl Database {
    async fn key(&self) -> Key {
        let manager = KeyManager::new(self.store.clone());
        let email = format!("{:?}@example.com", std::time::Instant::now()).replace(' ', "");
        let owner = manager.create_user(&email, "user").await.unwrap().id;
        let issued = manager.issue(NewKey::new(owner.clone(), "k").scopes(["read"])).await.unwrap();
        Key {
            id: issued.record().id.as_i64().unwrap(),
            prefix: issued.record().prefix.clone(),
            secret: issued.expose_secret().to_owned(),
            owner: owner.as_i64().unwrap(),
        }
    }

    fn run(&mut self, sql: &str) {
        self.shell.batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}

async fn denial_of(node: &Authenticator, key: &Key) -> Option<InvalidKey> {
    match node.authenticate(&key.secret).await {
        Ok(_) => None,
        Err(Denial::InvalidKey(reason)) => Some(reason),
        Err(other) => panic!("{other:?}"),
    }
}

async fn has_cached(node: &Authenticator, key: &Key) {
    node.authenticate(&key.secret).await.unwrap();
    in_sync(node).await;
    assert_eq!(denial_of(node, key).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_another_process_changes_reaches_a_node_that_has_it_in_its_cache() {
    let mut db = database().await;
    let node = Authenticator::new(db.store.clone());
    let other_hash = KeyHash::bcrypt("tak_live_another", 4).unwrap().expose_hash();
    for (change, expected) in [
        ("UPDATE api_keys SET is_active = 0 WHERE id = $KEY", InvalidKey::Revoked),
        (
            "UPDATE api_keys SET expires_at = '2020-01-01 00:00:00' WHERE id = $KEY",
            InvalidKey::Expired,
        ),
        ("UPDATE api_keys SET key_hash = '$HASH' WHERE id = $KEY", InvalidKey::WrongSecret),
        ("UPDATE api_keys SET key_prefix = 'moved' || id WHERE id = $KEY", InvalidKey::Unknown),
        ("UPDATE users SET is_active = 0 WHERE id = $OWNER", InvalidKey::OwnerInactive),
        ("DELETE FROM api_keys WHERE id = $KEY", InvalidKey::Unknown),
        // Without foreign keys, as in the shell.
        ("DELETE FROM users WHERE id = $OWNER", InvalidKey::Unknown),
        (
            "PRAGMA foreign_keys = ON; DELETE FROM api_keys WHERE user_id = $OWNER;
                DELETE FROM users WHERE id = $OWNER; PRAGMA foreign_keys = OFF",
            InvalidKey::Unknown,
        ),
        (
            "REPLACE INTO api_keys (id, user_id, key_prefix, key_hash, is_active)
                SELECT id, user_id, key_prefix, key_hash, 0 FROM api_keys WHERE id = $KEY",
            InvalidKey::Revoked,
        ),
        (
            "REPLACE INTO api_keys (id, user_id, key_prefix, key_hash)
                SELECT id, user_id, 'replaced', key_hash FROM api_keys WHERE id = $KEY",
            InvalidKey::Unknown,
        ),
        (
            "REPLACE INTO users (id, email, is_active) SELECT id, email, 0 FROM users WHERE id = $OWNER",
            InvalidKey::OwnerInactive,
        ),
        (
            "BEGIN; SAVEPOINT a; DELETE FROM api_keys WHERE id = $KEY; ROLLBACK TO a;
            UPDATE api_keys SET is_active = 0 WHERE id = $KEY; COMMIT",
            InvalidKey::Revoked,
        ),
    ] {
        let key = db.key().await;
        has_cached(&node, &key).await;
        let change = change
            .replace("$KEY", &key.id.to_string())
            .replace("$OWNER", &key.owner.to_string())
            .replace("$HASH", &other_hash);
        db.run(&change);
        let is_denied = async || denial_of(&node, &key).await == Some(expected);
        let took = within(NOTIFIED_WITHIN, &change, is_denied).await;
        println!("{took:?} {change}");
    }

    let key = db.key().await;
    has_cached(&node, &key).await;
    db.run(&format!("UPDATE api_keys SET scopes = '[\"write\"]' WHERE id = {}", key.id));
    db.run(&format!("UPDATE users SET role = 'admin' WHERE id = {}", key.owner));
    within(NOTIFIED_WITHIN, "the new scopes and role", async || {
        let caller = node.authenticate(&key.secret).await.unwrap();
        caller.scopes() == ["write"] && caller.user().role == "admin"
    })
    .await;

    // SQLite has no TRUNCATE: a DELETE of everything runs the triggers.
    let (a, b) = (db.key().await, db.key().await);
    has_cached(&node, &a).await;
    has_cached(&node, &b).await;
    db.run("DELETE FROM api_keys");
    for key in [a, b] {
        within(NOTIFIED_WITHIN, "the end", async || denial_of(&node, &key).await.is_some()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_store_at_the_same_file_and_this_one_are_received_too() {
    let db = database().await;
    let file = db.folder.path().join("keys.db");
    let (a, b) = (db.store.clone(), SqliteStore::open(&file).unwrap());
    let nodes = [Authenticator::new(a.clone()), Authenticator::new(b.clone())];
    for store in [&a, &b] {
        let key = db.key().await;
        for node in &nodes {
            has_cached(node, &key).await;
        }
        store.revoke_key(&key.id.into(), &Attribution::default()).await.unwrap();
        for node in &nodes {
            within(NOTIFIED_WITHIN, "the revoke", async || denial_of(node, &key).await.is_some())
                .await;
        }
    }
    let memory = SqliteStore::in_memory().unwrap();
    memory.migrate().await.unwrap();
    let manager = KeyManager::new(memory.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id, "k")).await.unwrap();
    let node = Authenticator::new(memory);
    node.authenticate(issued.expose_secret()).await.unwrap();
    in_sync(&node).await;
    node.authenticate(issued.expose_secret()).await.unwrap();
    manager.revoke(&issued.record().id).await.unwrap();
    let is_denied = async || node.authenticate(issued.expose_secret()).await.is_err();
    within(NOTIFIED_WITHIN, "the revoke in memory", is_denied).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_and_columns_of_others_say_nothing_and_every_column_of_a_decision_does() {
    let mut db = database().await;
    let key = db.key().await;
    db.run(
        "ALTER TABLE api_keys ADD COLUMN department TEXT; ALTER TABLE users ADD COLUMN phone TEXT",
    );
    let recorder = FeedRecorder::listen(db.store.changes(SystemTime::now()));
    recorder.all().await;
    for nothing in [
        "UPDATE api_keys SET total_requests = total_requests + 1, total_tokens = 5, total_cost = 1.5",
        "UPDATE api_keys SET last_used_at = '2026-01-01 00:00:00', updated_at = '2026-01-01 00:00:00'",
        "UPDATE api_keys SET fast_hash = 'x', fast_hash_of = key_hash",
        "UPDATE api_keys SET previous_fast_hash = 'x', previous_fast_hash_of = 'y'",
        "UPDATE api_keys SET previous_last_used_at = '2026-01-01 00:00:00'",
        "UPDATE api_keys SET department = 'research'; UPDATE users SET phone = '1'",
        "UPDATE api_keys SET name = name, is_active = is_active, scopes = scopes, key_hash = key_hash",
        "UPDATE users SET email = email, role = role, is_active = is_active",
        "BEGIN; UPDATE api_keys SET is_active = 0; ROLLBACK",
    ] {
        db.run(nothing);
    }
    assert_eq!(recorder.all().await, []);
    let prefix = format!("prefix {}", key.prefix);
    for column in [
        "name = 'x'",
        "key_hash = 'x'",
        "is_active = 0",
        "permissions = '[\"x\"]'",
        "scopes = '[]'",
        "rate_limit_per_minute = 1",
        "rate_limit_per_hour = 1",
        "rate_limit_per_day = 1",
        "allowed_models = '[\"x\"]'",
        "allowed_endpoints = '[\"/x\"]'",
        "allowed_ips = '[\"::1\"]'",
        "is_unlimited = 1",
        "budget_limit_cents = 1",
        "budget_type = 'daily'",
        "expires_at = '2026-01-01'",
        "not_before = '2026-01-01'",
        "description = 'x'",
        "created_by = 'x'",
        "created_by_key = 1",
        "revoked_at = '2026-01-01'",
        "revoked_by = 'x'",
        "revoke_reason = 'x'",
        "previous_key_hash = 'x'",
        "previous_expires_at = '2026-01-01'",
        "metadata = '{}'",
        "user_id = 77",
        "id = id + 1000",
    ] {
        db.run(&format!("UPDATE api_keys SET {column} WHERE key_prefix = '{}'", key.prefix));
        assert_eq!(recorder.take().await, std::slice::from_ref(&prefix), "{column}");
    }
    for column in ["email = 'x'", "role = 'x'", "is_active = 0"] {
        db.run(&format!("UPDATE users SET {column} WHERE id = {}", key.owner));
        assert_eq!(recorder.take().await, [format!("owner {}", key.owner)], "{column}");
    }
    // Each lookup id that the row has before or after: once, although it is the id of both secrets.
    let same = format!("UPDATE api_keys SET previous_key_prefix = '{}'", key.prefix);
    db.run(&same);
    assert_eq!(recorder.take().await, std::slice::from_ref(&prefix));
    for (change, ids) in [
        ("key_prefix = 'moved'", vec![&*key.prefix, "moved"]),
        ("previous_key_prefix = 'before'", vec![&*key.prefix, "before", "moved"]),
        ("name = 'y'", vec!["before", "moved"]),
        ("previous_key_prefix = NULL", vec!["before", "moved"]),
        ("key_prefix = x'ff00'", vec!["FF00", "moved"]),
    ] {
        db.run(&format!("UPDATE api_keys SET {change}"));
        let mut expected: Vec<_> = ids.iter().map(|id| format!("prefix {id}")).collect();
        expected.sort();
        assert_eq!(recorder.take().await, expected, "{change}");
    }
    db.run("UPDATE api_keys SET key_prefix = 'a', previous_key_prefix = 'b'");
    recorder.take().await;
    for gone in [
        "REPLACE INTO api_keys (id, user_id, key_prefix, key_hash, previous_key_prefix)
            SELECT id, user_id, key_prefix, key_hash, previous_key_prefix FROM api_keys",
        "DELETE FROM api_keys",
    ] {
        db.run(gone);
        assert_eq!(recorder.take().await, ["prefix a", "prefix b"], "{gone}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_id_of_a_user_who_was_deleted_is_not_given_again() {
    let mut db = database().await;
    let key = db.key().await;
    let node = Authenticator::new(db.store.clone());
    has_cached(&node, &key).await;
    db.run(&format!(
        "PRAGMA foreign_keys = ON; DELETE FROM api_keys; DELETE FROM users WHERE id = {};
        PRAGMA foreign_keys = OFF",
        key.owner
    ));
    within(NOTIFIED_WITHIN, "the end", async || denial_of(&node, &key).await.is_some()).await;
    let next = db.key().await;
    assert!(next.owner > key.owner, "{} after {}", next.owner, key.owner);
    let answer = node.authenticate(&next.secret).await;
    assert!(answer.is_ok(), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_in_adopted_tables_that_lacked_columns_are_received() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("app.db");
    let mut shell = shell(&file);
    let hash = KeyHash::bcrypt("sk-12345-a-secret", 4).unwrap().expose_hash();
    shell
        .batch_execute(&format!(
            "CREATE TABLE users (id INTEGER NOT NULL PRIMARY KEY, email VARCHAR NOT NULL);
            CREATE TABLE api_keys (id INTEGER NOT NULL PRIMARY KEY, user_id INTEGER NOT NULL,
                key_prefix VARCHAR(20) NOT NULL, key_hash VARCHAR(255) NOT NULL, note TEXT);
            INSERT INTO users VALUES (1, 'ada@example.com');
            INSERT INTO api_keys VALUES (1, 1, 'sk-12345', '{hash}', NULL)"
        ))
        .unwrap();
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    let scheme = KeyScheme::builder().format(KeyFormat::first_chars(8).unwrap()).build().unwrap();
    let node = Authenticator::builder(store).scheme(scheme).build();
    let key =
        Key { id: 1, prefix: "sk-12345".into(), secret: "sk-12345-a-secret".into(), owner: 1 };
    has_cached(&node, &key).await;
    for (off, on, expected) in [
        (
            "UPDATE api_keys SET is_active = 0",
            "UPDATE api_keys SET is_active = 1",
            InvalidKey::Revoked,
        ),
        (
            "UPDATE users SET is_active = 0",
            "UPDATE users SET is_active = 1",
            InvalidKey::OwnerInactive,
        ),
        (
            "UPDATE api_keys SET key_prefix = 'x'",
            "UPDATE api_keys SET key_prefix = 'sk-12345'",
            InvalidKey::Unknown,
        ),
    ] {
        shell.batch_execute(off).unwrap();
        within(NOTIFIED_WITHIN, off, async || denial_of(&node, &key).await == Some(expected)).await;
        shell.batch_execute(on).unwrap();
        within(NOTIFIED_WITHIN, on, async || denial_of(&node, &key).await.is_none()).await;
    }
    shell.batch_execute("DELETE FROM api_keys").unwrap();
    within(NOTIFIED_WITHIN, "the end", async || {
        denial_of(&node, &key).await == Some(InvalidKey::Unknown)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feed_is_in_sync_as_of_the_clock_of_the_store() {
    let hour = Duration::from_secs(3600);
    let clock = Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH + 1000 * hour));
    let folder = tempfile::tempdir().unwrap();
    let builder = SqliteStore::builder(folder.path().join("keys.db")).clock(clock.clone());
    let store = builder.open().unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let issued = manager.issue(NewKey::new(user, "k")).await.unwrap();

    // A node that starts reads the changes of the last two hours.
    let mut changes = store.changes(clock.now() - 2 * hour);
    let mut recorder = Vec::new();
    let mut until_synced = async || loop {
        match changes.next().await.unwrap() {
            Change::Synced(as_of) => return (as_of, std::mem::take(&mut recorder)),
            Change::Prefix(prefix, _) => recorder.push(prefix),
            _ => {}
        }
    };
    let prefix = &issued.record().prefix;
    let (as_of, recorder) = until_synced().await;
    assert_eq!((as_of, recorder.last()), (clock.now(), Some(prefix)));
    clock.advance(hour);
    manager.revoke(&issued.record().id).await.unwrap();
    let (as_of, recorder) = until_synced().await;
    assert_eq!((as_of, recorder), (clock.now(), vec![prefix.clone()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn more_changes_at_once_than_can_be_reported_are_a_reset() {
    let mut db = database().await;
    let key = db.key().await;
    let node = Authenticator::new(db.store.clone());
    has_cached(&node, &key).await;
    let recorder = FeedRecorder::listen(db.store.changes(SystemTime::now()));
    recorder.all().await;
    db.run(&format!(
        "BEGIN; WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 10001)
        INSERT INTO api_keys (user_id, key_prefix, key_hash) SELECT {}, 'p' || n, 'x' FROM n;
        UPDATE api_keys SET is_active = 0 WHERE id = {}; COMMIT",
        key.owner, key.id
    ));
    within(Duration::from_secs(3), "the revoke", async || denial_of(&node, &key).await.is_some())
        .await;
    assert_eq!(recorder.subjects().await, ["reset"]);
}
