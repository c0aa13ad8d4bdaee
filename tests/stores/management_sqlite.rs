//! Management in an SQLite file: the audit of hand-written SQL, older and adopted tables, several connections.

use std::path::Path;

use diesel::{
    Connection, QueryableByName, RunQueryDsl, SqliteConnection, connection::SimpleConnection,
    sql_query, sql_types::Text,
};
use serde_json::Value;
use tower_api_key::{
    Authenticator, KeyManager, NewKey, SqliteStore,
    backend::SchemaVersion,
    error::StoreErrorKind,
    key::KeyHash,
    management::{IssuedKey, KeyPatch, ManageError, Rotation, UserPatch},
    store::{Attribution, AuditEntry, KeyFilter, KeyRepository, ListAudit},
};

use crate::support::{
    feed::{eventually, in_sync},
    log,
};

/// A program beside this crate, with the settings of the `sqlite3` shell.
struct Other(SqliteConnection);

impl Other {
    fn at(folder: &Path) -> Self {
        let file = folder.join("keys.db");
        let mut connection = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
        connection.batch_execute("PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = OFF").unwrap();
        Self(connection)
    }

    fn run(&mut self, sql: &str) {
        self.0.batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    fn text(&mut self, sql: &str) -> String {
        #[derive(QueryableByName)]
        struct OneText {
            #[diesel(sql_type = Text)]
            text: String,
        }
        let select = format!("SELECT coalesce(CAST(({sql}) AS TEXT), 'NULL') AS text");
        sql_query(select).get_result::<OneText>(&mut self.0).unwrap().text
    }
}

async fn store(folder: &Path) -> SqliteStore {
    let store = SqliteStore::open(folder.join("keys.db")).unwrap();
    store.migrate().await.unwrap();
    store
}

async fn key_of(store: &SqliteStore, email: &str) -> IssuedKey {
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user(email, "user").await.unwrap();
    manager.issue(NewKey::new(user.id, "k").scopes(["read"])).await.unwrap()
}

/// Returns the entries after the entry `after`, the oldest first.
async fn entries(store: &SqliteStore, after: i64) -> Vec<AuditEntry> {
    let page = store.list_audit(&ListAudit::default().limit(1_000)).await.unwrap();
    let mut entries = page.entries;
    entries.retain(|entry| entry.id > after);
    entries.reverse();
    entries
}

async fn last_id(store: &SqliteStore) -> i64 {
    let page = store.list_audit(&ListAudit::default().limit(1)).await.unwrap();
    page.entries.first().map_or(0, |entry| entry.id)
}

/// Returns the actions of the entries, with the id of the key or the user.
fn actions(entries: &[AuditEntry]) -> Vec<String> {
    let action = |entry: &AuditEntry| {
        let subject = match (&entry.key, &entry.user) {
            (Some(key), _) => format!("key {key}"),
            (None, user) => format!("user {}", user.as_ref().unwrap()),
        };
        format!("{} {subject}", entry.action.name())
    };
    entries.iter().map(action).collect()
}

#[tokio::test]
async fn each_hand_written_statement_leaves_one_row_in_the_audit_for_each_row_that_it_changes() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path()).await;
    let (ada, bob) = (key_of(&store, "a@b.c").await, key_of(&store, "b@b.c").await);
    let mut other = Other::at(folder.path());
    let (key, user) = (&ada.record().id, &ada.record().user.id);
    let (next, second) = (&bob.record().id, &bob.record().user.id);
    let one = |action: &str| vec![format!("{action} key {key}")];
    let insert = "INTO api_keys (id, user_id, key_prefix, key_hash, is_active)";
    for (sql, expected) in [
        ("UPDATE api_keys SET name = 'x' WHERE id = $KEY", one("update")),
        ("UPDATE api_keys SET name = name", vec![]),
        ("UPDATE api_keys SET total_requests = 7, last_used_at = '2026-01-01'", vec![]),
        ("UPDATE api_keys SET fast_hash = 'x', previous_last_used_at = '2026-01-01'", vec![]),
        ("UPDATE api_keys SET is_active = 0 WHERE id = $KEY", one("revoke")),
        ("UPDATE api_keys SET is_active = 1, name = 'y' WHERE id = $KEY", one("reactivate")),
        (
            "UPDATE api_keys SET previous_key_hash = key_hash, previous_key_prefix = 'old', key_hash = 'sha256$aa',
                previous_expires_at = '2099-01-01 00:00:00' WHERE id = $KEY",
            one("rotate"),
        ),
        ("UPDATE api_keys SET previous_expires_at = NULL WHERE id = $KEY", one("end_grace")),
        (
            "UPDATE api_keys SET description = 'd'",
            vec![format!("update key {key}"), format!("update key {next}")],
        ),
        ("BEGIN; UPDATE api_keys SET name = 'z'; ROLLBACK", vec![]),
        // Values that JSON can't contain.
        ("UPDATE api_keys SET name = x'00ff', scopes = x'01', rate_limit_per_day = x'02' WHERE id = $KEY", one("update")),
        ("UPDATE api_keys SET rate_limit_per_day = 9e999, metadata = '{', is_active = 'x' WHERE id = $KEY", one("revoke")),
        (
            "UPDATE api_keys SET name = 'k', scopes = '[]', rate_limit_per_day = NULL, metadata = NULL,
                is_active = 1 WHERE id = $KEY",
            one("reactivate"),
        ),
        // REPLACE fires no trigger for the row that it deletes.
        ("INSERT OR REPLACE $INTO VALUES ($KEY, $USER, 'p', 'sha256$aa', 0)", one("revoke")),
        ("INSERT OR IGNORE $INTO VALUES ($KEY, $USER, 'p', 'sha256$aa', 1)", vec![]),
        (
            "INSERT $INTO VALUES ($KEY, $USER, 'p', 'sha256$aa', 1) ON CONFLICT DO UPDATE SET is_active = 1",
            one("reactivate"),
        ),
        ("INSERT OR ABORT $INTO VALUES (77, $USER, 'q', 'sha256$bb', 1)", vec!["issue key 77".to_owned()]),
        (
            "UPDATE OR REPLACE api_keys SET id = $KEY WHERE id = 77",
            vec![format!("update key {key}"), format!("delete key {key}")],
        ),
        ("DELETE FROM api_keys WHERE id = $KEY", one("delete")),
        ("UPDATE users SET role = 'x' WHERE id = $SECOND", vec![format!("update_user user {second}")]),
        (
            "REPLACE INTO users (id, email, is_active) SELECT id, email, 0 FROM users WHERE id = $SECOND",
            vec![format!("update_user user {second}")],
        ),
        // A user without keys costs nothing.
        ("UPDATE users SET role = 'x' WHERE id = $USER", vec![]),
        ("INSERT INTO users (email) VALUES ('c@b.c')", vec![]),
        ("DELETE FROM users WHERE id = $USER", vec![]),
        ("DELETE FROM users WHERE id = $SECOND", vec![format!("delete_user user {second}")]),
    ] {
        let last = last_id(&store).await;
        let sql = sql.replace("$KEY", &key.to_string()).replace("$USER", &user.to_string());
        let sql = sql.replace("$SECOND", &second.to_string()).replace("$INTO", insert);
        other.run(&sql);
        let entries = entries(&store, last).await;
        let mut found = actions(&entries);
        found.sort();
        let mut expected = expected;
        expected.sort();
        assert_eq!(found, expected, "{sql}");
        for entry in entries {
            assert_eq!((&entry.actor, &entry.actor_key, &entry.reason), (&None, &None, &None));
            assert_eq!((&entry.database_role, &entry.request_id), (&None, &None));
            for row in [&entry.before, &entry.after] {
                let text = row.as_ref().map(Value::to_string).unwrap_or_default();
                assert!(!text.contains("sha256"), "{sql}: {text}");
            }
        }
    }
    let left =
        "SELECT count(*) FROM api_key_owners WHERE user_id NOT IN (SELECT user_id FROM api_keys)";
    assert_eq!(other.text(left), "0");
}

