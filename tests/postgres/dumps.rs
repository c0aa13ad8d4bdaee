//! Dumps of pg_dump that are restored: data into a migrated schema, and a whole database into a new cluster.

use std::time::{Duration, SystemTime};

use tower_api_key::{
    Authenticator, RedisCache,
    store::{Change, KeyStore},
};

use crate::support::{
    database::{
        Database, Key, caches, connect, database, database_with, denial_of, number, run, store_at,
    },
    feed::{FeedRecorder, eventually, in_sync},
    servers::{Postgres, Redis},
};

const POLL: Duration = Duration::from_millis(100);

async fn keys_of(db: &Database, count: usize) -> Vec<Key> {
    let mut keys = Vec::new();
    for _ in 0..count {
        keys.push(db.key().await);
    }
    keys
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_of_the_data_alone_goes_into_a_migrated_schema_and_revokes_arrive() {
    let source = database().await;
    let keys = keys_of(&source, 30).await;
    // As if all were from before the adoption: the source has assigned few revisions.
    source
        .run(
            "SET session_replication_role = replica; ALTER TABLE api_keys DISABLE TRIGGER zzz_api_key_revision;
            UPDATE api_keys SET api_key_revision = 0; ALTER TABLE api_keys ENABLE ALWAYS TRIGGER zzz_api_key_revision;
            SELECT setval('api_key_revisions', 3)",
        )
        .await;
    let dump = source.server.program(
        "pg_dump",
        &["-a", "-T", "__diesel_schema_migrations", "postgres"],
        "",
    );
    let target = database().await;
    target.server.script("postgres", &dump);
    assert_eq!(target.number("SELECT count(*) FROM api_keys").await, 30);
    // As two hours later.
    target.run("DELETE FROM api_key_changes WHERE key_prefix <> ''").await;

    let redis = Redis::start();
    let node = || {
        let cache = RedisCache::new(store_at(&target.server.url(), POLL), redis.url().as_str());
        Authenticator::new(cache.unwrap())
    };
    let nodes = [caches(node(), &keys[0]).await, caches(node(), &keys[0]).await];
    for node in &nodes {
        for key in &keys {
            assert_eq!(denial_of(node, key).await, None, "{}", key.prefix);
        }
    }
    let of_redis = || redis.command(&["KEYS", "api_key:data:*"]).lines().count();
    eventually("entries in Redis", async || {
        for key in &keys {
            nodes[0].invalidate(&key.prefix);
            let _ = nodes[0].authenticate(&key.secret).await;
        }
        of_redis() >= 30
    })
    .await;
    for key in [&keys[29], &keys[15], &keys[0]] {
        for node in &nodes {
            eventually("the key", async || node.authenticate(&key.secret).await.is_ok()).await;
        }
        in_sync(&nodes[1]).await;
        target.run(&key.revoke()).await;
        for node in &nodes {
            eventually("the revoke", async || denial_of(node, key).await.is_some()).await;
        }
    }
    // The owner too, and a key that is deleted and put back.
    let key = &keys[7];
    target.run(&format!("UPDATE users SET is_active = FALSE WHERE id = {}", key.owner)).await;
    for node in &nodes {
        eventually("the owner", async || denial_of(node, key).await.is_some()).await;
    }
    target.run(&format!("DELETE FROM api_keys WHERE id = {}", keys[8].id)).await;
    for node in &nodes {
        eventually("the deletion", async || denial_of(node, &keys[8]).await.is_some()).await;
    }
    assert!(nodes.iter().all(|node| node.health().feed.fault.is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_restored_into_a_cluster_with_lower_transaction_ids_is_not_reset_again_and_again()
 {
    let source = database().await;
    let burn = |count: usize| {
        format!(
            "DO $$ BEGIN FOR n IN 1..{count} LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$"
        )
    };
    let keys = keys_of(&source, 5).await;
    source.run(&burn(3000)).await;
    for n in 0..20 {
        source.run(&format!("UPDATE api_keys SET name = 'n{n}'")).await;
    }
    let highest = source.number("SELECT max(xid::text::bigint) FROM api_key_changes").await;
    let dump = source.server.program("pg_dump", &["postgres"], "");
    let target = Postgres::start();
    target.script("postgres", &dump);
    let admin = target.client().await;
    assert!(number(&admin, "SELECT pg_current_xact_id()::text").await < highest - 1000);

    let store = store_at(&target.url(), POLL);
    store.migrate().await.unwrap();
    let node = caches(Authenticator::new(store), &keys[0]).await;
    let recorder = FeedRecorder::listen(store_at(&target.url(), POLL).changes(SystemTime::now()));
    recorder.all().await;
    let other = connect(&target.url()).await;
    let mut resets = 0;
    // Until the ids of the dump are this cluster's too, and behind.
    while number(&admin, "SELECT pg_current_xact_id()::text").await < highest + 500 {
        for active in [false, true] {
            run(
                &admin,
                &format!("UPDATE api_keys SET is_active = {active} WHERE id = {}", keys[0].id),
            )
            .await;
            eventually("the change", async || {
                node.authenticate(&keys[0].secret).await.is_ok() == active
            })
            .await;
        }
        run(&other, &burn(150)).await;
        resets += recorder.all().await.iter().filter(|change| **change == Change::Reset).count();
    }
    assert_eq!(resets, 0);
    assert_eq!(node.health().feed.fault, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_into_a_schema_that_was_used_meanwhile_keeps_no_key_out() {
    let source = database().await;
    let keys = keys_of(&source, 3).await;
    let dump =
        source.server.program("pg_dump", &["-a", "-t", "users", "-t", "api_keys", "postgres"], "");
    // Many revisions are assigned, and the keys are deleted.
    let target = database_with(Postgres::start()).await;
    target.run("SELECT setval('api_key_revisions', 5000)").await;
    target.server.script("postgres", &dump);
    let node = caches(Authenticator::new(store_at(&target.server.url(), POLL)), &keys[0]).await;
    target.run("DELETE FROM api_keys; DELETE FROM users").await;
    eventually("the deletion", async || denial_of(&node, &keys[0]).await.is_some()).await;
    target.server.script("postgres", &dump);
    for key in &keys {
        eventually("the key", async || node.authenticate(&key.secret).await.is_ok()).await;
    }
    target.run(&keys[1].revoke()).await;
    eventually("the revoke", async || denial_of(&node, &keys[1]).await.is_some()).await;
}
