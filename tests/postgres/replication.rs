//! Logical replication of all tables to a second server, as in a blue/green upgrade.

use std::time::{Duration, SystemTime};

use tokio_postgres::Client;
use tower_api_key::{
    Authenticator, KeyManager, NewKey, RedisCache, denial::InvalidKey, store::KeyStore,
};

use crate::support::{
    database::{
        Database, Key, caches, connect, database_with, incomplete, is_denied, number, run, store_at,
    },
    feed::{FeedRecorder, eventually, in_sync},
    servers::{Postgres, Redis},
};

const POLL: Duration = Duration::from_millis(200);
const LOGICAL: [&str; 2] = ["wal_level=logical", "max_logical_replication_workers=4"];

struct Replicated {
    publisher: Database,
    subscriber: Postgres,
    admin: Client,
}

async fn replicated(prepare: &str) -> Replicated {
    let publisher = database_with(Postgres::with_settings(&LOGICAL)).await;
    publisher.run(prepare).await;
    let subscriber = Postgres::with_settings(&LOGICAL);
    let schema = publisher.server.program("pg_dump", &["-s", "postgres"], "");
    subscriber.script("postgres", &schema);
    publisher.run("CREATE PUBLICATION everything FOR ALL TABLES").await;
    let admin = subscriber.client().await;
    let port = publisher.server.port();
    run(
        &admin,
        &format!(
            "CREATE SUBSCRIPTION copy CONNECTION 'host=127.0.0.1 port={port} user=app dbname=postgres'
            PUBLICATION everything"
        ),
    )
    .await;
    let replicated = Replicated { publisher, subscriber, admin };
    replicated.catches_up().await;
    replicated
}

impl Replicated {
    /// Waits until all that was committed at the publisher is applied.
    async fn catches_up(&self) {
        let ready = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'";
        eventually("the first copy", async || number(&self.admin, ready).await == 0).await;
        self.publisher.run("CREATE TABLE IF NOT EXISTS marks (n INT)").await;
        let position: String = self
            .publisher
            .admin
            .query_one("SELECT pg_current_wal_lsn()::text", &[])
            .await
            .unwrap()
            .get(0);
        let applied = format!(
            "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'copy' AND replay_lsn >= '{position}'"
        );
        eventually("the subscriber to follow", async || {
            number(&self.publisher.admin, &applied).await == 1
        })
        .await;
    }

    fn is_healthy(&self) {
        let log = self.subscriber.log();
        let errors: Vec<_> = log
            .lines()
            .filter(|line| line.contains("ERROR") || line.contains("duplicate key"))
            .collect();
        assert!(errors.is_empty(), "{errors:#?}");
    }

    fn node(&self, url: &str) -> Authenticator {
        Authenticator::builder(store_at(url, POLL)).without_usage().build()
    }
}