#[tokio::test]
async fn a_row_that_replaces_others_by_a_unique_index_is_audited_with_them() {
    for is_recursive in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let mut other = Other::at(folder.path());
        other.run(&format!("PRAGMA recursive_triggers = {is_recursive}"));
        other.run(
            "CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT UNIQUE);
            CREATE TABLE api_keys (id INTEGER PRIMARY KEY, user_id INTEGER, key_prefix TEXT, key_hash TEXT,
                slot TEXT UNIQUE)",
        );
        let store = store(folder.path()).await;
        other.run(
            "INSERT INTO users (id, email) VALUES (1, 'a'), (2, 'b'), (3, 'c');
            INSERT INTO api_keys (id, user_id, key_prefix, key_hash, slot)
                VALUES (1, 1, 'a', 'h', 's1'), (2, 2, 'b', 'h', 's2'), (3, 3, 'c', 'h', 's3')",
        );
        for (sql, expected) in [
            (
                "REPLACE INTO api_keys (id, user_id, key_prefix, key_hash, slot) VALUES (9, 1, 'z', 'h', 's1')",
                vec!["delete key 1", "issue key 9"],
            ),
            ("UPDATE OR REPLACE api_keys SET slot = 's2' WHERE id = 9", vec!["delete key 2"]),
            ("REPLACE INTO users (id, email) VALUES (8, 'c')", vec!["delete_user user 3"]),
            ("UPDATE OR REPLACE users SET email = 'a' WHERE id = 8", vec!["delete_user user 1"]),
        ] {
            let last = last_id(&store).await;
            other.run(sql);
            assert_eq!(actions(&entries(&store, last).await), expected, "{sql} {is_recursive}");
        }
        // The ids of owners whose keys were replaced are not kept.
        other.run("DELETE FROM api_keys");
        assert_eq!(other.text("SELECT count(*) FROM api_key_owners"), "0");
        assert_eq!(other.text("SELECT count(*) FROM api_key_replaced"), "0");
    }
}

