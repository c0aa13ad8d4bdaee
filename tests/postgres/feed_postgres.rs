//! Which changes in PostgreSQL a node receives, from any writer and through faults of the connection.

use std::time::{Duration, Instant, SystemTime};

use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, NewKey, RedisCache,
    denial::InvalidKey,
    key::{KeyFormat, KeyHash},
    record::KeyRecord,
    redis::RedisState,
    store::{Attribution, Change, KeyRepository, KeyStore, StoredKey},
};

use crate::support::{
    self,
    database::{
        Database, Key, NEVER, NOTIFIED, connect, database, database_with, denial_of,
        in_sync_by_notification, is_denied, node_with, store_at, url_of_role,
    },
    feed::{FeedRecorder, eventually, in_sync, within},
    proxy::Proxy,
    servers::{Postgres, Redis},
};

/// Where Redis has what is known of the key.
fn entry_of(redis: &Redis, key: &Key) -> String {
    let hex: String = key.prefix.bytes().map(|byte| format!("{byte:02x}")).collect();
    redis.command(&["KEYS", &format!("api_key:data:*{{{hex}}}")])
}

/// Connects as another role.
async fn as_role(db: &Database, role: &str) -> tokio_postgres::Client {
    connect(&url_of_role(&db.server.url(), role)).await
}

