//! Several hosts in the URL of a PostgreSQL database, of which some are down.

use std::time::{Duration, Instant};

use tower_api_key::{Authenticator, Denial, KeyManager, NewKey, PostgresStore};

use crate::support::{feed::in_sync, proxy::Proxy, servers::Postgres};

/// Longer than the feed waits for anything.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const DEADLINE: Duration = Duration::from_secs(4);

struct Fixture {
    server: Postgres,
    /// Ways to the server that can be broken.
    ways: [Proxy; 2],
    key: String,
}

async fn fixture() -> Fixture {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store);
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id, "k")).await.unwrap();
    let ways = [Proxy::start(server.port()), Proxy::start(server.port())];
    Fixture { server, ways, key: issued.expose_secret().to_owned() }
}

impl Fixture {
    fn url(&self, parameters: &str) -> String {
        let [first, second] = self.ways.each_ref().map(Proxy::port);
        format!("postgres://app@127.0.0.1:{first},127.0.0.1:{second}/postgres?{parameters}")
    }

    fn authenticator(&self, parameters: &str) -> Authenticator {
        authenticator(&self.url(parameters))
    }
}

fn authenticator(url: &str) -> Authenticator {
    let store = PostgresStore::builder(url).connect_timeout(CONNECT_TIMEOUT).timeout(DEADLINE);
    let store = store.poll_interval(Duration::from_millis(100));
    // Nothing is cached, so that each request reaches the store.
    Authenticator::builder(store.build().unwrap()).cache_capacity(0).build()
}

fn refuse(way: &Proxy) {
    way.refuse();
}

fn black_hole(way: &Proxy) {
    way.black_hole();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_refuses_or_is_silent_costs_the_first_connection_alone() {
    let fixture = fixture().await;
    for (fault, at_most) in [
        (refuse as fn(&Proxy), Duration::from_secs(1)),
        // Its share of the deadline: 0.8 × 4 s / 2 hosts.
        (black_hole, Duration::from_millis(2600)),
    ] {
        for broken in [0, 1] {
            fault(&fixture.ways[broken]);
            let node = fixture.authenticator("");
            let begun = Instant::now();
            let first = node.authenticate(&fixture.key).await;
            assert!(first.is_ok(), "host {broken} is down: {first:?}");
            assert!(begun.elapsed() < at_most, "{:?}", begun.elapsed());
            in_sync(&node).await;
            assert!(begun.elapsed() < Duration::from_secs(5), "in sync: {:?}", begun.elapsed());

            let begun = Instant::now();
            let eight = (0..8).map(|_| node.authenticate(&fixture.key));
            for outcome in futures_util::future::join_all(eight).await {
                assert!(outcome.is_ok(), "{outcome:?}");
            }
            assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
            fixture.ways[broken].pass();
            node.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_fails_later_is_replaced_by_the_other_and_back() {
    let fixture = fixture().await;
    let node = fixture.authenticator("");
    assert!(node.authenticate(&fixture.key).await.is_ok());
    in_sync(&node).await;
    for broken in [0, 1, 0] {
        let before = fixture.ways[1 - broken].connections();
        fixture.ways[broken].refuse();
        assert!(node.authenticate(&fixture.key).await.is_ok(), "host {broken} is down");
        in_sync(&node).await;
        assert!(fixture.ways[1 - broken].connections() > before, "the other host is used");
        fixture.ways[broken].pass();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_hosts_down_is_a_503_within_the_deadline() {
    let fixture = fixture().await;
    for (fault, at_most) in [
        (refuse as fn(&Proxy), Duration::from_secs(1)),
        (black_hole, DEADLINE + Duration::from_millis(300)),
    ] {
        for way in &fixture.ways {
            fault(way);
        }
        let node = fixture.authenticator("");
        let begun = Instant::now();
        let outcome = node.authenticate(&fixture.key).await;
        assert!(matches!(outcome, Err(Denial::Unavailable(_))), "{outcome:?}");
        assert!(begun.elapsed() < at_most, "{:?}", begun.elapsed());
        for way in &fixture.ways {
            way.pass();
        }
        assert!(node.authenticate(&fixture.key).await.is_ok(), "afterwards");
        in_sync(&node).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_random_order_uses_every_host_and_avoids_the_one_that_is_down() {
    let fixture = fixture().await;
    let nodes: Vec<_> =
        (0..16).map(|_| fixture.authenticator("load_balance_hosts=random")).collect();
    for node in &nodes {
        assert!(node.authenticate(&fixture.key).await.is_ok());
    }
    for way in &fixture.ways {
        assert!(way.connections() > 0, "all of 16 nodes went to one host");
    }
    fixture.ways[0].black_hole();
    let node = fixture.authenticator("load_balance_hosts=random");
    assert!(node.authenticate(&fixture.key).await.is_ok());
    in_sync(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_url_asks_of_a_host_holds_for_each_of_several() {
    let fixture = fixture().await;
    let read_only = Postgres::with_settings(&["default_transaction_read_only=on"]);
    let (primary, standby) = (fixture.server.port(), read_only.port());
    let tcp =
        |hosts: &str, parameters: &str| format!("postgres://app@{hosts}/postgres?{parameters}");
    let socket = |server: &Postgres| server.folder().to_str().unwrap().replace('/', "%2F");
    for url in [
        tcp(&format!("127.0.0.1:{standby},127.0.0.1:{primary}"), "target_session_attrs=read-write"),
        // One port for all hosts, and addresses for names that don't resolve.
        format!(
            "postgres:///postgres?user=app&host=a.invalid&host=b.invalid&hostaddr=127.0.0.2,127.0.0.1&port={primary}"
        ),
        tcp(
            &format!("127.0.0.1:{primary},c.invalid:{primary}"),
            "options=-c%20search_path%3Dpublic",
        ),
        // A name with two addresses, of which the server listens on one.
        tcp(&format!("c.invalid:1,localhost:{primary}"), "keepalives_idle=5&tcp_user_timeout=3000"),
        tcp(
            &format!("{}:{standby},{}:{primary}", socket(&read_only), socket(&fixture.server)),
            "target_session_attrs=read-write",
        ),
    ] {
        let node = authenticator(&url);
        let outcome = node.authenticate(&fixture.key).await;
        assert!(outcome.is_ok(), "{url}: {outcome:?}");
        in_sync(&node).await;
    }
    for url in [
        "postgres:///postgres",
        "postgres://a:1,b:2/postgres?hostaddr=127.0.0.1",
        "postgres://a,b,c/postgres?port=1,2",
    ] {
        assert!(PostgresStore::new(url).is_err(), "{url}");
    }
}