#[tokio::test]
async fn a_change_by_the_manager_is_attributed_and_the_next_one_by_another_program_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path()).await;
    let key = key_of(&store, "a@b.c").await;
    let id = &key.record().id;
    let mut other = Other::at(folder.path());
    let manager = KeyManager::new(store.clone()).actor("cli:ada").request_id("r-1");
    let last = last_id(&store).await;
    manager.reason("lost").revoke(id).await.unwrap();
    // A change that fails leaves no row and no attribution.
    let missing = manager.issue(NewKey::new(4711, "k")).await.unwrap_err();
    assert!(missing.to_string().contains("the key's user does not exist"), "{missing}");
    manager.reason("again").revoke(id).await.unwrap();
    other.run("UPDATE api_keys SET name = 'x'");
    let entries = entries(&store, last).await;
    assert_eq!(actions(&entries), [format!("revoke key {id}"), format!("update key {id}")]);
    let by = |entry: &AuditEntry| {
        let texts = [&entry.actor, &entry.reason, &entry.request_id];
        texts.map(|text| text.clone().unwrap_or_default())
    };
    assert_eq!(by(&entries[0]), ["cli:ada", "lost", "r-1"]);
    assert_eq!(by(&entries[1]), ["", "", ""]);
    assert_eq!(other.text("SELECT count(*) FROM api_key_attribution"), "0");
    assert_eq!(other.text("SELECT revoke_reason FROM api_keys"), "lost");
}

#[tokio::test]
async fn a_process_that_is_killed_within_a_change_leaves_neither_change_nor_attribution() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path()).await;
    let key = key_of(&store, "a@b.c").await;
    let last = last_id(&store).await;
    let mut killed = Other::at(folder.path());
    killed.run(
        "BEGIN IMMEDIATE;
        INSERT INTO api_key_attribution (id, at, actor) VALUES (1, '2026-01-01 00:00:00.000000', 'eve');
        UPDATE api_keys SET name = 'x'",
    );
    drop(killed);
    KeyManager::new(store.clone()).revoke(&key.record().id).await.unwrap();
    let entries = entries(&store, last).await;
    assert_eq!((entries.len(), &entries[0].actor), (1, &None));
    assert_eq!(entries[0].after.as_ref().unwrap()["name"], "k");
}

