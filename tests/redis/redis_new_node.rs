//! What a node that has just started takes from Redis.

use std::path::Path;

use tower_api_key::{PostgresStore, SqliteStore, store::Attribution, store::KeyRepository};

use crate::support::{
    edit_key,
    fleet::{Counting, Keys, Node},
    key_checker::Outcome,
    servers::{Postgres, Redis},
};

/// A key and its owner are edited several times, as on the day of their making. A node that starts then knows of each
/// of these changes, and has to find out that the entry in Redis is newer than all of them.
async fn a_node_that_starts_hits<S: KeyRepository + Clone>(store: S) {
    let redis = Redis::start();
    let keys = Keys::over(store.clone()).await;
    let warm = keys.issue().await;
    for n in 0..3 {
        let mut record = store.find_key(&keys.record.id).await.unwrap().unwrap().into_record();
        record.name = format!("edit {n}");
        edit_key(&store, &record, None).await.unwrap().unwrap();
        let mut owner = record.user.clone();
        owner.role = format!("role {n}");
        store.update_user(&owner, &Attribution::default()).await.unwrap().unwrap();
    }
    let node = || Node::new(Counting::over(store.clone()), redis.url());
    let first = node();
    first.until_hit(&keys.key).await;
    for _ in 0..3 {
        let starting = node();
        starting.until_hit(warm.expose_secret()).await;
        assert_eq!(starting.try_key(&keys.key).await, (Outcome::Passes, 0));
    }
}

#[tokio::test]
async fn keys_that_changed_in_the_last_hour_are_hits_on_a_new_node_over_postgresql() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    a_node_that_starts_hits(store).await;
}

#[tokio::test]
async fn keys_that_changed_in_the_last_hour_are_hits_on_a_new_node_over_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(Path::new(folder.path()).join("keys.db")).unwrap();
    store.migrate().await.unwrap();
    a_node_that_starts_hits(store).await;
}
