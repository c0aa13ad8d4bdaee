//! Management in PostgreSQL: what triggers write into the audit, attribution behind a pooler, indexes, and concurrent edits.

use std::time::Duration;

use chrono::Utc;
use serde_json::{Value, json};
use tower_api_key::{
    Authenticator, KeyManager, KeyScheme, NewKey, PostgresStore, StoreError,
    backend::SchemaVersion,
    error::StoreErrorKind,
    key::{KeyFormat, KeyHash},
    management::{KeyPatch, ManageError, Rotation},
    record::{KeyId, KeyRecord, Revision, User},
    store::{
        Attribution, AuditAction, Inserted, KeyFilter, KeyRepository, KeyStore, ListAudit,
        ListKeys, StoredKey,
    },
};

use crate::support::{
    database::{Database, connect, database, node_with, number, run, store_at, url_of_role},
    feed::{eventually, in_sync},
    log,
    servers::{PgBouncer, Postgres},
    stores::question,
};

const HOUR: Duration = Duration::from_secs(3600);

/// The entries of the audit, the oldest first: action, role of the database, key and actor.
async fn audit(store: &PostgresStore) -> Vec<(AuditAction, String, Option<i64>, Option<String>)> {
    let page = store.list_audit(&ListAudit::default()).await.unwrap();
    let mut entries: Vec<_> = page
        .entries
        .into_iter()
        .map(|entry| {
            let key = entry.key.as_ref().and_then(KeyId::as_i64);
            (entry.action, entry.database_role.unwrap_or_default(), key, entry.actor)
        })
        .collect();
    entries.reverse();
    entries
}

async fn forget(db: &Database) {
    db.run("DELETE FROM api_key_audit").await;
}

#[tokio::test]
async fn a_hand_written_statement_leaves_one_entry_for_each_changed_key_with_the_role() {
    let db = database().await;
    let keys = [db.key().await, db.key().await];
    db.run("CREATE ROLE ops LOGIN; GRANT ALL ON api_keys, users TO ops").await;
    forget(&db).await;
    let role = "app".to_owned();
    for (statement, action) in [
        ("UPDATE api_keys SET is_active = FALSE", AuditAction::Revoke),
        ("UPDATE api_keys SET is_active = TRUE", AuditAction::Reactivate),
        ("UPDATE api_keys SET name = name || 'x'", AuditAction::Update),
        (
            "UPDATE api_keys SET previous_key_prefix = key_prefix, previous_key_hash = key_hash,
                previous_expires_at = now() + INTERVAL '1 h', key_hash = key_hash || 'x'",
            AuditAction::Rotate,
        ),
        ("UPDATE api_keys SET previous_key_hash = NULL", AuditAction::EndGrace),
    ] {
        db.run(statement).await;
        let expected = keys.iter().map(|key| (action, role.clone(), Some(key.id), None));
        assert_eq!(audit(&db.store).await, expected.collect::<Vec<_>>(), "{statement}");
        forget(&db).await;
    }
    // The role of SET ROLE, and of the session.
    let (id, owner) = (keys[0].id, keys[0].owner);
    db.run(&format!("SET ROLE ops; DELETE FROM api_keys WHERE id = {id}; RESET ROLE")).await;
    let ops = connect(&url_of_role(&db.server.url(), "ops")).await;
    run(&ops, &format!("UPDATE users SET role = 'admin' WHERE id = {}", keys[1].owner)).await;
    let ops = "ops".to_owned();
    assert_eq!(
        audit(&db.store).await,
        [
            (AuditAction::Delete, ops.clone(), Some(id), None),
            (AuditAction::UpdateUser, ops, None, None)
        ]
    );
    forget(&db).await;
    // A user without keys, usage, and another service's columns.
    db.run(&format!(
        "UPDATE users SET role = 'x' WHERE id = {owner}; DELETE FROM users WHERE id = {owner}"
    ))
    .await;
    db.run("INSERT INTO users (email) VALUES ('new@example.com')").await;
    db.run("UPDATE api_keys SET total_requests = 5, last_used_at = now(), previous_last_used_at = now(), fast_hash = 'x'")
        .await;
    assert_eq!(audit(&db.store).await, []);
    db.run("TRUNCATE users CASCADE").await;
    let actions: Vec<_> = audit(&db.store).await.into_iter().map(|entry| entry.0).collect();
    assert_eq!(actions, [AuditAction::Truncate; 2]);
}

