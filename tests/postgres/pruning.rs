//! Rows of the table of changes are deleted when they have been visible for two hours, by whatever role.

use std::time::{Duration, SystemTime};

use tower_api_key::{
    Authenticator, Denial,
    denial::InvalidKey,
    store::{Change, KeyStore},
};

use crate::support::{
    database::{
        Database, caches, connect, database, denial_of, key_in, number, run, store_at, url_of_role,
        url_with_path,
    },
    feed::{FeedRecorder, eventually, within},
    log::capture,
    proxy::Proxy,
    servers::Postgres,
};

const POLL: Duration = Duration::from_millis(100);

async fn many_changes(db: &Database, id: i64) {
    db.run(&format!(
        "DO $$ BEGIN FOR n IN 1..150 LOOP
            UPDATE api_keys SET name = name || 'x' WHERE id = {id}; COMMIT;
        END LOOP; END $$"
    ))
    .await;
}

/// As after so much time, with a call of the function at its end.
async fn passes(db: &Database, hours: f64) {
    db.run(&format!(
        "SELECT api_key_prune(); UPDATE api_key_horizons SET taken_at = taken_at - {hours} * interval '1 hour';
        SELECT api_key_prune()"
    ))
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_a_transaction_that_was_open_for_hours_is_kept_for_two_more() {
    let db = database().await;
    let (key, other) = (db.key().await, db.key().await);
    let proxy = Proxy::start(db.server.port());
    let url = proxy.url(&db.server.tcp_url("sslmode=disable"));
    let node = caches(Authenticator::new(store_at(&url, POLL)), &key).await;
    let mut open = db.server.client().await;
    let open = open.transaction().await.unwrap();
    open.batch_execute(&key.revoke()).await.unwrap();
    let rows = format!("SELECT count(*) FROM api_key_changes WHERE key_prefix = '{}'", key.prefix);
    let all = "SELECT count(*) FROM api_key_changes";
    // The row of its insertion.
    assert_eq!(db.number(&rows).await, 1);
    many_changes(&db, other.id).await;
    passes(&db, 3.0).await;
    assert_eq!(db.number(&rows).await, 0, "what is older than the transaction is deleted");
    many_changes(&db, other.id).await;
    passes(&db, 0.5).await;
    proxy.refuse();
    open.commit().await.unwrap();
    for _ in 0..3 {
        many_changes(&db, other.id).await;
        passes(&db, 0.5).await;
        assert_eq!(db.number(&rows).await, 1);
    }
    proxy.pass();
    within(Duration::from_secs(5), "the revoke", async || {
        matches!(node.authenticate(&key.secret).await, Err(Denial::InvalidKey(InvalidKey::Revoked)))
    })
    .await;
    let before = db.number(all).await;
    many_changes(&db, other.id).await;
    passes(&db, 3.0).await;
    assert_eq!(db.number(&rows).await, 0, "two hours are over");
    assert!(db.number(all).await < before);
}

/// The rights that the documentation of `backend` lists.
const RIGHTS: &str = "CREATE ROLE service LOGIN;
    GRANT SELECT ON users, api_keys, api_key_changes, api_key_cache_secrets TO service;
    GRANT UPDATE ON api_keys TO service;
    GRANT ALL ON api_key_usage, api_key_usage_writers, api_key_leases TO service";

#[tokio::test]
async fn a_role_with_the_rights_of_the_readme_deletes_old_changes_and_health_shows_how_many_are_left()
 {
    let (log, _guard) = capture();
    let server = Postgres::start();
    let admin = server.client().await;
    // The owner is no superuser either.
    run(&admin, "CREATE ROLE owner LOGIN; GRANT CREATE ON SCHEMA public TO owner").await;
    let store = store_at(&url_of_role(&server.url(), "owner"), POLL);
    store.migrate().await.unwrap();
    run(&admin, RIGHTS).await;
    let db = Database { admin, store: store.clone(), server };
    let key = key_in(&store).await;
    many_changes(&db, key.id).await;
    passes(&db, 3.0).await;
    many_changes(&db, key.id).await;
    let left = db.number("SELECT count(*) FROM api_key_changes").await;

    let url = url_of_role(&db.server.url(), "service");
    let node = caches(Authenticator::new(store_at(&url, POLL)), &key).await;
    eventually("rows and their age", async || {
        let feed = node.health().feed;
        feed.rows.is_some() && feed.oldest.is_some()
    })
    .await;
    let feed = node.health().feed;
    let rows = feed.rows.unwrap() as i64;
    assert!((101..=left).contains(&rows), "{rows} of {left}");
    assert!(feed.oldest.unwrap() < SystemTime::now());
    assert_eq!(feed.fault, None);
    run(&connect(&url).await, "SELECT * FROM api_key_prune()").await;
    db.run(&key.revoke()).await;
    eventually("the revoke", async || denial_of(&node, &key).await.is_some()).await;
    let text = log.text();
    assert!(!text.contains("permission denied") && !text.contains(" WARN "), "{text}");
    // Of what is left, nothing that the last hours need.
    assert!(number(&db.admin, "SELECT count(*) FROM api_key_changes").await > 100);
}

#[tokio::test]
async fn a_prune_that_fails_is_one_warning_and_the_feed_goes_on() {
    let (log, _guard) = capture();
    let db = database().await;
    let key = db.key().await;
    db.run(RIGHTS).await;
    db.run("REVOKE EXECUTE ON FUNCTION api_key_prune FROM PUBLIC").await;
    let url = url_of_role(&db.server.url(), "service");
    let node = caches(Authenticator::new(store_at(&url, POLL)), &key).await;
    let warnings = || log.lines().iter().filter(|line| line.contains("can't be deleted")).count();
    eventually("a warning", async || warnings() == 1).await;
    tokio::time::sleep(5 * POLL).await;
    assert_eq!(warnings(), 1);
    assert_eq!(node.health().feed.fault, None);
    db.run(&key.revoke()).await;
    eventually("the revoke", async || denial_of(&node, &key).await.is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_cut_off_for_more_than_an_hour_reads_everything_anew() {
    let db = database().await;
    // The clock of the database, as the statements of this feed read it.
    db.run(
        "CREATE SCHEMA clock; CREATE TABLE clock.later (by INTERVAL); INSERT INTO clock.later VALUES ('0');
        CREATE FUNCTION clock.statement_timestamp() RETURNS TIMESTAMPTZ LANGUAGE sql STABLE AS
            'SELECT pg_catalog.statement_timestamp() + by FROM clock.later'",
    )
    .await;
    let proxy = Proxy::start(db.server.port());
    let url = proxy.url(&db.server.tcp_url("sslmode=disable"));
    let url = url_with_path(&url, "clock,pg_catalog,public");
    let recorder = FeedRecorder::listen(store_at(&url, POLL).changes(SystemTime::now()));
    recorder.all().await;
    recorder.all().await;
    for (minutes, is_reset) in [(55, false), (65, true), (5, false)] {
        proxy.refuse();
        db.run(&format!("UPDATE clock.later SET by = by + interval '{minutes} minutes'")).await;
        let before = proxy.connections();
        proxy.pass();
        eventually("a connection", async || proxy.connections() > before).await;
        db.run("INSERT INTO users (email) VALUES (random()); UPDATE users SET role = role || 'x'")
            .await;
        let mut changes = Vec::new();
        eventually("the change after it", async || {
            changes = recorder.so_far();
            changes.iter().any(|change| matches!(change, Change::Owner(..)))
        })
        .await;
        assert_eq!(changes.contains(&Change::Reset), is_reset, "{minutes} minutes");
        recorder.take().await;
    }
}
