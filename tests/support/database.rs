//! A migrated PostgreSQL database, an operator at its console, and nodes that cache its keys.

use std::time::{Duration, Instant, SystemTime};

use tokio_postgres::{Client, NoTls};
use tower_api_key::{
    Authenticator, Denial, KeyManager, NewKey, PostgresStore,
    denial::InvalidKey,
    store::{FeedFault, KeyStore},
};

use super::{
    feed::{FeedRecorder, eventually, is_synced_since, within},
    servers::Postgres,
};

pub struct Database {
    pub server: Postgres,
    pub admin: Client,
    pub store: PostgresStore,
}

pub struct Key {
    pub id: i64,
    pub prefix: String,
    pub secret: String,
    pub owner: i64,
}

/// A notified node takes at most this long.
pub const NOTIFIED: Duration = Duration::from_secs(2);
/// A poll interval that no test reaches.
pub const NEVER: Duration = Duration::from_secs(60);

pub async fn database() -> Database {
    database_with(Postgres::start()).await
}

pub async fn database_with(server: Postgres) -> Database {
    let store = store_at(&server.url(), NEVER);
    store.migrate().await.unwrap();
    let admin = server.client().await;
    Database { server, admin, store }
}

pub fn store_at(url: &str, poll_interval: Duration) -> PostgresStore {
    let store = PostgresStore::builder(url).poll_interval(poll_interval).max_connections(4);
    store.timeout(Duration::from_secs(10)).connect_timeout(Duration::from_secs(5)).build().unwrap()
}

/// The same server, as another role: every role is trusted.
pub fn url_of_role(url: &str, role: &str) -> String {
    url.replacen("app@", &format!("{role}@"), 1)
}

/// The same server, with this `search_path` in each session.
pub fn url_with_path(url: &str, path: &str) -> String {
    let separator = if url.contains('?') { '&' } else { '?' };
    format!("{url}{separator}options=-csearch_path%3D{path}")
}

pub async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

pub async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// An integer that an expression or a subquery returns.
pub async fn number(client: &Client, sql: &str) -> i64 {
    client.query_one(&format!("SELECT ({sql})::bigint"), &[]).await.unwrap().get(0)
}

/// A key of a user of its own.
pub async fn key_in(store: &PostgresStore) -> Key {
    let manager = KeyManager::new(store.clone());
    let email = format!("{:?}@example.com", Instant::now()).replace(' ', "");
    let owner = manager.create_user(&email, "user").await.unwrap().id;
    let issued = manager.issue(NewKey::new(owner.clone(), "k").scopes(["read"])).await.unwrap();
    Key {
        id: issued.record().id.as_i64().unwrap(),
        prefix: issued.record().prefix.clone(),
        secret: issued.expose_secret().to_owned(),
        owner: owner.as_i64().unwrap(),
    }
}

impl Key {
    /// The statement that revokes the key.
    pub fn revoke(&self) -> String {
        format!("UPDATE api_keys SET is_active = FALSE WHERE id = {}", self.id)
    }
}

impl Database {
    pub async fn key(&self) -> Key {
        key_in(&self.store).await
    }

    pub async fn run(&self, sql: &str) {
        run(&self.admin, sql).await;
    }

    pub async fn number(&self, sql: &str) -> i64 {
        number(&self.admin, sql).await
    }

    pub fn listen(&self, poll_interval: Duration) -> FeedRecorder {
        FeedRecorder::listen(store_at(&self.server.url(), poll_interval).changes(SystemTime::now()))
    }
}

/// A node that has the key in its local cache and is in sync.
pub async fn node_with(store: impl KeyStore, key: &Key) -> Authenticator {
    caches(Authenticator::new(store), key).await
}

/// The node, after it has cached the key and is in sync.
pub async fn caches(node: Authenticator, key: &Key) -> Authenticator {
    node.authenticate(&key.secret).await.unwrap();
    eventually("the first sync", async || node.health().last_sync.is_some()).await;
    // The first answer may have come before the feed was there.
    node.authenticate(&key.secret).await.unwrap();
    node
}

/// Waits until the node has received every change that was there before this was called. For a node whose next poll is far
/// away.
pub async fn in_sync_by_notification(db: &Database, node: &Authenticator) {
    let begun = SystemTime::now();
    eventually("a sync", async || {
        db.run("NOTIFY api_key_changes").await;
        is_synced_since(node, begun)
    })
    .await;
}

/// `None` for an accepted key. Fails if the answer is neither.
pub async fn denial_of(node: &Authenticator, key: &Key) -> Option<InvalidKey> {
    match node.authenticate(&key.secret).await {
        Ok(_) => None,
        Err(Denial::InvalidKey(reason)) => Some(reason),
        Err(other) => panic!("{other:?}"),
    }
}

/// Waits for the denial for as long as a notified node may take.
pub async fn is_denied(node: &Authenticator, key: &Key, expected: InvalidKey) -> Duration {
    let what = format!("{expected:?}");
    within(NOTIFIED, &what, async || denial_of(node, key).await == Some(expected)).await
}

/// Why the node's feed is incomplete, if it is.
pub fn incomplete(node: &Authenticator) -> Option<String> {
    match node.health().feed.fault {
        Some(FeedFault::Incomplete(reason)) => Some(reason.to_string()),
        _ => None,
    }
}
