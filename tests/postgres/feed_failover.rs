//! A failover to a standby that has not received the last commits. What a node read of them is no longer so.

use std::time::{Duration, SystemTime};

use tokio_postgres::Client;
use tower_api_key::{
    Authenticator,
    store::{Change, KeyStore},
};

use crate::support::{
    self,
    database::{
        Database, Key, caches, connect, database_with, denial_of, incomplete, key_in, run, store_at,
    },
    feed::{FeedRecorder, eventually, in_sync, within},
    proxy::Proxy,
    servers::{Postgres, wait_for},
};

const POLL: Duration = Duration::from_millis(200);

/// A primary, a standby that follows it through a proxy, and a proxy that leads nodes to one of them.
struct Pair {
    primary: Database,
    standby: Postgres,
    replication: Proxy,
    front: Proxy,
}

impl Pair {
    async fn start() -> Self {
        let primary =
            database_with(Postgres::with_settings(&["wal_level=replica", "max_wal_senders=4"]))
                .await;
        let replication = Proxy::start(primary.server.port());
        let standby = primary.server.standby(replication.port());
        let front = Proxy::start(primary.server.port());
        Self { primary, standby, replication, front }
    }

    fn url(&self) -> String {
        self.front.url(&self.primary.server.tcp_url("sslmode=disable"))
    }

    fn node(&self) -> Authenticator {
        Authenticator::new(store_at(&self.url(), POLL))
    }

    /// Waits until the standby has replayed everything, and cuts it off.
    async fn cut_standby_off(&self) {
        let position: String = self
            .primary
            .admin
            .query_one("SELECT pg_current_wal_flush_lsn()::text", &[])
            .await
            .unwrap()
            .get(0);
        let standby = self.standby.client().await;
        let replayed = format!("SELECT (pg_last_wal_replay_lsn() >= '{position}'::pg_lsn)::int");
        eventually("the standby to follow", async || {
            support::database::number(&standby, &replayed).await == 1
        })
        .await;
        self.replication.refuse();
        let behind = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'";
        eventually("the standby to be cut off", async || {
            support::database::number(&standby, behind).await == 0
        })
        .await;
    }

    /// The primary dies, and the standby takes over without what it has not received.
    async fn fail_over(&mut self) -> Client {
        self.front.refuse();
        self.primary.server.kill();
        let admin = self.standby.client().await;
        run(&admin, "SELECT pg_promote(true, 30)").await;
        wait_for("the promotion", || {
            self.standby.script("postgres", "SELECT pg_is_in_recovery()").contains('f')
        });
        self.front.switch_to(self.standby.port());
        self.front.pass();
        connect(&self.standby.url()).await
    }
}

/// The answer of the node, with an outage as an answer too.
async fn answer(node: &Authenticator, key: &Key) -> String {
    match node.authenticate(&key.secret).await {
        Ok(_) => "accepted".to_owned(),
        Err(denial) => denial.to_string(),
    }
}

async fn answers(node: &Authenticator, key: &Key, expected: &str) {
    within(Duration::from_secs(20), expected, async || answer(node, key).await == expected).await;
}

const REVOKED: &str = "the API key was revoked";

/// `others` transactions with higher ids commit before the one that is lost, all of them read at once or not.
async fn a_lost_commit(others: usize, is_read_at_once: bool) {
    let mut pair = Pair::start().await;
    let (lost, kept, revoked) =
        (pair.primary.key().await, pair.primary.key().await, pair.primary.key().await);
    let node = caches(pair.node(), &lost).await;
    for key in [&kept, &revoked] {
        node.authenticate(&key.secret).await.unwrap();
    }
    in_sync(&node).await;
    let recorder = FeedRecorder::listen(store_at(&pair.url(), POLL).changes(SystemTime::now()));
    recorder.all().await;

    let mut first = pair.primary.server.client().await;
    let first = first.transaction().await.unwrap();
    first.batch_execute(&lost.revoke()).await.unwrap();
    if is_read_at_once {
        pair.front.refuse();
    }
    for _ in 0..others {
        pair.primary
            .run(&format!("UPDATE api_keys SET name = name || 'x' WHERE id = {}", kept.id))
            .await;
    }
    pair.cut_standby_off().await;
    first.commit().await.unwrap();
    pair.front.pass();
    answers(&node, &lost, REVOKED).await;
    in_sync(&node).await;
    recorder.all().await;

    let admin = pair.fail_over().await;
    // The standby has the key as valid, and so has the node.
    answers(&node, &lost, "accepted").await;
    answers(&node, &kept, "accepted").await;
    assert!(recorder.all().await.contains(&Change::Reset));
    assert_eq!(incomplete(&node), None);
    in_sync(&node).await;
    // Revisions are assigned again. None is taken for the one that was lost.
    for key in [&lost, &revoked, &kept] {
        assert_eq!(denial_of(&node, key).await, None);
        run(&admin, &key.revoke()).await;
        answers(&node, key, REVOKED).await;
        run(&admin, &format!("UPDATE api_keys SET is_active = TRUE WHERE id = {}", key.id)).await;
        answers(&node, key, "accepted").await;
    }
    // One reset, not one a poll.
    assert!(!recorder.all().await.contains(&Change::Reset));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_commit_of_the_oldest_transaction_is_noticed() {
    a_lost_commit(3, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_commit_is_noticed_among_many_that_were_read_at_once() {
    a_lost_commit(100, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_commit_that_made_a_key_valid_is_noticed() {
    let mut pair = Pair::start().await;
    let key = pair.primary.key().await;
    let other = pair.primary.key().await;
    pair.primary.run(&key.revoke()).await;
    let node = caches(pair.node(), &other).await;
    answers(&node, &key, REVOKED).await;
    let mut first = pair.primary.server.client().await;
    let first = first.transaction().await.unwrap();
    first
        .batch_execute(&format!("UPDATE api_keys SET is_active = TRUE WHERE id = {}", key.id))
        .await
        .unwrap();
    pair.primary.run(&format!("UPDATE api_keys SET name = 'later' WHERE id = {}", other.id)).await;
    pair.cut_standby_off().await;
    first.commit().await.unwrap();
    // A key that exists on the lost primary alone.
    let new = key_in(&pair.primary.store).await;
    answers(&node, &key, "accepted").await;
    answers(&node, &new, "accepted").await;
    in_sync(&node).await;
    let admin = pair.fail_over().await;
    answers(&node, &key, REVOKED).await;
    within(Duration::from_secs(5), "the lost key", async || {
        node.authenticate(&new.secret).await.is_err()
    })
    .await;
    run(&admin, &other.revoke()).await;
    answers(&node, &other, REVOKED).await;
}