async fn is_back(node: &Authenticator, key: &Key) {
    eventually("the key", async || node.authenticate(&key.secret).await.is_ok()).await;
    in_sync(node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_the_publisher_reach_nodes_of_both_servers_and_replication_goes_on() {
    let servers = replicated("").await;
    let key = servers.publisher.key().await;
    servers.catches_up().await;
    let nodes =
        [servers.node(&servers.publisher.server.url()), servers.node(&servers.subscriber.url())];
    for node in &nodes {
        is_back(node, &key).await;
        assert_eq!(incomplete(node), None);
    }
    let owner = key.owner;
    for n in 0..3 {
        for (change, back) in [
            (key.revoke(), "UPDATE api_keys SET is_active = TRUE".to_owned()),
            (
                format!("UPDATE users SET is_active = FALSE WHERE id = {owner}"),
                "UPDATE users SET is_active = TRUE".to_owned(),
            ),
            (
                format!("UPDATE api_keys SET key_prefix = 'moved{n}' WHERE id = {}", key.id),
                format!("UPDATE api_keys SET key_prefix = '{}' WHERE id = {}", key.prefix, key.id),
            ),
        ] {
            servers.publisher.run(&change).await;
            for node in &nodes {
                eventually(&change, async || node.authenticate(&key.secret).await.is_err()).await;
            }
            servers.publisher.run(&back).await;
            for node in &nodes {
                is_back(node, &key).await;
            }
        }
        servers.publisher.run("SELECT api_key_prune(); DELETE FROM api_key_changes WHERE id IN (SELECT id FROM api_key_changes LIMIT 1)").await;
    }
    servers.is_healthy();

    // Usage is no change, at either server.
    let recorder =
        FeedRecorder::listen(store_at(&servers.subscriber.url(), POLL).changes(SystemTime::now()));
    recorder.all().await;
    for n in 0..5 {
        servers
            .publisher
            .run(&format!(
                "UPDATE api_keys SET total_requests = total_requests + 1, last_used_at = now();
                INSERT INTO api_key_usage (api_key_id, day, requests) VALUES ({}, current_date, 1)
                    ON CONFLICT (api_key_id, day) DO UPDATE SET requests = {n}",
                key.id
            ))
            .await;
    }
    servers.catches_up().await;
    assert_eq!(recorder.all().await, []);
    let total = format!("SELECT total_requests FROM api_keys WHERE id = {}", key.id);
    assert_eq!(number(&servers.admin, &total).await, 5);

    // The switch: the subscriber is written to.
    run(&servers.admin, "DROP SUBSCRIPTION copy").await;
    run(&servers.admin, &key.revoke()).await;
    is_denied(&nodes[1], &key, InvalidKey::Revoked).await;
    store_at(&servers.subscriber.url(), POLL).migrate().await.unwrap();
    servers.is_healthy();
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_with_higher_revisions_than_the_subscribers_own_are_no_reason_to_keep_redis_entries() {
    // Revisions of the publisher are far ahead of those that the subscriber assigns, and come with the first copy.
    let servers = replicated(
        "SELECT setval('api_key_revisions', 100000); INSERT INTO users (id, email) VALUES (100, 'ada@example.com');
        UPDATE users SET role = 'admin'",
    )
    .await;
    let manager = KeyManager::new(servers.publisher.store.clone());
    let issued = manager.issue(NewKey::new(100, "k")).await.unwrap();
    let key = Key {
        id: issued.record().id.as_i64().unwrap(),
        prefix: issued.record().prefix.clone(),
        secret: issued.expose_secret().to_owned(),
        owner: 100,
    };
    servers.catches_up().await;
    let revision = "SELECT api_key_revision FROM users";
    assert!(number(&servers.admin, revision).await > 100_000);
    // As two hours later.
    run(&servers.admin, "DELETE FROM api_key_changes").await;
    let redis = Redis::start();
    let node = || {
        let cache =
            RedisCache::new(store_at(&servers.subscriber.url(), POLL), redis.url().as_str())
                .unwrap();
        Authenticator::builder(cache).without_usage().build()
    };
    let first = caches(node(), &key).await;
    eventually("an entry in Redis", async || {
        first.invalidate(&key.prefix);
        let _ = first.authenticate(&key.secret).await;
        redis.command(&["KEYS", "api_key:data:*"]).contains("api_key")
    })
    .await;
    let second = caches(node(), &key).await;
    in_sync(&second).await;
    servers
        .publisher
        .run(&format!("UPDATE users SET is_active = FALSE WHERE id = {}", key.owner))
        .await;
    for node in [&first, &second] {
        eventually("the owner to be inactive", async || {
            node.authenticate(&key.secret).await.is_err()
        })
        .await;
    }
    servers.is_healthy();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_replication_brings_before_its_owner_works_when_the_owner_comes() {
    let servers = replicated("").await;
    let key = servers.publisher.key().await;
    servers.catches_up().await;
    run(&servers.admin, "CREATE TABLE saved AS TABLE users; SET session_replication_role = replica; DELETE FROM users").await;
    let url = servers.subscriber.url();
    let node = servers.node(&url);
    eventually("the key to be unknown", async || node.authenticate(&key.secret).await.is_err())
        .await;
    eventually("a sync", async || node.health().last_sync.is_some()).await;
    in_sync(&node).await;
    assert!(node.authenticate(&key.secret).await.is_err());
    let apply = connect(&url).await;
    run(&apply, "SET session_replication_role = replica; INSERT INTO users SELECT * FROM saved")
        .await;
    is_back(&node, &key).await;
}