/// The table of keys of the first version of this crate.
const FIRST_TABLE: &str = "
CREATE TABLE IF NOT EXISTS users (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    email      TEXT    NOT NULL UNIQUE,
    role       TEXT    NOT NULL DEFAULT 'user',
    is_active  BOOLEAN NOT NULL DEFAULT TRUE,
    created_at TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f')),
    updated_at TEXT    NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f'))
);
CREATE TABLE IF NOT EXISTS api_keys (
    -- Never reused, because usage and budgets refer to it, and are kept after the key is deleted.
    id                    INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id               INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name                  TEXT    NOT NULL DEFAULT '',
    key_prefix            TEXT    NOT NULL,
    key_hash              TEXT    NOT NULL
);";

#[tokio::test]
async fn a_table_of_an_older_version_stops_deleting_keys_and_keeps_everything_else() {
    let folder = tempfile::tempdir().unwrap();
    let mut other = Other::at(folder.path());
    other.run(FIRST_TABLE);
    other.run(&format!(
        "CREATE TABLE api_key_adopted (name TEXT PRIMARY KEY);
        CREATE TABLE notes (key INTEGER REFERENCES api_keys (id) ON DELETE CASCADE);
        CREATE TABLE seen (name TEXT);
        CREATE INDEX by_name ON api_keys (name);
        CREATE VIEW names AS SELECT name FROM api_keys;
        CREATE TRIGGER mine AFTER UPDATE OF name ON api_keys BEGIN INSERT INTO seen VALUES (NEW.name); END;
        INSERT INTO users (email) VALUES ('a@b.c');
        INSERT INTO api_keys (id, user_id, key_prefix, key_hash) VALUES (7, 1, 'p', '{0}'), (900, 1, 'p', '{0}');
        DELETE FROM api_keys WHERE id = 900;
        INSERT INTO notes VALUES (7)",
        KeyHash::sha256("x").expose_hash()
    ));
    let store = store(folder.path()).await;
    store.migrate().await.unwrap();
    let definition = other.text("SELECT sql FROM sqlite_master WHERE name = 'api_keys'");
    assert!(!definition.contains("CASCADE"), "{definition}");
    // A node that was running has an open connection.
    other.run("PRAGMA foreign_keys = ON");
    assert!(other.0.batch_execute("DELETE FROM users").is_err());
    other.run("UPDATE api_keys SET name = 'x'");
    assert_eq!(other.text("SELECT name FROM seen"), "x");
    assert_eq!(other.text("SELECT name FROM names"), "x");
    assert_eq!(other.text("SELECT count(*) FROM notes"), "1");
    assert_eq!(other.text("SELECT count(*) FROM sqlite_master WHERE name = 'by_name'"), "1");
    assert_eq!(other.text("SELECT integrity_check FROM pragma_integrity_check"), "ok");
    assert_eq!(other.text("SELECT count(*) FROM pragma_foreign_key_check"), "0");
    let issued = KeyManager::new(store.clone()).issue(NewKey::new(1, "k")).await.unwrap();
    assert_eq!(issued.record().id.as_i64(), Some(901));
    let old = store.find_key(&7.into()).await.unwrap().unwrap();
    assert_eq!((old.record().grace.as_ref(), old.record().not_before), (None, None));
    assert_eq!(other.text("SELECT count(*) FROM api_key_owners"), "1");
}