#[tokio::test]
async fn each_inserted_row_is_recorded_once_whatever_the_statement() {
    let db = database().await;
    let owner = db.key().await.owner;
    both_lookup_ids_are_recorded(&db, owner, 51).await;
    let rows = |from: i64, to: i64| {
        format!(
            "INSERT INTO api_keys (id, user_id, key_prefix, key_hash)
            SELECT n, {owner}, 'p' || n, 'x' FROM generate_series({from}, {to}) AS n"
        )
    };
    let one_by_one = format!(
        "DO $$ BEGIN FOR n IN 101..300 LOOP
            INSERT INTO api_keys (id, user_id, key_prefix, key_hash) VALUES (n, {owner}, 'p' || n, 'x');
        END LOOP; END $$"
    );
    let json =
        "ALTER TABLE api_keys ALTER metadata TYPE json USING metadata::text::json".to_owned();
    let transactions = "SELECT txid_snapshot_xmax(txid_current_snapshot())";
    for (statement, added, updated) in [
        (rows(11, 13), 3, 0),
        (rows(1, 0), 0, 0),
        (format!("{} ON CONFLICT (id) DO UPDATE SET name = 'again'", rows(12, 15)), 2, 2),
        (format!("{} ON CONFLICT (id) DO NOTHING", rows(14, 16)), 1, 0),
        (
            format!(
                "SET session_replication_role = replica; {}; RESET session_replication_role",
                rows(21, 22)
            ),
            2,
            0,
        ),
        (one_by_one, 200, 0),
        (rows(1_001, 1_001 + 10_000), 10_001, 0),
        (format!("ALTER TABLE api_keys DROP COLUMN description; {}", rows(31, 32)), 2, 0),
        (format!("{json}; {}; UPDATE api_keys SET name = 'x' WHERE id = 11", rows(33, 34)), 2, 1),
        (
            format!(
                r#"INSERT INTO api_keys (id, user_id, key_prefix, key_hash, metadata)
                VALUES (41, {owner}, 'p41', 'x', '"\u0000"'), (42, {owner}, 'p42', 'x', '{{}}')"#
            ),
            2,
            0,
        ),
    ] {
        forget(&db).await;
        db.run("DELETE FROM api_key_changes").await;
        let before = db.number(transactions).await;
        db.run(&statement).await;
        let spent = db.number(transactions).await - before;
        let entries =
            |action: &str| format!("SELECT count(*) FROM api_key_audit WHERE action = '{action}'");
        let recorded = [
            db.number(&entries("issue")).await,
            db.number(&entries("update")).await,
            db.number("SELECT count(DISTINCT api_key_id) FROM api_key_audit").await,
            db.number("SELECT count(*) FROM api_key_changes WHERE key_prefix = 'p' || api_key_id")
                .await,
        ];
        assert_eq!(recorded, [added, updated, added + updated, added + updated], "{statement}");
        let wrong = "SELECT count(*) FROM api_key_changes c JOIN api_keys k ON k.id = c.api_key_id
            WHERE c.revision <> k.api_key_revision OR c.key_prefix <> k.key_prefix";
        assert_eq!(db.number(wrong).await, 0, "{statement}");
        // A handler of errors around a write would take a transaction id for each statement.
        assert!(spent < 50, "{statement}: {spent} transactions");
    }
    // The row whose JSON can't be converted has an entry without values.
    let values = "SELECT count(*) FROM api_key_audit WHERE api_key_id = 41 AND after IS NULL";
    assert_eq!(db.number(values).await, 1);
    let values = "SELECT count(*) FROM api_key_audit
        WHERE after ->> 'key_prefix' = 'p42' AND (after -> 'user_id')::bigint = user_id";
    assert_eq!(db.number(values).await, 1);
    // Row by row, since a column is gone.
    both_lookup_ids_are_recorded(&db, owner, 53).await;
}