/// Makes the deletion of a user delete its keys, as in many adopted tables.
async fn cascade(db: &Database) {
    db.run(
        "ALTER TABLE api_keys DROP CONSTRAINT api_keys_user_id_fkey,
        ADD CONSTRAINT api_keys_user_id_fkey FOREIGN KEY (user_id) REFERENCES users ON DELETE CASCADE",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_changed_by_hand_reaches_a_node_that_has_it_in_its_cache() {
    let db = database().await;
    cascade(&db).await;
    let node = node_with(db.store.clone(), &db.key().await).await;
    let other_hash = KeyHash::bcrypt("tak_live_another", 4).unwrap().expose_hash();
    for (change, expected) in [
        ("UPDATE api_keys SET is_active = FALSE WHERE id = $KEY", InvalidKey::Revoked),
        ("UPDATE api_keys SET expires_at = now() WHERE id = $KEY", InvalidKey::Expired),
        ("UPDATE api_keys SET key_hash = '$HASH' WHERE id = $KEY", InvalidKey::WrongSecret),
        ("UPDATE api_keys SET key_prefix = 'moved' || id WHERE id = $KEY", InvalidKey::Unknown),
        ("UPDATE users SET is_active = FALSE WHERE id = $OWNER", InvalidKey::OwnerInactive),
        ("DELETE FROM api_keys WHERE id = $KEY", InvalidKey::Unknown),
        ("DELETE FROM users WHERE id = $OWNER", InvalidKey::Unknown),
        // As an insert that meets a conflict, and as one statement for many.
        (
            "INSERT INTO api_keys (id, user_id, key_prefix, key_hash) SELECT id, user_id, key_prefix, key_hash
                FROM api_keys WHERE id = $KEY ON CONFLICT (id) DO UPDATE SET is_active = FALSE",
            InvalidKey::Revoked,
        ),
        (
            "WITH gone AS (DELETE FROM api_keys WHERE id = $KEY RETURNING *) SELECT count(*) FROM gone",
            InvalidKey::Unknown,
        ),
        // What replication does.
        (
            "SET session_replication_role = replica;
            UPDATE api_keys SET is_active = FALSE WHERE id = $KEY; RESET session_replication_role",
            InvalidKey::Revoked,
        ),
        (
            "SET session_replication_role = replica;
            UPDATE users SET is_active = FALSE WHERE id = $OWNER; RESET session_replication_role",
            InvalidKey::OwnerInactive,
        ),
        (
            "SET session_replication_role = replica;
            DELETE FROM api_keys WHERE id = $KEY; RESET session_replication_role",
            InvalidKey::Unknown,
        ),
        // A function that another role calls with a search_path of their own.
        (
            "SET search_path = pg_catalog; UPDATE public.api_keys SET is_active = FALSE WHERE id = $KEY;
            RESET search_path",
            InvalidKey::Revoked,
        ),
        // In a part of a transaction, of which another part is taken back.
        (
            "BEGIN; SAVEPOINT a; DELETE FROM api_keys WHERE id = $KEY; ROLLBACK TO a;
            UPDATE api_keys SET is_active = FALSE WHERE id = $KEY; COMMIT",
            InvalidKey::Revoked,
        ),
    ] {
        let key = db.key().await;
        node.authenticate(&key.secret).await.unwrap();
        in_sync_by_notification(&db, &node).await;
        assert_eq!(denial_of(&node, &key).await, None);
        let change = change
            .replace("$KEY", &key.id.to_string())
            .replace("$OWNER", &key.owner.to_string())
            .replace("$HASH", &other_hash);
        db.run(&change).await;
        let took = is_denied(&node, &key, expected).await;
        println!("{took:?} {change}");
    }

    let key = db.key().await;
    let caller = node.authenticate(&key.secret).await.unwrap();
    assert_eq!((caller.scopes(), &*caller.user().role), (&["read".to_owned()][..], "user"));
    db.run(&format!("UPDATE api_keys SET scopes = '[\"write\"]' WHERE id = {}", key.id)).await;
    db.run(&format!("UPDATE users SET role = 'admin' WHERE id = {}", key.owner)).await;
    within(NOTIFIED, "the new scopes and role", async || {
        let caller = node.authenticate(&key.secret).await.unwrap();
        caller.scopes() == ["write"] && caller.user().role == "admin"
    })
    .await;

    // An unknown key is an answer too.
    let back = db.key().await;
    db.run(&format!("UPDATE api_keys SET key_prefix = 'away' WHERE id = {}", back.id)).await;
    eventually("the key to be gone", async || denial_of(&node, &back).await.is_some()).await;
    let home = format!("UPDATE api_keys SET key_prefix = '{}' WHERE id = {}", back.prefix, back.id);
    db.run(&home).await;
    within(NOTIFIED, "the key to be back", async || denial_of(&node, &back).await.is_none()).await;

    let (a, b) = (db.key().await, db.key().await);
    node.authenticate(&a.secret).await.unwrap();
    node.authenticate(&b.secret).await.unwrap();
    db.run("TRUNCATE users CASCADE").await;
    is_denied(&node, &a, InvalidKey::Unknown).await;
    is_denied(&node, &b, InvalidKey::Unknown).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_feed_says_what_a_change_is_about_and_nothing_of_usage_or_other_peoples_columns() {
    let db = database().await;
    let key = db.key().await;
    db.run(
        "ALTER TABLE api_keys ADD COLUMN department TEXT; ALTER TABLE users ADD COLUMN phone TEXT",
    )
    .await;
    let recorder = db.listen(Duration::from_millis(50));
    recorder.all().await;
    let revisions = || async {
        let key = "SELECT max(api_key_revision) FROM api_keys";
        let user = "SELECT max(api_key_revision) FROM users";
        let rows = "SELECT count(*) FROM api_key_changes";
        (db.number(key).await, db.number(user).await, db.number(rows).await)
    };
    let before = revisions().await;
    for nothing in [
        "UPDATE api_keys SET total_requests = total_requests + 1, total_tokens = 5, total_cost = 1.5",
        "UPDATE api_keys SET last_used_at = now(), updated_at = now(), created_at = now()",
        "UPDATE api_keys SET fast_hash = 'x', fast_hash_of = key_hash",
        "UPDATE api_keys SET department = 'research'",
        "UPDATE users SET phone = '1', updated_at = now()",
        // An ORM that writes all that it has read.
        "UPDATE api_keys SET user_id = user_id, name = name, key_prefix = key_prefix, key_hash = key_hash,
            is_active = is_active, permissions = permissions, scopes = '[ \"read\" ]',
            rate_limit_per_minute = rate_limit_per_minute, allowed_models = allowed_models,
            allowed_ips = allowed_ips, expires_at = expires_at, metadata = metadata, total_requests = 9",
        "UPDATE users SET email = email, role = role, is_active = is_active",
        "BEGIN; UPDATE api_keys SET is_active = FALSE; ROLLBACK",
        "UPDATE api_keys SET is_active = FALSE WHERE id = -1",
        // The triggers alone set it.
        "UPDATE api_keys SET api_key_revision = 0",
        "UPDATE users SET api_key_revision = api_key_revision + 1000",
    ] {
        db.run(nothing).await;
        assert_eq!(revisions().await, before, "{nothing}");
        assert_eq!(recorder.all().await, [], "{nothing}");
    }
    let prefix = format!("prefix {}", key.prefix);
    let owner = format!("owner {}", key.owner);
    for column in [
        "user_id = $OTHER",
        "name = 'x'",
        "key_hash = 'x'",
        "is_active = FALSE",
        "permissions = '[\"x\"]'",
        "scopes = '[]'",
        "rate_limit_per_minute = 1",
        "rate_limit_per_hour = 1",
        "rate_limit_per_day = 1",
        "allowed_models = '[\"x\"]'",
        "allowed_endpoints = '[\"/x\"]'",
        "allowed_ips = '[\"::1\"]'",
        "is_unlimited = TRUE",
        "budget_limit_cents = 1",
        "budget_type = 'daily'",
        "expires_at = now()",
        "metadata = '{}'",
        "id = id + 1000000",
    ] {
        let other = db.key().await;
        recorder.all().await;
        let column = column.replace("$OTHER", &other.owner.to_string());
        let rule = format!("UPDATE api_keys SET {column} WHERE key_prefix = '{}'", key.prefix);
        db.run(&rule).await;
        assert_eq!(recorder.subjects().await, std::slice::from_ref(&prefix), "{column}");
    }
    for column in ["email = 'x'", "role = 'x'", "is_active = FALSE"] {
        db.run(&format!("UPDATE users SET {column} WHERE id = {}", key.owner)).await;
        assert_eq!(recorder.subjects().await, std::slice::from_ref(&owner), "{column}");
    }
    db.run(&format!(
        "UPDATE api_keys SET key_prefix = 'moved' WHERE key_prefix = '{}'",
        key.prefix
    ))
    .await;
    let mut both = ["prefix moved".to_owned(), prefix];
    both.sort();
    assert_eq!(recorder.subjects().await, both);
    db.run("TRUNCATE api_keys").await;
    assert_eq!(recorder.subjects().await, ["reset"]);
    db.run(&format!("DELETE FROM users WHERE id = {}", key.owner)).await;
    assert_eq!(recorder.subjects().await, [owner]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_foreign_trigger_makes_of_an_update_is_seen() {
    let db = database().await;
    let key = db.key().await;
    db.run(
        "CREATE FUNCTION too_dear() RETURNS TRIGGER LANGUAGE plpgsql AS $$
        BEGIN NEW.is_active := NEW.total_cost < 100; RETURN NEW; END $$;
        CREATE TRIGGER too_dear BEFORE UPDATE ON api_keys FOR EACH ROW EXECUTE FUNCTION too_dear()",
    )
    .await;
    let node = node_with(db.store.clone(), &key).await;
    db.run("UPDATE api_keys SET total_cost = 99").await;
    assert_eq!(denial_of(&node, &key).await, None);
    db.run("UPDATE api_keys SET total_cost = 101").await;
    is_denied(&node, &key, InvalidKey::Revoked).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_do_nothing_else_can_revoke_and_others_can_not_make_changes_up() {
    let db = database().await;
    let key = db.key().await;
    let node = node_with(db.store.clone(), &key).await;
    db.run(
        "CREATE ROLE revoker LOGIN; GRANT UPDATE (is_active), SELECT (id) ON api_keys TO revoker;
        CREATE ROLE nobody_much LOGIN",
    )
    .await;
    let revoker = as_role(&db, "revoker").await;
    for forbidden in [
        "SELECT key_hash FROM api_keys",
        "SELECT * FROM api_key_cache_secrets",
        "SELECT * FROM api_key_changes",
        "INSERT INTO api_key_changes (key_prefix) VALUES ('x')",
        "DELETE FROM api_key_changes",
        "UPDATE api_keys SET api_key_revision = 0",
        "SELECT nextval('api_key_revisions')",
        "SELECT setval('api_key_revisions', 1)",
        "TRUNCATE api_keys",
    ] {
        let error = revoker.batch_execute(forbidden).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42501", "{forbidden}: {error:?}");
    }
    let revoke = format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", key.id);
    revoker.batch_execute(&revoke).await.unwrap();
    is_denied(&node, &key, InvalidKey::Revoked).await;

    // Through a trigger on a table of one's own, the functions would write what one likes.
    let nobody = as_role(&db, "nobody_much").await;
    nobody
        .batch_execute(
            "CREATE TEMP TABLE mine (id BIGINT, key_prefix TEXT, api_key_revision BIGINT)",
        )
        .await
        .unwrap();
    for function in ["revise_key", "revise_user", "note_key", "note_user", "note_all"] {
        let trigger = format!(
            "CREATE TRIGGER {function} AFTER UPDATE ON mine
            FOR EACH ROW EXECUTE FUNCTION api_key_{function}()"
        );
        let outcome = nobody.batch_execute(&trigger).await;
        let code = outcome.as_ref().err().and_then(|error| error.code()).map(|code| code.code());
        assert_eq!(code, Some("42501"), "{function}: {outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_read_the_changes_reads_keys_and_its_feed_names_the_table() {
    let db = database().await;
    let key = db.key().await;
    db.run("CREATE ROLE reader LOGIN; GRANT SELECT ON users, api_keys TO reader").await;
    let url = db.server.url().replacen("app@", "reader@", 1);
    let node = Authenticator::new(store_at(&url, Duration::from_millis(100)));
    node.authenticate(&key.secret).await.unwrap();
    eventually("the feed's fault", async || {
        format!("{:?}", node.health().feed).contains("api_key_changes")
    })
    .await;
    assert_eq!(node.health().last_sync, None);
    db.run("GRANT SELECT ON api_key_changes TO reader").await;
    eventually("the key", async || node.authenticate(&key.secret).await.is_ok()).await;
    eventually("the feed", async || node.health().last_sync.is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_commits_late_is_not_missed() {
    let db = database().await;
    let keys = [db.key().await, db.key().await, db.key().await];
    let node = node_with(db.store.clone(), &keys[0]).await;
    let recorder = db.listen(Duration::from_millis(50));
    // Twice: what was committed while another transaction was under way may be reported again.
    recorder.all().await;
    recorder.all().await;
    let mut others = [db.server.client().await, db.server.client().await];
    let [first, second] = &mut others;
    let (first, second) = (first.transaction().await.unwrap(), second.transaction().await.unwrap());
    let revoke = |key: &Key| format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", key.id);
    first.batch_execute(&revoke(&keys[0])).await.unwrap();
    second.batch_execute(&revoke(&keys[1])).await.unwrap();
    // Many commit while they are held open, with higher revisions and transaction ids.
    for n in 0..50 {
        db.run(&format!("UPDATE api_keys SET name = '{n}' WHERE id = {}", keys[2].id)).await;
    }
    let reported = recorder.subjects().await;
    assert_eq!(reported, [format!("prefix {}", keys[2].prefix)]);
    assert!(node.authenticate(&keys[0].secret).await.is_ok());
    second.commit().await.unwrap();
    assert_eq!(recorder.subjects().await, [format!("prefix {}", keys[1].prefix)]);
    db.run(&format!("UPDATE api_keys SET name = 'again' WHERE id = {}", keys[2].id)).await;
    assert_eq!(recorder.subjects().await, [format!("prefix {}", keys[2].prefix)]);
    // A node that starts now does not see the first one either, and must not miss it.
    let late = db.listen(Duration::from_millis(50));
    late.all().await;
    first.commit().await.unwrap();
    is_denied(&node, &keys[0], InvalidKey::Revoked).await;
    let first = [format!("prefix {}", keys[0].prefix)];
    assert_eq!(recorder.subjects().await, first);
    assert!(late.subjects().await.contains(&first[0]));
    assert_eq!(recorder.all().await, [], "nothing is said twice");
}

/// Two keys that share a lookup prefix, as those from before may.
async fn twins(db: &Database) -> (KeyScheme, [Key; 2]) {
    let scheme = KeyScheme::builder().format(KeyFormat::first_chars(8).unwrap()).build().unwrap();
    let owner =
        db.store.insert_user("twins@example.com", "user", &Attribution::default()).await.unwrap();
    let mut keys = Vec::new();
    for name in ["one", "two"] {
        let secret = format!("sk-12345-{name}");
        let hash = KeyHash::bcrypt(&secret, 4).unwrap();
        let key = StoredKey::new(KeyRecord::new(0, "sk-12345", owner.clone()), hash);
        let id =
            db.store.insert_key(&key, &Attribution::default()).await.unwrap().id.as_i64().unwrap();
        keys.push(Key { id, prefix: "sk-12345".into(), secret, owner: owner.id.as_i64().unwrap() });
    }
    (scheme, keys.try_into().ok().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_keys_of_one_prefix_that_are_changed_in_transactions_that_overlap() {
    let db = database().await;
    let redis = Redis::start();
    let (scheme, keys) = twins(&db).await;
    let node = || {
        let cache = RedisCache::new(db.store.clone(), redis.url().as_str()).unwrap();
        Authenticator::builder(cache).scheme(scheme.clone()).build()
    };
    let hears = async |node: &Authenticator| {
        assert_eq!(denial_of(node, &keys[0]).await, None);
        eventually("a sync", async || node.health().last_sync.is_some()).await;
    };
    let (first_node, absent) = (node(), node());
    hears(&first_node).await;
    hears(&absent).await;
    let mut others = [db.server.client().await, db.server.client().await];
    let [revoke, rename] = &mut others;
    let (revoke, rename) =
        (revoke.transaction().await.unwrap(), rename.transaction().await.unwrap());
    // The lower revision commits last, unless one has to wait for the other.
    let sql = format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", keys[0].id);
    revoke.batch_execute(&sql).await.unwrap();
    let sql = format!(
        "SET lock_timeout = '300ms'; UPDATE api_keys SET name = 'x' WHERE id = {}",
        keys[1].id
    );
    if rename.batch_execute(&sql).await.is_ok() {
        rename.commit().await.unwrap();
    }
    // An entry with the higher revision, from before the revoke.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let revision = db.number("SELECT max(revision) FROM api_key_changes").await;
    let secret = db.number("SELECT max(id) FROM api_key_cache_secrets").await;
    let wanted = format!("tak1s{secret:020}{revision:020}");
    eventually("an entry", async || {
        for key in [&keys[1], &keys[0]] {
            first_node.invalidate("sk-12345");
            assert_eq!(denial_of(&first_node, key).await, None);
        }
        redis.command(&["GET", &entry_of(&redis, &keys[0])]).starts_with(&wanted)
            && redis.command(&["KEYS", "api_key:verified:*"]).lines().count() == 2
    })
    .await;
    revoke.commit().await.unwrap();
    // One that receives both at once, before anybody has put a newer entry there.
    let cache = RedisCache::new(db.store.clone(), redis.url().as_str()).unwrap();
    let starting = Authenticator::builder(cache.clone()).scheme(scheme.clone()).build();
    eventually("a node that asks Redis", async || {
        let _ = starting.authenticate("sk-99999-nobody").await;
        starting.invalidate("sk-99999");
        starting.health().last_sync.is_some() && cache.state() == RedisState::Up
    })
    .await;
    assert!(redis.command(&["GET", &entry_of(&redis, &keys[0])]).starts_with(&wanted));
    let denied = denial_of(&starting, &keys[0]).await;
    assert_eq!(denied, Some(InvalidKey::Revoked), "a node that has just started");
    is_denied(&first_node, &keys[0], InvalidKey::Revoked).await;
    is_denied(&absent, &keys[0], InvalidKey::Revoked).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changed_while_the_connection_was_cut_is_made_up_for() {
    let db = database().await;
    let proxy = Proxy::start(db.server.port());
    let url = proxy.url(&db.server.tcp_url("sslmode=disable"));
    let node = node_with(store_at(&url, Duration::from_millis(500)), &db.key().await).await;
    let cached = async || {
        let key = db.key().await;
        node.authenticate(&key.secret).await.unwrap();
        in_sync_by_notification(&db, &node).await;
        node.authenticate(&key.secret).await.unwrap();
        key
    };
    let revoke = async |key: &Key| {
        db.run(&format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", key.id)).await;
    };

    let key = cached().await;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity 
        WHERE (query LIKE '%api_key_beat%' OR query LIKE '%pg_current_snapshot() AS now%') AND pid <> pg_backend_pid()";
    assert!(!db.admin.query(end, &[]).await.unwrap().is_empty());
    revoke(&key).await;
    is_denied(&node, &key, InvalidKey::Revoked).await;

    let key = cached().await;
    proxy.reset();
    revoke(&key).await;
    is_denied(&node, &key, InvalidKey::Revoked).await;

    let key = cached().await;
    proxy.refuse();
    revoke(&key).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(denial_of(&node, &key).await, None, "within the rule of age");
    proxy.pass();
    within(Duration::from_secs(3), "the revoke", async || denial_of(&node, &key).await.is_some())
        .await;

    let key = cached().await;
    proxy.black_hole();
    revoke(&key).await;
    // Past the poll and the deadline of the feed: the connection is given up and another one tried.
    let limit = Duration::from_secs(4);
    within(limit, "the end of syncs", async || {
        node.health().last_sync.unwrap() > Duration::from_secs(1)
    })
    .await;
    let before = proxy.connections();
    within(limit, "another connection", async || proxy.connections() > before).await;
    proxy.pass();
    within(Duration::from_secs(4), "the revoke", async || denial_of(&node, &key).await.is_some())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_notifications_a_change_is_received_at_the_next_poll() {
    let db = database().await;
    db.run(
        "CREATE OR REPLACE FUNCTION api_key_notify() RETURNS VOID LANGUAGE plpgsql AS 'BEGIN END'",
    )
    .await;
    let poll = Duration::from_millis(400);
    let first = db.key().await;
    let node = node_with(store_at(&db.server.url(), poll), &first).await;
    for _ in 0..3 {
        let key = db.key().await;
        node.authenticate(&key.secret).await.unwrap();
        in_sync(&node).await;
        node.authenticate(&key.secret).await.unwrap();
        db.run(&format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", key.id)).await;
        let limit = poll + Duration::from_millis(300);
        within(limit, "the revoke", async || denial_of(&node, &key).await.is_some()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn notifications_that_anybody_may_send_change_nothing_and_stop_nothing() {
    let db = database().await;
    let key = db.key().await;
    let node = node_with(db.store.clone(), &key).await;
    let recorder = db.listen(NEVER);
    recorder.all_after(&db).await;
    db.run("CREATE ROLE stranger LOGIN").await;
    let stranger = as_role(&db, "stranger").await;
    // Each in a transaction of its own, or they would be one; and in one, with payloads.
    let flood = tokio::spawn(async move {
        let payload = format!("{{\"Prefix\":[\"{}\",9223372036854775807]}}", "x".repeat(7000));
        for _ in 0..20 {
            let one = "NOTIFY api_key_changes, 'reset'; COMMIT; BEGIN;".repeat(250);
            stranger.batch_execute(&format!("BEGIN; {one} COMMIT")).await.unwrap();
            let many = format!(
                "SELECT pg_notify('api_key_changes', n || '{payload}') FROM generate_series(1, 250) AS n"
            );
            stranger.batch_execute(&many).await.unwrap();
        }
    });
    let mut answers = 0;
    while !flood.is_finished() {
        assert_eq!(denial_of(&node, &key).await, None);
        answers += 1;
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    flood.await.unwrap();
    assert!(answers > 10);
    assert_eq!(recorder.so_far(), []);
    db.run(&format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", key.id)).await;
    is_denied(&node, &key, InvalidKey::Revoked).await;
    recorder.all_after(&db).await;
}

trait Poked {
    async fn all_after(&self, db: &Database) -> Vec<Change>;
}

impl Poked for FeedRecorder {
    /// For a feed whose next poll is far away.
    async fn all_after(&self, db: &Database) -> Vec<Change> {
        let all = self.all();
        let poke = async {
            loop {
                db.run("NOTIFY api_key_changes").await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            all = all => all,
            never = poke => never,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_restored_from_an_old_copy_is_another_one() {
    let mut db = database().await;
    let (revoked_later, made_valid_later) = (db.key().await, db.key().await);
    let sql = format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", made_valid_later.id);
    db.run(&sql).await;
    db.server.save_copy();
    db.admin = db.server.client().await;
    let recorder = db.listen(Duration::from_millis(50));
    let node =
        node_with(store_at(&db.server.url(), Duration::from_millis(100)), &revoked_later).await;
    let turn = |key: &Key, active: bool| {
        format!("UPDATE api_keys SET is_active = {active} WHERE id = {}", key.id)
    };
    db.run(&turn(&revoked_later, false)).await;
    db.run(&turn(&made_valid_later, true)).await;
    is_denied(&node, &revoked_later, InvalidKey::Revoked).await;
    eventually("the key", async || denial_of(&node, &made_valid_later).await.is_none()).await;
    recorder.all().await;

    db.server.start_again_from_copy();
    db.admin = db.server.client().await;
    let answer = async |key: &Key| match node.authenticate(&key.secret).await {
        Ok(_) => "accepted".to_owned(),
        Err(denial) => denial.to_string(),
    };
    let limit = Duration::from_secs(4);
    within(limit, "what the copy says", async || {
        answer(&made_valid_later).await == "the API key was revoked"
            && answer(&revoked_later).await == "accepted"
    })
    .await;
    within(limit, "a reset", async || recorder.so_far().contains(&Change::Reset)).await;
    // It goes on from there.
    db.run(&turn(&revoked_later, false)).await;
    is_denied(&node, &revoked_later, InvalidKey::Revoked).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_database_whose_next_change_has_the_number_of_the_last_one_is_another_one() {
    let mut db = database().await;
    let (renamed, revoked) = (db.key().await, db.key().await);
    db.server.save_copy();
    db.admin = db.server.client().await;
    let proxy = Proxy::start(db.server.port());
    let url = proxy.url(&db.server.tcp_url("sslmode=disable"));
    let node = node_with(store_at(&url, Duration::from_millis(100)), &revoked).await;
    db.run(&format!("UPDATE api_keys SET name = 'x' WHERE id = {}", renamed.id)).await;
    within(NOTIFIED, "the name", async || {
        node.authenticate(&renamed.secret).await.unwrap().key().name == "x"
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let last =
        "SELECT json_agg(c)::text FROM (SELECT revision, xid::text FROM api_key_changes) AS c";
    let before: String = db.admin.query_one(last, &[]).await.unwrap().get(0);
    proxy.refuse();
    db.server.start_again_from_copy();
    db.admin = db.server.client().await;
    let wanted = db_before_last(&before);
    while db.number("SELECT pg_current_xact_id()::text").await < wanted {}
    db.run(&format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", revoked.id)).await;
    let after: String = db.admin.query_one(last, &[]).await.unwrap().get(0);
    assert_eq!(before, after, "the same transaction id and revision, or this tests nothing");
    proxy.pass();
    let limit = Duration::from_secs(5);
    within(limit, "the revoke", async || node.authenticate(&revoked.secret).await.is_err()).await;
}

/// The transaction id before the last one in the list.
fn db_before_last(rows: &str) -> i64 {
    let rows: serde_json::Value = serde_json::from_str(rows).unwrap();
    let last = rows.as_array().unwrap().last().unwrap()["xid"].as_str().unwrap();
    last.parse::<i64>().unwrap() - 1
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_transaction_ids_that_wrote_nothing_are_given_again_and_no_change_is_missed()
{
    let mut db = database_with(Postgres::with_settings(&["wal_writer_delay=10s"])).await;
    let keys = [db.key().await, db.key().await, db.key().await];
    // Each beat of the feed is a transaction that writes nothing, so that nobody waits until it is on disk.
    let node = node_with(store_at(&db.server.url(), Duration::from_millis(10)), &keys[0]).await;
    for key in &keys {
        node.authenticate(&key.secret).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = db.number("SELECT pg_snapshot_xmin(pg_current_snapshot())::text").await;
    db.server.kill();
    db.server.start_again();
    db.admin = db.server.client().await;
    for (n, key) in keys.iter().enumerate() {
        db.run(&format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", key.id)).await;
        let given = db.number("SELECT max(xid::text::bigint) FROM api_key_changes").await;
        println!("{before} before the crash, {given} after it");
        within(Duration::from_secs(4), &format!("revoke {n}"), async || {
            matches!(node.authenticate(&key.secret).await, Err(Denial::InvalidKey(_)))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tombstone_from_before_a_restore_keeps_no_key_out() {
    let mut db = database().await;
    let redis = Redis::start();
    let key = db.key().await;
    db.server.save_copy();
    db.admin = db.server.client().await;
    let url = db.server.url();
    let node = || {
        let store = store_at(&url, Duration::from_millis(100));
        Authenticator::new(RedisCache::new(store, redis.url().as_str()).unwrap())
    };
    let a = node_with_nothing(node(), &key).await;
    for n in 0..10 {
        db.run(&format!("UPDATE api_keys SET name = '{n}' WHERE id = {}", key.id)).await;
    }
    db.run(&format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", key.id)).await;
    // Nobody asks for the key, which would put an entry in its place.
    let revision = db.number("SELECT max(revision) FROM api_key_changes").await;
    let secret = db.number("SELECT max(id) FROM api_key_cache_secrets").await;
    eventually("the tombstone", async || {
        let tombstone = format!("tak1t{secret:020}{revision:020}");
        redis.command(&["GET", &entry_of(&redis, &key)]).starts_with(&tombstone)
    })
    .await;
    db.server.start_again_from_copy();
    db.admin = db.server.client().await;
    let (b, limit) = (node(), Duration::from_secs(5));
    within(limit, "the node that was there", async || a.authenticate(&key.secret).await.is_ok())
        .await;
    within(limit, "a new node", async || b.authenticate(&key.secret).await.is_ok()).await;
    // Not only from their memory: what they hold is dropped.
    for node in [&a, &b] {
        eventually("a sync", async || node.health().last_sync.is_some()).await;
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            node.invalidate(&key.prefix);
            node.authenticate(&key.secret).await.unwrap();
        }
    }
}

async fn node_with_nothing(node: Authenticator, key: &Key) -> Authenticator {
    node.authenticate(&key.secret).await.unwrap();
    eventually("the first sync", async || node.health().last_sync.is_some()).await;
    node
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_starts_receives_what_became_visible_in_the_last_hour_before_its_first_sync() {
    let db = database().await;
    cascade(&db).await;
    let (key, old, long) = (db.key().await, db.key().await, db.key().await);
    db.run(&format!("UPDATE api_keys SET name = 'x' WHERE id = {}", old.id)).await;
    // Begun before the hour, and committed within it: two hours after the trigger ran.
    let mut late = db.server.client().await;
    let late = late.transaction().await.unwrap();
    let revoke = format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", long.id);
    late.batch_execute(&revoke).await.unwrap();
    db.run(
        "SELECT api_key_prune(); UPDATE api_key_horizons SET taken_at = now() - interval '2 hours'",
    )
    .await;
    db.run(&format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", key.id)).await;
    db.run(&format!("DELETE FROM users WHERE id = {}", key.owner)).await;
    late.commit().await.unwrap();

    let since = SystemTime::now() - Duration::from_secs(3600);
    let mut changes = db.store.changes(since);
    let mut reported = Vec::new();
    loop {
        let change = std::future::poll_fn(|cx| {
            futures_util::Stream::poll_next(std::pin::Pin::new(&mut changes), cx)
        });
        match change.await.unwrap() {
            Change::Synced(_) => break,
            change => reported.push(support::feed::subject(&change)),
        }
    }
    assert!(reported.contains(&format!("prefix {}", key.prefix)), "{reported:?}");
    assert!(reported.contains(&format!("owner {}", key.owner)), "{reported:?}");
    assert!(reported.contains(&format!("prefix {}", long.prefix)), "{reported:?}");
    assert!(!reported.contains(&format!("prefix {}", old.prefix)), "{reported:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn more_changes_at_once_than_can_be_reported_are_a_reset() {
    let db = database().await;
    let key = db.key().await;
    let node = node_with(db.store.clone(), &key).await;
    let recorder = db.listen(Duration::from_millis(50));
    recorder.all().await;
    let insert = |count: usize| {
        format!(
            "INSERT INTO api_keys (user_id, key_prefix, key_hash)
            SELECT {}, 'p' || random(), 'x' FROM generate_series(1, {count})",
            key.owner
        )
    };
    db.run(&insert(10_000)).await;
    let reported = recorder.all().await;
    assert_eq!((reported.len(), reported.contains(&Change::Reset)), (10_000, false));
    db.run(&format!(
        "BEGIN; {}; UPDATE api_keys SET is_active = FALSE WHERE id = {}; COMMIT",
        insert(10_001),
        key.id
    ))
    .await;
    is_denied(&node, &key, InvalidKey::Revoked).await;
    assert_eq!(recorder.all().await, [Change::Reset]);
    // And once, not at every read.
    assert_eq!(recorder.all().await, []);
    db.run(&format!("UPDATE api_keys SET is_active = TRUE WHERE id = {}", key.id)).await;
    assert_eq!(recorder.subjects().await, [format!("prefix {}", key.prefix)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_deleted_and_put_back_can_be_let_in_again() {
    let db = database().await;
    cascade(&db).await;
    let key = db.key().await;
    let node = node_with(db.store.clone(), &key).await;
    db.run(
        "CREATE TABLE saved_users AS TABLE users; CREATE TABLE saved_keys AS TABLE api_keys;
        DELETE FROM users",
    )
    .await;
    is_denied(&node, &key, InvalidKey::Unknown).await;
    // As people do it: some columns, and defaults for the rest.
    db.run(
        "INSERT INTO users (id, email, role) SELECT id, email, role FROM saved_users;
        INSERT INTO api_keys (id, user_id, name, key_prefix, key_hash)
            SELECT id, user_id, name, key_prefix, key_hash FROM saved_keys",
    )
    .await;
    let mut last = None;
    let limit = Instant::now() + Duration::from_secs(3);
    while Instant::now() < limit {
        last = Some(node.authenticate(&key.secret).await);
        if matches!(last, Some(Ok(_))) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{last:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_schemas_of_one_database_do_not_notify_each_other() {
    let server = Postgres::start();
    let admin = server.client().await;
    let mut parts = Vec::new();
    for schema in ["one", "two"] {
        admin.batch_execute(&format!("CREATE SCHEMA {schema}")).await.unwrap();
        let url = format!("{}?options=-csearch_path%3D{schema}", server.url());
        let store = store_at(&url, Duration::from_millis(50));
        store.migrate().await.unwrap();
        let manager = KeyManager::new(store.clone());
        let owner = manager.create_user("ada@example.com", "user").await.unwrap().id;
        let key = manager.issue(NewKey::new(owner, "k")).await.unwrap();
        let recorder = FeedRecorder::listen(store.changes(SystemTime::now()));
        recorder.all().await;
        parts.push((store, key, recorder));
    }
    admin.batch_execute("UPDATE one.api_keys SET is_active = FALSE").await.unwrap();
    let [(one, a, recorder_one), (two, b, recorder_two)] = &parts[..] else { panic!() };
    assert_eq!(recorder_one.subjects().await, [format!("prefix {}", a.record().prefix)]);
    assert_eq!(recorder_two.all().await, []);
    assert!(Authenticator::new(one.clone()).authenticate(a.expose_secret()).await.is_err());
    assert!(Authenticator::new(two.clone()).authenticate(b.expose_secret()).await.is_ok());
}