#[tokio::test]
async fn an_adopted_table_keeps_its_cascade_and_its_columns_are_not_in_the_audit() {
    let folder = tempfile::tempdir().unwrap();
    let mut other = Other::at(folder.path());
    other.run(FIRST_TABLE);
    other.run(
        "ALTER TABLE api_keys ADD COLUMN card_number TEXT;
        ALTER TABLE api_keys ADD COLUMN description TEXT DEFAULT 'theirs'",
    );
    let store = store(folder.path()).await;
    let key = key_of(&store, "a@b.c").await;
    let definition = other.text("SELECT sql FROM sqlite_master WHERE name = 'api_keys'");
    assert!(definition.contains("ON DELETE CASCADE"), "{definition}");
    let last = last_id(&store).await;
    other.run("UPDATE api_keys SET card_number = '4711', name = 'x'");
    other.run("PRAGMA foreign_keys = ON; DELETE FROM users");
    let entries = entries(&store, last).await;
    let (id, user) = (&key.record().id, &key.record().user.id);
    let expected = [
        format!("update key {id}"),
        format!("delete key {id}"),
        format!("delete_user user {user}"),
    ];
    assert_eq!(actions(&entries), expected);
    let text = format!("{entries:?}");
    assert!(!text.contains("4711") && !text.contains("card_number"), "{text}");
    assert_eq!(entries[2].before.as_ref().unwrap()["email"], "a@b.c");

    // A table of another program that refers to the user.
    let user = store.insert_user("b@b.c", "user", &Attribution::default()).await.unwrap();
    for deferred in ["", " DEFERRABLE INITIALLY DEFERRED"] {
        other.run(&format!(
            "CREATE TABLE orders (user_id INTEGER REFERENCES users (id){deferred});
            INSERT INTO orders VALUES ({})",
            user.id
        ));
        let error = store.delete_user(&user.id, &Attribution::default()).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Conflict);
        assert!(error.to_string().contains("another table refers to the user"), "{error}");
        other.run("DROP TABLE orders");
    }
    store.delete_user(&user.id, &Attribution::default()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_key_that_cannot_be_decoded_can_be_revoked_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path()).await;
    let (one, two) = (key_of(&store, "a@b.c").await, key_of(&store, "b@b.c").await);
    let mut other = Other::at(folder.path());
    other.run("UPDATE api_keys SET scopes = x'00', key_prefix = x'ff00', expires_at = 'soon'");
    let by = Attribution::default().reason("broken");
    assert!(store.revoke_key(&one.record().id, &by).await.unwrap().is_some());
    let owner = two.record().user.id.clone();
    let filter = tower_api_key::store::KeyFilter::default().owner(owner);
    let revoked = store.revoke_keys(&filter, &by).await.unwrap();
    assert_eq!(revoked.len(), 1);
    assert_eq!(
        other.text("SELECT group_concat(is_active || revoke_reason) FROM api_keys"),
        "0broken,0broken"
    );
    assert!(store.revoke_keys(&filter, &by).await.unwrap().is_empty());
    for key in [one, two] {
        assert!(store.delete_key(&key.record().id, &by).await.unwrap().is_some());
    }
    assert_eq!(other.text("SELECT count(*) FROM api_keys"), "0");
}

#[tokio::test]
async fn of_two_connections_that_replace_a_key_at_once_exactly_one_wins() {
    let folder = tempfile::tempdir().unwrap();
    let stores = [store(folder.path()).await, store(folder.path()).await];
    let key = key_of(&stores[0], "a@b.c").await;
    let id = key.record().id.clone();
    for round in 0..50 {
        let revision = stores[0].find_key(&id).await.unwrap().unwrap().revisions().key;
        let edits = stores.clone().into_iter().enumerate().map(|(at, store)| {
            let id = id.clone();
            let patch = KeyPatch::default().name(format!("{round} {at}"));
            tokio::spawn(
                async move { KeyManager::new(store).update(&id, &patch, Some(revision)).await },
            )
        });
        let mut won = Vec::new();
        for edit in edits.collect::<Vec<_>>() {
            match edit.await.unwrap() {
                Ok(record) => won.push(record),
                Err(ManageError::Conflict { .. }) => {}
                Err(error) if error.to_string().contains("changed") => {}
                Err(error) => panic!("{error}"),
            }
        }
        let [record] = won.as_slice() else { panic!("{won:?}") };
        let stored = stores[1].find_key(&id).await.unwrap().unwrap();
        assert_eq!(
            (&stored.record().name, stored.record().revision),
            (&record.name, record.revision)
        );
    }
    let edits = entries(&stores[0], 0).await.into_iter().filter(|it| it.action.name() == "update");
    assert_eq!(edits.count(), 50);
}