/// Inserts two rows with a previous lookup id, of which one has it as its current one too.
async fn both_lookup_ids_are_recorded(db: &Database, owner: i64, id: i64) {
    db.run("DELETE FROM api_key_changes").await;
    let other = id + 1;
    db.run(&format!(
        "INSERT INTO api_keys (id, user_id, key_prefix, key_hash, previous_key_prefix)
        VALUES ({id}, {owner}, 'p{id}', 'x', 'old{id}'), ({other}, {owner}, 'p{other}', 'x', 'p{other}')"
    ))
    .await;
    let recorded = format!(
        "SELECT count(*) FROM api_key_changes WHERE key_prefix IN ('p{id}', 'old{id}', 'p{other}')"
    );
    assert_eq!(db.number(&recorded).await, 3);
    assert_eq!(db.number("SELECT count(*) FROM api_key_changes").await, 3);
}

#[tokio::test]
async fn a_role_without_rights_on_the_audit_changes_keys_and_cannot_write_entries() {
    let db = database().await;
    let key = db.key().await;
    db.run(
        "CREATE ROLE ops LOGIN; GRANT SELECT, INSERT, UPDATE, DELETE ON api_keys, users TO ops;
        GRANT SELECT ON api_key_changes TO ops",
    )
    .await;
    let url = url_of_role(&db.server.url(), "ops");
    forget(&db).await;
    let ops = connect(&url).await;
    run(&ops, &key.revoke()).await;
    let store = PostgresStore::new(&url).unwrap();
    let manager = KeyManager::new(store.clone()).actor("ada");
    let user = manager.create_user("bob@example.com", "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id, "k")).await.unwrap();
    let ada = Some("ada".to_owned());
    let id = issued.record().id.as_i64();
    assert_eq!(
        audit(&db.store).await,
        [
            (AuditAction::Revoke, "ops".to_owned(), Some(key.id), None),
            (AuditAction::CreateUser, "ops".to_owned(), None, ada.clone()),
            (AuditAction::Issue, "ops".to_owned(), id, ada)
        ]
    );
    assert_eq!(
        store.list_audit(&ListAudit::default()).await.unwrap_err().kind(),
        StoreErrorKind::Rejected
    );
    for forged in [
        "INSERT INTO api_key_audit (action) VALUES ('issue')",
        "DELETE FROM api_key_audit",
        "SELECT api_key_write_audit('issue', 1, 1, NULL, NULL)",
        "CREATE TEMP TABLE t (id INT); CREATE TRIGGER t AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION api_key_note_key()",
    ] {
        assert!(ops.batch_execute(forged).await.is_err(), "{forged}");
    }
}

#[tokio::test]
async fn an_attribution_that_is_no_json_and_one_with_a_nul_character_stop_no_change() {
    let db = database().await;
    let key = db.key().await;
    forget(&db).await;
    db.run(&format!(
        "SET api_key.attribution = 'garbage'; {}; RESET api_key.attribution",
        key.revoke()
    ))
    .await;
    let manager = KeyManager::new(db.store.clone()).actor("a\0b");
    manager.reactivate(&key.id.into()).await.unwrap();
    let actors: Vec<_> = audit(&db.store).await.into_iter().map(|entry| entry.3).collect();
    assert_eq!(actors, [None, Some("a\u{fffd}b".to_owned())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_pooler_each_change_has_its_actor_and_none_remains_for_other_clients() {
    let server = Postgres::with_settings(&["default_transaction_isolation=repeatable read"]);
    let pooler = PgBouncer::start(&server, "");
    let store = PostgresStore::builder(&pooler.url()).build().unwrap();
    store.migrate().await.unwrap();
    let managers: Vec<_> =
        (0..4).map(|n| KeyManager::new(store.clone()).actor(format!("actor{n}"))).collect();
    let user = managers[0].create_user("ada@example.com", "user").await.unwrap().id;
    let other = connect(&pooler.url()).await;
    for _ in 0..10 {
        for manager in &managers {
            manager.issue(NewKey::new(user.clone(), "k")).await.unwrap();
            other.batch_execute("UPDATE api_keys SET name = name || 'x' WHERE id = (SELECT max(id) FROM api_keys)")
                .await
                .unwrap();
        }
    }
    let of_client = "SELECT count(*) FROM api_key_audit WHERE action = 'update' AND actor IS NULL";
    let of_actors = "SELECT count(DISTINCT actor) FROM api_key_audit WHERE action = 'issue'";
    let admin = server.client().await;
    assert_eq!((number(&admin, of_client).await, number(&admin, of_actors).await), (40, 4));
}

/// As an ORM makes them, with a column of its own that is not for the audit.
const ORM_TABLES: &str = "
    CREATE TYPE userrole AS ENUM ('ADMIN', 'user');
    CREATE TABLE users (
        id SERIAL PRIMARY KEY, email VARCHAR(255) NOT NULL, role userrole NOT NULL, is_active BOOLEAN,
        created_at TIMESTAMP NOT NULL
    );
    CREATE TABLE api_keys (
        id SERIAL PRIMARY KEY, user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        name VARCHAR(100) NOT NULL, key_prefix VARCHAR(40) NOT NULL, key_hash VARCHAR(255) NOT NULL UNIQUE,
        permissions TEXT, scopes TEXT[] NOT NULL DEFAULT '{}', expires_at TIMESTAMP, revoked_at TIMESTAMP,
        metadata JSON, secret_note TEXT DEFAULT 'of the other service'
    );";

#[tokio::test]
async fn adopted_tables_of_other_types_have_rotation_filters_import_and_audit() {
    let server = Postgres::start();
    let orm = server.client().await;
    orm.batch_execute("ALTER DATABASE postgres SET timezone = 'Pacific/Auckland'").await.unwrap();
    run(&orm, ORM_TABLES).await;
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let scheme = KeyScheme::builder()
        .format(KeyFormat::structured("acme", "live").unwrap())
        .format(KeyFormat::first_chars(8).unwrap())
        .build()
        .unwrap();
    let manager = KeyManager::new(store.clone()).scheme(scheme.clone()).actor("ada");
    let user = manager.create_user("ada@example.com", "ADMIN").await.unwrap();
    let mut record = KeyRecord::new(0, "sk-12345", user.clone());
    record.name = "imported".to_owned();
    record.scopes = vec!["chat:read".to_owned()];
    record.expires_at = Some(Utc::now() + HOUR);
    let old = "sk-12345-and-a-secret-part-of-forty-bytes";
    let legacy = StoredKey::new(record, KeyHash::bcrypt(old, 4).unwrap());
    let id = store.insert_key(&legacy, &Attribution::default()).await.unwrap().id;
    assert_eq!(
        store.insert_keys(&[legacy], &Attribution::default()).await.unwrap(),
        [Inserted::Duplicate]
    );

    let rotated = manager.rotate(&id, Rotation::default().grace(HOUR)).await.unwrap();
    let node = Authenticator::builder(store.clone()).scheme(scheme).build();
    for secret in [old, rotated.expose_secret()] {
        assert_eq!(node.authenticate(secret).await.unwrap().key().id, id);
    }
    let soon = KeyFilter::default().expires_before(Utc::now() + 2 * HOUR).scope("chat:read");
    let revoked = store.revoke_keys(&soon, &Attribution::default().reason("leak")).await.unwrap();
    assert_eq!(revoked.len(), 1);
    let key = store.find_key(&id).await.unwrap().unwrap();
    let age = Utc::now() - key.record().revoked_at.unwrap();
    assert!(age.num_seconds().abs() < 60, "{age}");
    assert_eq!(key.record().revoke_reason.as_deref(), Some("leak"));

    let page = store.list_audit(&ListAudit::default().key(id)).await.unwrap();
    assert_eq!(page.entries.len(), 3, "{page:?}");
    for entry in &page.entries {
        let text = json!([entry.before, entry.after]).to_string();
        assert!(!text.contains("other service") && !text.contains("$2"), "{text}");
        let has_note = |row: &Value| row.get("secret_note").is_some();
        assert!(![&entry.before, &entry.after].into_iter().flatten().any(has_note));
    }
    // The foreign key is left as it is: the deletion of the user deletes the keys, and all of it is audited.
    run(&orm, "DELETE FROM api_key_audit; DELETE FROM users").await;
    let actions: Vec<_> = audit(&store).await.into_iter().map(|entry| entry.0).collect();
    assert_eq!(actions, [AuditAction::DeleteUser, AuditAction::Delete]);
}

#[tokio::test]
async fn keys_keep_their_user_in_tables_of_this_crate_also_after_a_migration_from_before() {
    let db = database().await;
    let key = db.key().await;
    let deleted = format!("DELETE FROM users WHERE id = {}", key.owner);
    assert!(db.admin.batch_execute(&deleted).await.is_err());
    let conflict = db.store.delete_user(&key.owner.into(), &Attribution::default()).await;
    assert!(conflict.unwrap_err().to_string().contains("the user owns keys"));
    // Back to the version before, and up again.
    let down = include_str!("../../schema/postgres/2026-11-26-000005_management/down.sql");
    db.run(&format!(
        "{down}; DELETE FROM __diesel_schema_migrations WHERE version LIKE '20261126%'"
    ))
    .await;
    let cascades = "SELECT count(*) FROM pg_constraint WHERE conrelid = 'api_keys'::regclass AND confdeltype = 'c'";
    assert_eq!(db.number(cascades).await, 1);
    db.store.migrate().await.unwrap();
    assert_eq!(db.number(cascades).await, 0);
    assert!(db.store.find_key(&key.id.into()).await.unwrap().is_some());
    assert!(db.admin.batch_execute(&deleted).await.is_err());
    // Another table refers to a user without keys.
    db.run(&format!(
        "DELETE FROM api_keys; CREATE TABLE orders (user_id BIGINT REFERENCES users); INSERT INTO orders VALUES ({})",
        key.owner
    ))
    .await;
    let conflict = db.store.delete_user(&key.owner.into(), &Attribution::default()).await;
    assert_eq!(conflict.unwrap_err().kind(), StoreErrorKind::Conflict);
    db.run("DELETE FROM orders").await;
    assert!(
        db.store.delete_user(&key.owner.into(), &Attribution::default()).await.unwrap().is_some()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn of_concurrent_replacements_of_one_revision_exactly_one_wins() {
    let db = database().await;
    let id = KeyId::from(db.key().await.id);
    for round in 0..200 {
        let old = db.store.find_key(&id).await.unwrap().unwrap();
        let edits = (0..2).map(|n| {
            let (store, old) = (db.store.clone(), old.clone());
            let mut record = old.record().clone();
            record.name = format!("{round}-{n}");
            tokio::spawn(async move {
                let new = old.clone().with_record(record);
                store.replace_key(&old, &new, &Attribution::default()).await
            })
        });
        let mut won = Vec::new();
        for edit in edits.collect::<Vec<_>>() {
            match edit.await.unwrap() {
                Ok(record) => won.push(record.unwrap()),
                Err(error) => assert_eq!(error.kind(), StoreErrorKind::Conflict, "{error}"),
            }
        }
        assert_eq!(won.len(), 1, "round {round}");
        let stored = db.store.find_key(&id).await.unwrap().unwrap();
        assert_eq!(
            (&stored.record().name, stored.record().revision),
            (&won[0].name, won[0].revision)
        );
    }
    assert_eq!(audit(&db.store).await.len(), 100);
    let manager = KeyManager::new(db.store.clone());
    let stale = manager.update(&id, &KeyPatch::default().name("x"), Some(Revision(1))).await;
    assert!(matches!(stale, Err(ManageError::Conflict { .. })), "{stale:?}");
}

#[tokio::test]
async fn entries_of_a_dump_get_ids_of_this_database() {
    let source = database().await;
    let key = source.key().await;
    let manager = KeyManager::new(source.store.clone()).actor("ada");
    manager.reason("lost").revoke(&key.id.into()).await.unwrap();
    let dump = source.server.program(
        "pg_dump",
        &["-a", "-T", "__diesel_schema_migrations", "postgres"],
        "",
    );
    let target = database().await;
    target.key().await;
    target.run("DELETE FROM api_keys; DELETE FROM users").await;
    target.server.script("postgres", &dump);
    let ids = "SELECT count(*) - count(DISTINCT id) FROM api_key_audit";
    assert_eq!(target.number(ids).await, 0);
    let of_ada = target.store.list_audit(&ListAudit::default().actor("ada")).await.unwrap();
    assert_eq!(of_ada.entries[0].reason.as_deref(), Some("lost"));
    // The dump sets the sequence back.
    target.store.migrate().await.unwrap();
    target.run("UPDATE api_keys SET name = 'x'").await;
    assert_eq!(target.number(ids).await, 0);
}

/// Plans of the statements that the server ran since it was started, as auto_explain logs them.
fn plans(server: &Postgres, of: &str) -> Vec<String> {
    let log = server.log();
    let plans = log.split("plan:").skip(1).filter(|plan| plan.contains(of));
    plans.map(|plan| plan.split("LOG:").next().unwrap_or_default().to_owned()).collect()
}

#[tokio::test]
async fn look_ups_and_lists_use_an_index() {
    let server = Postgres::with_settings(&[
        "session_preload_libraries=auto_explain",
        "auto_explain.log_min_duration=0",
        "log_parameter_max_length=0",
    ]);
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let admin = server.client().await;
    run(
        &admin,
        "SET auto_explain.log_min_duration = -1;
        INSERT INTO users (email) SELECT 'u' || n FROM generate_series(1, 1000) n;
        ALTER TABLE api_keys DISABLE TRIGGER USER;
        INSERT INTO api_keys (user_id, name, key_prefix, key_hash, previous_key_prefix, created_by_key, expires_at)
            SELECT n % 1000 + 1, 'k', 'prefix' || n, 'hash' || n, CASE WHEN n % 10 = 0 THEN 'before' || n END,
                CASE WHEN n % 100 = 0 THEN n / 1000 END, CASE WHEN n % 100 = 0 THEN now() + n * INTERVAL '1 min' END
            FROM generate_series(1, 100000) n;
        ALTER TABLE api_keys ENABLE TRIGGER USER;
        INSERT INTO api_key_audit (action, actor, api_key_id, user_id, at)
            SELECT 'update', 'a' || n % 1000, n % 1000, n % 1000, now() - n * INTERVAL '1 min'
            FROM generate_series(1, 100000) n;
        ANALYZE",
    )
    .await;
    store.migrate().await.unwrap();
    let (now, list) = (Utc::now(), ListKeys::default());
    let filtered = [
        KeyFilter::default(),
        KeyFilter::default().owner(7),
        KeyFilter::default().created_by_key(3),
        KeyFilter::default().expires_before(now + HOUR),
        KeyFilter::default().prefix("prefix777"),
        KeyFilter::default().revoked(),
    ];
    // A statement that is cached gets a plan for any values after five executions.
    for filter in filtered.iter().cycle().take(7 * filtered.len()) {
        store.list_keys(&list.clone().filter(filter.clone()).after(90)).await.unwrap();
    }
    let log = server.log();
    for index in ["pkey", "owner", "created_by_key", "expiring", "prefix", "revoked"] {
        let uses = log.matches(&format!("api_keys_{index}")).count();
        assert!(uses >= 7, "{uses} uses of {index}");
    }
    let list = ListAudit::default();
    for page in [
        list.clone(),
        list.clone().key(5),
        list.clone().user(5),
        list.clone().actor("a5"),
        list.clone().until(now - 24 * HOUR),
        list.before(50_000),
    ] {
        assert!(!store.list_audit(&page).await.unwrap().entries.is_empty(), "{page:?}");
    }
    let issued = KeyManager::new(store.clone()).issue(NewKey::new(1, "k")).await.unwrap();
    let lookup = question(issued.expose_secret()).await;
    store.resolve(&lookup).await.unwrap();
    let users = store.find_user_by_email("u77").await.unwrap().unwrap();
    assert_eq!(users, User::new(77, "u77"));
    let plans = plans(&server, "Query Text");
    let read: Vec<_> = plans
        .iter()
        .filter(|plan| plan.contains("row_to_json") || plan.contains("json_build_object('id'"))
        .collect();
    assert!(read.len() >= 11, "{}", read.len());
    for plan in read {
        // One row of any key gives the type of a column of times.
        let is_large = |line: &&str| {
            let of_table = ["Seq Scan on api_keys", "Seq Scan on api_key_audit"];
            of_table.iter().any(|scan| line.contains(scan)) && !line.contains("api_keys t ")
        };
        let scans: Vec<_> = plan.lines().filter(is_large).collect();
        assert!(scans.is_empty(), "{plan}");
    }
}

#[tokio::test]
async fn a_change_of_the_previous_secret_reaches_nodes_under_its_own_lookup_id() {
    let db = database().await;
    let key = db.key().await;
    let previous = db.key().await;
    db.run(&format!(
        "UPDATE api_keys k SET previous_key_prefix = p.key_prefix, previous_key_hash = p.key_hash,
            previous_expires_at = now() + INTERVAL '1 h'
        FROM api_keys p WHERE k.id = {} AND p.id = {}; DELETE FROM api_keys WHERE id = {}",
        key.id, previous.id, previous.id
    ))
    .await;
    let store = store_at(&db.server.url(), Duration::from_millis(100));
    let node = node_with(store, &previous).await;
    in_sync(&node).await;
    assert_eq!(node.authenticate(&previous.secret).await.unwrap().key().id, KeyId::from(key.id));
    db.run(&format!("UPDATE api_keys SET previous_expires_at = now() WHERE id = {}", key.id)).await;
    eventually("the end of the grace period", async || {
        node.authenticate(&previous.secret).await.is_err()
    })
    .await;
    db.run(&format!(
        "UPDATE api_keys SET previous_expires_at = now() + INTERVAL '1 h' WHERE id = {}",
        key.id
    ))
    .await;
    eventually("the grace period", async || node.authenticate(&previous.secret).await.is_ok())
        .await;
    in_sync(&node).await;
    db.run(&format!("UPDATE api_keys SET previous_key_prefix = NULL WHERE id = {}", key.id)).await;
    eventually("the end of the previous secret", async || {
        node.authenticate(&previous.secret).await.is_err()
    })
    .await;
}

#[tokio::test]
async fn an_import_tells_duplicates_of_the_batch_and_of_the_table_from_missing_users() {
    let db = database().await;
    let owner = User::new(db.key().await.owner, "x");
    let stranger = User::new(99_999, "y");
    let key = |prefix: &str, hash: &str, user: &User| {
        StoredKey::new(KeyRecord::new(0, prefix, user.clone()), KeyHash::sha256(hash))
    };
    let by = Attribution::default().actor("import");
    let first = [key("a", "1", &owner), key("a", "2", &owner), key("a", "1", &owner)];
    use Inserted::{Duplicate, NoUser, Stored};
    assert_eq!(db.store.insert_keys(&first, &by).await.unwrap(), [Stored, Stored, Duplicate]);
    let second = [
        key("b", "1", &stranger),
        key("b", "1", &owner),
        key("b", "1", &stranger),
        key("a", "2", &stranger),
        key("c", "1", &stranger),
        key("c", "2", &owner),
    ];
    let outcomes = db.store.insert_keys(&second, &by).await.unwrap();
    assert_eq!(outcomes, [NoUser, Stored, Duplicate, Duplicate, NoUser, Stored]);
    assert_eq!(db.store.insert_keys(&[], &by).await.unwrap(), []);
    let of_import = db.store.list_audit(&ListAudit::default().actor("import")).await.unwrap();
    assert_eq!(of_import.entries.len(), 4);

    // Two imports of the same keys at once.
    let many: Vec<_> = (0..500).map(|n| key(&format!("m{n}"), "1", &owner)).collect();
    let attempts = [db.store.clone(), store_at(&db.server.url(), HOUR)].map(|store| {
        let (many, by) = (many.clone(), by.clone());
        tokio::spawn(async move { store.insert_keys(&many, &by).await })
    });
    for attempt in attempts {
        let outcome: Result<Vec<Inserted>, StoreError> = attempt.await.unwrap();
        assert_eq!(outcome.unwrap().len(), 500);
    }
    assert_eq!(
        db.number("SELECT count(*) FROM api_keys WHERE key_prefix ~ '^m[0-9]{1,3}$'").await,
        500
    );
}

#[tokio::test]
async fn a_schema_of_another_version_is_logged_when_the_feed_starts() {
    let db = database().await;
    assert_eq!(db.store.schema_version().await.unwrap(), SchemaVersion::Current);
    let (log, _guard) = log::capture();
    let messages = [
        (1, SchemaVersion::Older, "made by an older version of this crate; migrate()"),
        (99, SchemaVersion::Newer, "made by a newer version of this crate"),
    ];
    for (number, version, message) in messages {
        db.run(&format!("COMMENT ON TABLE api_key_changes IS 'tower-api-key {number} abc'")).await;
        assert_eq!(db.store.schema_version().await.unwrap(), version);
        let feed = db.listen(Duration::from_secs(1));
        feed.all().await;
        assert!(log.take().contains(message), "{version:?}");
    }
    db.run("DROP SCHEMA public CASCADE; CREATE SCHEMA public").await;
    assert_eq!(db.store.schema_version().await.unwrap(), SchemaVersion::None);
}

#[tokio::test]
async fn keys_of_adopted_tables_are_listed_and_revoked_by_their_prefix_whatever_the_type_is() {
    let server = Postgres::start();
    let admin = server.client().await;
    run(
        &admin,
        "CREATE COLLATION any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
    )
    .await;
    for (at, kind) in ["VARCHAR(20)", "TEXT COLLATE any_case"].into_iter().enumerate() {
        run(&admin, &format!("CREATE DATABASE d{at} TEMPLATE postgres")).await;
        let orm = connect(&server.database_url(&format!("d{at}"))).await;
        run(
            &orm,
            &format!(
                "CREATE TABLE users (id SERIAL PRIMARY KEY, email TEXT NOT NULL);
                CREATE TABLE api_keys (id SERIAL PRIMARY KEY, user_id INTEGER NOT NULL, key_prefix {kind} NOT NULL,
                    key_hash TEXT NOT NULL);
                INSERT INTO users (email) VALUES ('a');
                INSERT INTO api_keys (user_id, key_prefix, key_hash)
                    SELECT 1, prefix, 'sha256$' || repeat('ab', 32)
                    FROM unnest(ARRAY['ab1', 'ab~', 'aB1', 'ac1', 'a', 'b~1']) AS prefix"
            ),
        )
        .await;
        let store = PostgresStore::new(&server.database_url(&format!("d{at}"))).unwrap();
        store.migrate().await.unwrap();
        assert!(store.pending_migrations().await.unwrap().is_empty());
        let own = "SELECT count(*) FROM pg_class WHERE relname = 'api_keys_prefix'";
        assert_eq!(number(&orm, own).await, 0);
        for (prefix, found) in
            [("ab", &[1, 2][..]), ("ab~", &[2]), ("a", &[1, 2, 3, 4, 5]), ("b~", &[6])]
        {
            let page = ListKeys::default().filter(KeyFilter::default().prefix(prefix));
            let listed = store.list_keys(&page).await.unwrap().keys;
            let ids: Vec<_> = listed.iter().filter_map(|key| key.id.as_i64()).collect();
            assert_eq!(ids, found, "{kind} {prefix}");
        }
        let (filter, by) = (KeyFilter::default().prefix("ab"), Attribution::default());
        assert_eq!(store.revoke_keys(&filter, &by).await.unwrap().len(), 2, "{kind}");
    }
}