#[tokio::test]
async fn more_rotated_keys_than_candidates_can_have_had_one_lookup_id() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path()).await;
    let mut other = Other::at(folder.path());
    let key = key_of(&store, "a@b.c").await;
    // Their grace periods are over.
    other.run(&format!(
        "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 20)
        INSERT INTO api_keys (user_id, key_prefix, key_hash, previous_key_prefix, previous_key_hash, previous_expires_at)
        SELECT {}, 'p' || n, '{1}', '{2}', '{1}', '2020-01-01T00:00:00Z' FROM n",
        key.record().user.id,
        KeyHash::sha256("x").expose_hash(),
        key.record().prefix
    ));
    let node = Authenticator::builder(store.clone()).cache_capacity(0).build();
    assert!(node.authenticate(key.expose_secret()).await.is_ok());
    other.run("UPDATE api_keys SET previous_expires_at = '2099-01-01T00:00:00Z' WHERE previous_key_prefix IS NOT NULL");
    // More than eight candidates, of which the presented key is the first.
    assert!(node.authenticate(key.expose_secret()).await.is_ok());
    let rotated = KeyManager::new(store.clone());
    let again = rotated.rotate(&key.record().id, Rotation::default()).await.unwrap();
    assert!(node.authenticate(again.expose_secret()).await.is_ok());
    assert!(node.authenticate(key.expose_secret()).await.is_ok());
}

#[tokio::test]
async fn users_of_an_adopted_table_keep_their_own_representation() {
    let folder = tempfile::tempdir().unwrap();
    let mut other = Other::at(folder.path());
    other.run(
        "CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT, role TEXT, is_active BOOLEAN);
        INSERT INTO users VALUES (1, 'a@b.c', NULL, 1), (2, 'a@b.c', 'x', NULL), (3, CAST(x'ff' AS TEXT), 'x', 1)",
    );
    let store = store(folder.path()).await;
    let manager = KeyManager::new(store.clone());
    let page = manager.list_users(&Default::default()).await.unwrap();
    let users: Vec<_> =
        page.users.iter().map(|user| (user.role.as_str(), user.is_active)).collect();
    assert_eq!(users, [("user", true), ("x", false), ("x", true)]);
    // The address of user 1 is that of user 2 too.
    manager.update_user(&1.into(), &UserPatch::default().active(false)).await.unwrap();
    assert_eq!(other.text("SELECT role FROM users WHERE id = 1"), "NULL");
    manager.update_user(&3.into(), &UserPatch::default().role("admin")).await.unwrap();
    assert_eq!(other.text("SELECT hex(email) || role FROM users WHERE id = 3"), "FFadmin");
}

#[tokio::test]
async fn a_file_of_another_version_is_logged_and_a_newer_one_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let issued = key_of(&store(folder.path()).await, "ada@example.com").await;
    let mut other = Other::at(folder.path());
    let path = folder.path().join("keys.db");
    let (log, _guard) = log::capture();
    let opened = SqliteStore::open(&path).unwrap();
    assert_eq!(log.take(), "");
    assert_eq!(opened.schema_version().await.unwrap(), SchemaVersion::Current);

    other.run("UPDATE api_key_schema SET version = 1");
    let older = SqliteStore::open(&path).unwrap();
    assert!(log.take().contains("made by an older version of this crate; migrate()"));
    assert_eq!(older.schema_version().await.unwrap(), SchemaVersion::Older);
    assert_eq!(older.pending_migrations().await.unwrap(), ["version 2 of the schema"]);
    let sql = older.migration_sql().await.unwrap();
    assert!(sql.contains("INSERT INTO api_key_schema"), "{sql}");
    older.migrate().await.unwrap();
    assert_eq!(older.schema_version().await.unwrap(), SchemaVersion::Current);

    // A newer version has changed a trigger. Nodes of this version leave it, and their feeds are complete.
    let trigger = "CREATE TRIGGER api_key_note_user_gone AFTER DELETE ON users BEGIN
        INSERT INTO api_key_changes (user_id) VALUES (OLD.id); END";
    other.run(&format!(
        "UPDATE api_key_schema SET version = 3; DROP TRIGGER api_key_note_user_gone; {trigger}"
    ));
    let newer = SqliteStore::open(&path).unwrap();
    assert!(log.take().contains("made by a newer version of this crate"));
    assert!(newer.pending_migrations().await.unwrap().is_empty());
    newer.migrate().await.unwrap();
    let sql = "SELECT sql FROM sqlite_master WHERE name = 'api_key_note_user_gone'";
    assert_eq!(other.text(sql), trigger);
    let node = Authenticator::new(newer.clone());
    node.authenticate(issued.expose_secret()).await.unwrap();
    in_sync(&node).await;
    // A trigger that is missing is found all the same.
    other.run("DROP TRIGGER api_key_note");
    eventually("a fault", async || node.health().feed.fault.is_some()).await;
}

#[tokio::test]
async fn a_key_that_can_not_be_decoded_is_revoked_by_the_columns_that_the_filter_compares() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path()).await;
    let mut other = Other::at(folder.path());
    key_of(&store, "ada@example.com").await;
    let hash = KeyHash::sha256("x").expose_hash();
    let fill = |bad: &str, value: &str| {
        format!(
            "DELETE FROM api_keys;
            INSERT INTO api_keys (id, user_id, name, scopes, key_prefix, key_hash, created_at, expires_at, last_used_at)
            SELECT n, 1, 'laptop ' || n, '[\"s' || n || '\"]', 'p' || n, '{hash}',
                '2020-01-0' || n || ' 00:00:00', '2020-02-0' || n || ' 00:00:00', '2020-03-0' || n || ' 00:00:00'
            FROM (SELECT 1 AS n UNION ALL SELECT 2 UNION ALL SELECT 3);
            UPDATE api_keys SET {bad} = {value}"
        )
    };
    let day = |month: u32| {
        chrono::DateTime::from_timestamp(1_577_836_800, 0).unwrap()
            + chrono::Months::new(month)
            + chrono::TimeDelta::hours(30)
    };
    let filter = KeyFilter::default;
    let by = Attribution::default();
    for (bad, value) in [
        ("allowed_ips", "'[\"10.0.0.0/99\"]'"),
        ("rate_limit_per_day", "-7"),
        ("metadata", "CAST(X'ff00' AS TEXT)"),
        ("budget_type", "X'ffff'"),
    ] {
        for (what, filter, expected) in [
            ("contains", filter().contains("TOP 2"), vec![2]),
            ("scope", filter().scope("s3"), vec![3]),
            ("another scope", filter().scope("s"), vec![]),
            ("created", filter().created_before(day(0)), vec![1, 2]),
            ("expires", filter().expires_before(day(1)), vec![1, 2]),
            ("unused", filter().unused_since(day(2)), vec![1, 2]),
            ("two", filter().contains("laptop").created_before(day(0)), vec![1, 2]),
            ("none", filter().contains("laptop 9"), vec![]),
        ] {
            other.run(&fill(bad, value));
            let revoked = store.revoke_keys(&filter, &by).await.unwrap();
            let ids: Vec<_> = revoked.iter().filter_map(|(id, _)| id.as_i64()).collect();
            assert_eq!(ids, expected, "{what}, {bad}");
            let count = "SELECT count(*) FROM api_keys WHERE NOT is_active";
            assert_eq!(other.text(count), expected.len().to_string(), "{what}, {bad}");
        }
    }
    // The compared column itself: SQL decides.
    other.run(&fill("scopes", "'[\"s1\"'"));
    assert_eq!(store.revoke_keys(&filter().scope("s1"), &by).await.unwrap().len(), 3);
    other.run(&fill("scopes", "'[\"s1\"'"));
    assert!(store.revoke_keys(&filter().scope("a/b"), &by).await.unwrap().is_empty());
}
