//! What a node caches of keys, and when it asks its store again.

use std::time::{Duration, SystemTime};

use chrono::DateTime;
use http::Request;
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, Denial, KeyScheme, MemoryStore, NewKey, StoreError,
    authenticator::AuthenticatorBuilder,
    denial::{Forbidden, InvalidKey},
    key::KeyHash,
    middleware::ClientAddr,
    record::{KeyRecord, Revision, User},
    store::{
        Answer, Attribution, Change, ChangeStream, KeyRepository, KeyStore, Lookup, StoredKey,
    },
};

use crate::support::{
    self, bearer,
    counted::Counted,
    eventually::{eventually, others_make},
    fixture, rule,
    scripted::{Issued, Node, Scripted, status},
    send, unknown_key, unknown_key_with_id, with_wrong_secret,
};

/// Asked the store, and let in.
const ASKED: (u16, usize) = (200, 1);
/// Let in from memory.
const HIT: (u16, usize) = (200, 0);
const DENIED_ASKED: (u16, usize) = (401, 1);
const DENIED_HIT: (u16, usize) = (401, 0);

const MAX_STALENESS: u64 = 30;
const STALE_IF_ERROR: u64 = 60;

fn prefix(issued: &Issued, revision: u64) -> Change {
    Change::Prefix(issued.prefix.clone(), Revision(revision))
}

fn owner(issued: &Issued, revision: u64) -> Change {
    Change::Owner(issued.owner.clone(), Revision(revision))
}

fn revoke(record: &mut KeyRecord) {
    record.is_active = false;
}

/// How many of the keys are hits; the others need one look-up each.
async fn hits(node: &Node, keys: &[Issued]) -> usize {
    let mut hits = 0;
    for issued in keys {
        match node.ask(&issued.key).await {
            HIT => hits += 1,
            outcome => assert_eq!(outcome, ASKED),
        }
    }
    hits
}

#[tokio::test]
async fn a_key_is_looked_up_once_and_then_let_in_from_memory() {
    for store in [Scripted::new(), Scripted::without_feed()] {
        let node = Node::over(store);
        let (issued, other) = (node.store.issue(1).await, node.store.issue(1).await);
        assert_eq!(node.ask(&issued.key).await, ASKED);
        for _ in 0..100 {
            assert_eq!(node.ask(&issued.key).await, HIT);
        }
        assert_eq!(node.ask(&other.key).await, ASKED, "each key for itself");
        let wrong = with_wrong_secret(&issued.key);
        assert_eq!(node.ask(&wrong).await, DENIED_ASKED, "the prefix alone opens nothing");
        assert_eq!(node.ask(&issued.key).await, HIT);
        let caller = node.authenticator.authenticate(&issued.key).await.unwrap();
        assert_eq!(caller.user().email, "1@example.com");
    }
}

#[tokio::test]
async fn a_hit_needs_no_runtime_and_no_second_poll() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    let elsewhere = std::thread::spawn(move || {
        let mut hit = Box::pin(node.authenticator.authenticate(&issued.key));
        assert!(support::probe::poll(&mut hit).is_ready());
    });
    elsewhere.join().unwrap();
}

#[tokio::test]
async fn what_a_key_may_do_is_judged_for_each_request_of_a_key_that_is_cached() {
    let fixture = fixture().await;
    let store = Counted::over(fixture.store.clone());
    let network = "192.0.2.0/24".parse().unwrap();
    let key = fixture
        .issue(|new| new.allowed_endpoints([rule("GET /v1/*")]).allowed_ips([network]))
        .await;
    let authenticator = Authenticator::new(store.clone());
    let layer = ApiKeyAuthLayer::from(authenticator.clone());
    let request = |path: &str, peer: &str| {
        let request = Request::builder().uri(path).header("x-api-key", key.expose_secret());
        let peer = ClientAddr(peer.parse().unwrap());
        request.extension(peer).body(http_body_util::Full::default()).unwrap()
    };
    for (asked, (path, peer, status)) in [1].into_iter().chain([0].into_iter().cycle()).zip([
        // The first one is not let in, and the key is cached all the same.
        ("/v2/a", "192.0.2.1", 403),
        ("/v1/a", "192.0.2.1", 200),
        ("/v1/a", "198.51.100.1", 403),
        ("/v1/../v2/a", "192.0.2.1", 403),
        ("/v1/b", "192.0.2.2", 200),
    ]) {
        assert_eq!(send(&layer, request(path, peer)).await.status(), status, "{path} {peer}");
        assert_eq!(store.take_asked(), asked, "{path} {peer}");
    }
    let denial = authenticator.authenticate(key.expose_secret()).await.unwrap_err();
    assert!(matches!(denial, Denial::Forbidden(Forbidden::Address)), "{denial:?}");
    let here = "192.0.2.3".parse().unwrap();
    assert!(authenticator.authenticate_from(key.expose_secret(), here).await.is_ok());
    assert_eq!(store.take_asked(), 0);
}

#[tokio::test]
async fn a_denial_that_is_cached_looks_like_the_first() {
    let fixture = fixture().await;
    let revoked = fixture.issue(|new| new).await;
    fixture.manager.revoke(&revoked.record().id).await.unwrap();
    let expired =
        fixture.issue(|new| new.expires_at("2020-01-01T00:00:00Z".parse().unwrap())).await;
    let early = fixture.issue(|new| new.not_before("2999-01-01T00:00:00Z".parse().unwrap())).await;
    let store = Counted::over(fixture.store.clone());
    let layer = ApiKeyAuthLayer::new(store.clone()).verbose();
    for (key, reason) in [
        (unknown_key(), InvalidKey::Unknown),
        (with_wrong_secret(&fixture.key), InvalidKey::WrongSecret),
        (revoked.expose_secret().to_owned(), InvalidKey::Revoked),
        (expired.expose_secret().to_owned(), InvalidKey::Expired),
        (early.expose_secret().to_owned(), InvalidKey::NotYetValid),
    ] {
        let (first, second) = (send(&layer, bearer(&key)).await, send(&layer, bearer(&key)).await);
        assert_eq!(store.take_asked(), 1, "{reason:?}");
        assert_eq!((second.status(), &second.body), (first.status(), &first.body));
        assert_eq!(second.response.headers(), first.response.headers());
        let denial = second.response.extensions().get::<Denial>();
        assert!(matches!(denial, Some(Denial::InvalidKey(found)) if *found == reason));
    }
}

#[tokio::test]
async fn a_key_that_is_cached_expires_on_time() {
    for store in [Scripted::new(), Scripted::without_feed()] {
        let node = Node::over(store);
        let issued = node.store.issue(1).await;
        let expiry = DateTime::from(node.now() + Duration::from_secs(10));
        node.store.edit(&issued, 1, 1, |record| record.expires_at = Some(expiry));
        assert_eq!(node.ask(&issued.key).await, ASKED);
        node.clock.advance(Duration::from_secs(10) - Duration::from_nanos(1));
        assert_eq!(node.ask(&issued.key).await, HIT);
        node.moment();
        let denial = node.authenticator.authenticate(&issued.key).await.unwrap_err();
        assert!(matches!(denial, Denial::InvalidKey(InvalidKey::Expired)), "{denial:?}");
    }
}

#[tokio::test]
async fn a_key_that_is_cached_expires_by_the_wall_clock_alone() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    let start = node.now();
    let expiry = DateTime::from(start + Duration::from_secs(10));
    node.store.edit(&issued, 1, 1, |record| record.expires_at = Some(expiry));
    assert_eq!(node.ask(&issued.key).await, ASKED);
    // The machine was suspended.
    node.clock.set_wall(start + Duration::from_secs(10));
    assert_eq!(node.ask(&issued.key).await.0, 401);
}

#[tokio::test]
async fn a_key_that_is_not_valid_yet_is_denied_from_memory_until_it_becomes_valid() {
    for store in [Scripted::new(), Scripted::without_feed()] {
        let node = Node::over(store);
        let issued = node.store.issue(1).await;
        let start = DateTime::from(node.now() + Duration::from_secs(10));
        node.store.edit(&issued, 1, 1, |record| record.not_before = Some(start));
        assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
        let denial = node.authenticator.authenticate(&issued.key).await.unwrap_err();
        assert!(matches!(denial, Denial::InvalidKey(InvalidKey::NotYetValid)), "{denial:?}");
        node.seconds(9);
        assert_eq!(node.ask(&issued.key).await, DENIED_HIT);
        node.clock.advance(Duration::from_secs(1) - Duration::from_nanos(1));
        assert_eq!(node.ask(&issued.key).await, DENIED_HIT);
        // No change is notified.
        node.moment();
        assert_eq!(node.ask(&issued.key).await, ASKED);
        assert_eq!(node.ask(&issued.key).await, HIT);
    }
}

#[tokio::test]
async fn a_key_that_is_cached_is_denied_while_the_clock_is_set_back_before_its_start() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    let start = node.now();
    node.store.edit(&issued, 1, 1, |record| record.not_before = Some(start.into()));
    assert_eq!(node.ask(&issued.key).await, ASKED);
    assert_eq!(node.ask(&issued.key).await, HIT);
    node.clock.set_wall(start - Duration::from_secs(1));
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
    assert_eq!(node.ask(&issued.key).await, DENIED_HIT);
    node.clock.set_wall(start);
    assert_eq!(node.ask(&issued.key).await, ASKED);
}

#[tokio::test]
async fn a_key_that_is_not_valid_yet_is_not_let_in_while_the_store_fails() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    let start = node.now();
    node.store.edit(&issued, 1, 1, |record| record.not_before = Some(start.into()));
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.fail();
    node.clock.set_wall(start - Duration::from_secs(1));
    assert_eq!(node.ask(&issued.key).await, (503, 1));
    node.clock.set_wall(start);
    assert_eq!(node.ask(&issued.key).await, HIT);
}

#[tokio::test]
async fn a_key_that_ends_before_it_starts_is_never_valid() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    let [end, start] = [5, 10].map(|s| DateTime::from(node.now() + Duration::from_secs(s)));
    node.store.edit(&issued, 1, 1, |record| {
        (record.expires_at, record.not_before) = (Some(end), Some(start));
    });
    let reasons = [InvalidKey::NotYetValid, InvalidKey::Expired, InvalidKey::Expired];
    for reason in reasons {
        let denial = node.authenticator.authenticate(&issued.key).await.unwrap_err();
        assert!(matches!(denial, Denial::InvalidKey(found) if found == reason), "{denial:?}");
        node.seconds(5);
    }
}

/// The clock of a machine that has just started may be wrong until it is set.
#[tokio::test]
async fn a_key_that_a_clock_ahead_of_time_found_expired_works_when_the_clock_is_set_right() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    let start = node.now();
    let expiry = DateTime::from(start + Duration::from_secs(3600));
    node.store.edit(&issued, 1, 1, |record| record.expires_at = Some(expiry));
    node.clock.set_wall(start + Duration::from_secs(7200));
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
    node.clock.set_wall(start);
    node.sync().await;
    assert_eq!(node.ask(&issued.key).await.0, 200);
}

#[tokio::test]
async fn a_store_without_a_feed_is_asked_again_after_max_staleness_to_the_nanosecond() {
    for seconds in [0, 1, MAX_STALENESS, 3600] {
        let limit = Duration::from_secs(seconds);
        let node = Node::with(Scripted::without_feed(), |builder| {
            // The default is the one of the documentation.
            if seconds == MAX_STALENESS { builder } else { builder.max_staleness(limit) }
        });
        let (issued, unknown) = (node.store.issue(1).await, unknown_key());
        assert_eq!(node.ask(&issued.key).await, ASKED);
        assert_eq!(node.ask(&unknown).await, DENIED_ASKED);
        node.store.edit(&issued, 2, 1, revoke);
        node.clock.advance(limit);
        assert_eq!(node.ask(&issued.key).await, HIT, "{seconds} s");
        assert_eq!(node.ask(&unknown).await, DENIED_HIT, "{seconds} s");
        // A hit makes nothing younger.
        node.moment();
        assert_eq!(node.ask(&issued.key).await, DENIED_ASKED, "{seconds} s");
        assert_eq!(node.ask(&unknown).await, DENIED_ASKED, "{seconds} s");
        node.clock.advance(limit);
        assert_eq!(node.ask(&issued.key).await, DENIED_HIT, "{seconds} s");
        node.store.edit(&issued, 3, 1, |record| record.is_active = true);
        node.moment();
        assert_eq!(node.ask(&issued.key).await, ASKED, "{seconds} s");
    }
}

#[tokio::test]
async fn the_age_of_an_answer_counts_from_before_the_store_was_asked() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    node.store.hold();
    let asking = node.authenticator.clone();
    let key = issued.key.clone();
    let first = tokio::spawn(async move { status(&asking, &key).await });
    node.store.has_under_way(1).await;
    // What it has read is from now; it is only slow to say so.
    node.seconds(20);
    node.store.let_go(1);
    assert_eq!(first.await.unwrap(), 200);
    node.store.hold_no_more();
    node.store.take_asked();
    node.seconds(MAX_STALENESS - 20);
    assert_eq!(node.ask(&issued.key).await, HIT);
    node.moment();
    assert_eq!(node.ask(&issued.key).await, ASKED);
}

#[tokio::test]
async fn age_is_what_the_clock_says_that_has_gone_on_further() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    let limit = Duration::from_secs(MAX_STALENESS);
    assert_eq!(node.ask(&issued.key).await, ASKED);

    // A machine that was suspended: the monotonic clock stood still.
    node.clock.set_wall(node.now() + limit);
    assert_eq!(node.ask(&issued.key).await, HIT);
    node.clock.set_wall(node.now() + Duration::from_nanos(1));
    assert_eq!(node.ask(&issued.key).await, ASKED);

    // A wall clock that was set back.
    node.clock.set_wall(node.now() - Duration::from_secs(86_400));
    assert_eq!(node.ask(&issued.key).await, HIT);
    node.clock.advance(limit);
    assert_eq!(node.ask(&issued.key).await, HIT);
    node.moment();
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.clock.advance(limit);
    assert_eq!(node.ask(&issued.key).await, HIT, "the new answer is from after the jump");
}

#[tokio::test]
async fn a_node_in_sync_asks_never_again_and_one_that_is_cut_off_asks_after_max_staleness() {
    let node = Node::over(Scripted::new());
    let (issued, unknown) = (node.store.issue(1).await, unknown_key());
    assert_eq!(node.ask(&issued.key).await, ASKED);
    assert_eq!(node.ask(&unknown).await, DENIED_ASKED);
    for _ in 0..1000 {
        node.sync().await;
        node.seconds(MAX_STALENESS);
        assert_eq!(node.ask(&issued.key).await, HIT);
        assert_eq!(node.ask(&unknown).await, DENIED_HIT);
    }
    node.moment();
    assert_eq!(node.ask(&issued.key).await, ASKED);
    assert_eq!(node.ask(&unknown).await, DENIED_ASKED);

    // A suspended machine was cut off, whatever the monotonic clock reads.
    node.sync().await;
    node.clock.set_wall(node.now() + Duration::from_secs(MAX_STALENESS));
    assert_eq!(node.ask(&issued.key).await, HIT);
    node.clock.set_wall(node.now() + Duration::from_nanos(1));
    assert_eq!(node.ask(&issued.key).await, ASKED);
}

#[tokio::test]
async fn a_change_alone_keeps_nothing_fresh() {
    let node = Node::over(Scripted::new());
    let (issued, other) = (node.store.issue(1).await, node.store.issue(2).await);
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.seconds(MAX_STALENESS);
    node.store.emit(prefix(&other, 0)).await;
    node.moment();
    assert_eq!(node.ask(&issued.key).await, ASKED);
}

#[tokio::test]
async fn hints_are_received_but_an_answer_gets_old_all_the_same() {
    let node = Node::over(Scripted::with_hints());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.edit(&issued, 2, 1, |record| record.name = "new".into());
    node.store.emit(prefix(&issued, 2)).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.seconds(MAX_STALENESS);
    // Whoever passes on hints may pass on this.
    node.sync().await;
    assert_eq!(node.ask(&issued.key).await, HIT);
    node.moment();
    assert_eq!(node.ask(&issued.key).await, ASKED);
    let health = node.authenticator.health();
    assert_eq!((health.last_sync, health.synced_to), (None, None));
}

#[tokio::test]
async fn while_the_store_fails_a_key_is_served_up_to_the_bound_and_then_it_is_a_503() {
    for store in [Scripted::new(), Scripted::without_feed()] {
        let node = Node::over(store);
        let issued = node.store.issue(1).await;
        assert_eq!(node.ask(&issued.key).await, ASKED);
        node.store.fail();
        node.seconds(MAX_STALENESS);
        assert_eq!(node.ask(&issued.key).await, HIT);
        assert!(!node.authenticator.health().is_store_failing, "nobody has asked it");
        node.moment();
        // Each time the store is queried, because it may be back.
        for _ in 0..3 {
            assert_eq!(node.ask(&issued.key).await, ASKED);
            assert!(node.authenticator.health().is_store_failing);
        }
        node.clock.advance(Duration::from_secs(STALE_IF_ERROR) - Duration::from_nanos(1));
        assert_eq!(node.ask(&issued.key).await, ASKED);
        node.moment();
        assert_eq!(node.ask(&issued.key).await, (503, 1));
        assert_eq!(node.ask(&issued.key).await, (503, 1));

        node.store.recover();
        assert_eq!(node.ask(&issued.key).await, ASKED);
        assert!(!node.authenticator.health().is_store_failing);
        assert_eq!(node.ask(&issued.key).await, HIT);
    }
}

#[tokio::test]
async fn a_store_that_was_failing_is_queried_again_at_the_next_request() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.fail();
    node.seconds(MAX_STALENESS + 1);
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.recover();
    node.store.edit(&issued, 2, 1, revoke);
    node.store.hold();
    // This one is not kept waiting for a store that may hang; what it receives is for those after it.
    assert_eq!(status(&node.authenticator, &issued.key).await, 200);
    node.store.let_go(1);
    node.store.has_under_way(0).await;
    node.store.hold_no_more();
    assert_eq!(node.store.take_asked(), 1);
    assert_eq!(node.ask(&issued.key).await, DENIED_HIT);
}

#[tokio::test]
async fn a_store_that_was_failing_and_answers_at_once_denies_a_revoked_key_at_once() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.fail();
    node.seconds(MAX_STALENESS + 1);
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.recover();
    node.store.edit(&issued, 2, 1, revoke);
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
}

#[tokio::test]
async fn whoever_wants_nothing_stale_gets_a_503_as_soon_as_the_store_fails() {
    let strict = |builder: AuthenticatorBuilder| builder.stale_if_error(Duration::ZERO);
    let node = Node::with(Scripted::without_feed(), strict);
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.fail();
    node.seconds(MAX_STALENESS);
    assert_eq!(node.ask(&issued.key).await, HIT);
    node.moment();
    assert_eq!(node.ask(&issued.key).await, (503, 1));
}

#[tokio::test]
async fn an_outage_never_looks_like_a_denial() {
    let node = Node::over(Scripted::without_feed());
    let unknown = unknown_key();
    assert_eq!(node.ask(&unknown).await, DENIED_ASKED);
    node.store.fail();
    node.seconds(MAX_STALENESS);
    assert_eq!(node.ask(&unknown).await, DENIED_HIT);
    node.moment();
    assert_eq!(node.ask(&unknown).await, (503, 1), "it may be a key by now");
    assert_eq!(node.ask(&unknown_key_with_id("0000000001")).await, (503, 1));
}

#[tokio::test]
async fn a_key_that_expires_while_the_store_fails_is_let_in_no_more() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    let expiry = DateTime::from(node.now() + Duration::from_secs(MAX_STALENESS + 10));
    node.store.edit(&issued, 1, 1, |record| record.expires_at = Some(expiry));
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.fail();
    node.seconds(MAX_STALENESS + 9);
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.seconds(1);
    assert_eq!(node.ask(&issued.key).await, (503, 1));
}

#[tokio::test]
async fn a_row_that_became_bad_is_a_500_and_not_an_outage() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.fail_with(StoreError::bad_row("key 17"));
    node.seconds(MAX_STALENESS + 1);
    assert_eq!(node.ask(&issued.key).await, (500, 1));
    assert!(!node.authenticator.health().is_store_failing);
}

#[tokio::test]
async fn a_key_that_the_feed_says_has_changed_is_not_served_while_the_store_fails() {
    for of_owner in [false, true] {
        let node = Node::over(Scripted::new());
        let issued = node.store.issue(1).await;
        assert_eq!(node.ask(&issued.key).await, ASKED);
        node.store.fail();
        node.store.emit(if of_owner { owner(&issued, 2) } else { prefix(&issued, 2) }).await;
        assert_eq!(node.ask(&issued.key).await, (503, 1));
        node.sync().await;
        assert_eq!(node.ask(&issued.key).await, (503, 1));
    }
}

#[tokio::test]
async fn a_key_that_the_store_has_called_revoked_is_never_served_again_while_the_store_fails() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.edit(&issued, 2, 1, revoke);
    node.seconds(MAX_STALENESS + 1);
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
    node.store.fail();
    node.seconds(MAX_STALENESS);
    assert_eq!(node.ask(&issued.key).await, DENIED_HIT);
    // 61 s after it was last valid, within the 90 s of a key of which nothing else is known.
    node.moment();
    assert_eq!(node.ask(&issued.key).await, (503, 1));
}

#[tokio::test]
async fn a_flood_of_unknown_keys_drives_out_no_valid_one_and_fills_no_memory() {
    // The second number is the one of the documentation, or that of valid keys if it is smaller.
    for (capacity, bound, flood) in [(None, 10_000, 50_000), (Some(100), 100, 500)] {
        let node = Node::with(Scripted::new(), |builder| match capacity {
            Some(keys) => builder.cache_capacity(keys),
            None => builder,
        });
        let issued = node.store.issue(1).await;
        assert_eq!(node.ask(&issued.key).await, ASKED);
        let unknown = |n: usize| unknown_key_with_id(&format!("{n:010}"));
        for n in 0..flood {
            assert_eq!(node.ask(&unknown(n)).await, DENIED_ASKED);
            // The very last one is cached, even in a flood.
            if n % 1000 == 0 {
                assert_eq!(node.ask(&unknown(n)).await, DENIED_HIT);
            }
        }
        assert_eq!(node.ask(&issued.key).await, HIT);
        assert_eq!(node.authenticator.health().cached_keys, 1);
        // Every tenth needs a look-up again. Those that are no longer cached drive out others, so that
        // there are no more of the others than there were.
        let mut cached = 0;
        for n in (0..flood).step_by(10) {
            let (outcome, asked) = node.ask(&unknown(n)).await;
            assert_eq!(outcome, 401);
            cached += 1 - asked;
        }
        assert!(10 * cached <= 2 * bound, "about {} are remembered", 10 * cached);
        assert_eq!(node.ask(&issued.key).await, HIT);
    }
}

#[tokio::test]
async fn at_most_the_capacity_of_keys_is_cached() {
    let node = Node::with(Scripted::new(), |builder| builder.cache_capacity(100));
    for _ in 0..1000 {
        assert_eq!(node.ask(&node.store.issue(1).await.key).await, ASKED);
    }
    let cached = node.authenticator.health().cached_keys;
    assert!((50..=100).contains(&cached), "{cached}");
}

#[tokio::test]
async fn with_a_capacity_of_0_nothing_is_cached() {
    let node = Node::with(Scripted::new(), |builder| builder.cache_capacity(0));
    let issued = node.store.issue(1).await;
    for _ in 0..3 {
        assert_eq!(node.ask(&issued.key).await, ASKED);
        assert_eq!(node.ask(&unknown_key()).await, DENIED_ASKED);
        assert_eq!(node.authenticator.health().cached_keys, 0);
    }
    node.store.fail();
    assert_eq!(node.ask(&issued.key).await, (503, 1));
}

#[tokio::test]
async fn what_is_invalidated_is_asked_for_at_the_next_request() {
    for store in [Scripted::new(), Scripted::without_feed()] {
        let node = Node::over(store);
        let (issued, wrong) = {
            let issued = node.store.issue(1).await;
            let wrong = with_wrong_secret(&issued.key);
            (issued, wrong)
        };
        let mut others = Vec::new();
        for _ in 0..5 {
            others.push(node.store.issue(1).await);
        }
        assert_eq!(hits(&node, &others).await, 0);
        // Before anything is known of it, too.
        node.authenticator.invalidate(&issued.prefix);
        for _ in 0..3 {
            assert_eq!(node.ask(&issued.key).await, ASKED);
            assert_eq!(node.ask(&wrong).await, DENIED_ASKED);
            assert_eq!(node.ask(&issued.key).await, HIT);
            assert_eq!(node.ask(&wrong).await, DENIED_HIT);
            node.authenticator.invalidate(&issued.prefix);
        }
        node.authenticator.invalidate("no such prefix");
        // Two prefixes may share a bucket, once in 8,192 times.
        assert!(hits(&node, &others).await >= 4);

        node.authenticator.invalidate(&issued.prefix);
        node.store.fail();
        assert_eq!(node.ask(&issued.key).await, (503, 1), "not even while the store fails");
    }
}

#[tokio::test]
async fn a_change_of_a_prefix_drops_its_keys_and_no_others() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    let mut others = Vec::new();
    for _ in 0..5 {
        // Of the same owner: a change of one key is none of the others.
        others.push(node.store.issue(1).await);
    }
    assert_eq!(node.ask(&issued.key).await, ASKED);
    let wrong = with_wrong_secret(&issued.key);
    assert_eq!(node.ask(&wrong).await, DENIED_ASKED);
    assert_eq!(hits(&node, &others).await, 0);
    for revision in 2..5 {
        node.store.edit(&issued, revision, 1, |record| record.name = revision.to_string());
        assert_eq!(node.ask(&issued.key).await, HIT, "nobody has said so");
        node.store.emit(prefix(&issued, revision)).await;
        assert_eq!(node.ask(&wrong).await, DENIED_ASKED);
        assert_eq!(node.ask(&issued.key).await, ASKED);
        assert_eq!(node.ask(&issued.key).await, HIT);
        let caller = node.authenticator.authenticate(&issued.key).await.unwrap();
        assert_eq!(caller.key().name, revision.to_string());
    }
    node.store.edit(&issued, 5, 1, revoke);
    node.store.emit(prefix(&issued, 5)).await;
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
    assert_eq!(node.ask(&issued.key).await, DENIED_HIT);
    // Two prefixes may share a bucket, once in 8,192 times; then each needs one more look-up.
    assert!(hits(&node, &others).await >= 4);
}

#[tokio::test]
async fn a_change_of_an_owner_drops_all_keys_of_that_owner_and_no_others() {
    let node = Node::over(Scripted::new());
    let (mut keys, mut others) = (Vec::new(), Vec::new());
    for n in 0..5 {
        keys.push(node.store.issue(1).await);
        others.push(node.store.issue(2 + n).await);
    }
    assert_eq!(hits(&node, &keys).await + hits(&node, &others).await, 0);
    for issued in &keys {
        node.store.edit(issued, 1, 2, |record| record.user.is_active = false);
    }
    node.store.emit(owner(&keys[0], 2)).await;
    for issued in &keys {
        assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
        let denial = node.authenticator.authenticate(&issued.key).await.unwrap_err();
        assert!(matches!(denial, Denial::InvalidKey(InvalidKey::OwnerInactive)), "{denial:?}");
    }
    assert!(hits(&node, &others).await >= 4);
    // A denial for the owner's sake is the owner's, too.
    for issued in &keys {
        assert_eq!(node.ask(&issued.key).await, DENIED_HIT);
        node.store.edit(issued, 1, 3, |record| record.user.is_active = true);
    }
    node.store.emit(owner(&keys[0], 3)).await;
    assert_eq!(hits(&node, &keys).await, 0);
}

#[tokio::test]
async fn a_store_without_revisions_says_0_and_the_change_counts_all_the_same() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    node.store.edit(&issued, 0, 0, |_| {});
    assert_eq!(node.ask(&issued.key).await, ASKED);
    for n in 0..3 {
        node.store.edit(&issued, 0, 0, |record| record.name = n.to_string());
        node.store.emit(if n == 1 { owner(&issued, 0) } else { prefix(&issued, 0) }).await;
        assert_eq!(node.ask(&issued.key).await, ASKED);
        assert_eq!(node.ask(&issued.key).await, HIT);
    }
}

#[tokio::test]
async fn changes_that_come_in_another_order_than_they_were_numbered_count_each() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    // Two rows under one prefix: the later number was committed first.
    node.store.edit(&issued, 9, 1, |_| {});
    node.store.emit(prefix(&issued, 9)).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.edit(&issued, 9, 1, revoke);
    node.store.emit(prefix(&issued, 8)).await;
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
}

#[tokio::test]
async fn a_reset_forgets_everything() {
    let node = Node::over(Scripted::new());
    let mut keys = Vec::new();
    for n in 0..10 {
        keys.push(node.store.issue(n).await);
    }
    let unknown = unknown_key();
    assert_eq!(hits(&node, &keys).await, 0);
    assert_eq!(node.ask(&unknown).await, DENIED_ASKED);
    for _ in 0..3 {
        assert_eq!(hits(&node, &keys).await, 10);
        assert_eq!(node.ask(&unknown).await, DENIED_HIT);
        node.store.emit(Change::Reset).await;
        assert_eq!(hits(&node, &keys).await, 0);
        assert_eq!(node.ask(&unknown).await, DENIED_ASKED);
    }
    node.store.emit(Change::Reset).await;
    node.store.fail();
    assert_eq!(node.ask(&keys[0].key).await, (503, 1), "not even while the store fails");
}

/// Time does not pass but where nothing else is to be done: the pauses between two questions are skipped.
#[tokio::test(start_paused = true)]
async fn an_answer_from_before_a_change_that_is_known_is_never_served() {
    for of_owner in [false, true] {
        let node = Node::over(Scripted::new());
        let issued = node.store.issue(1).await;
        assert_eq!(node.ask(&issued.key).await, ASKED);
        node.store.emit(if of_owner { owner(&issued, 7) } else { prefix(&issued, 7) }).await;
        // A replica that lags: revision 1, again and again.
        let denial = node.authenticator.authenticate(&issued.key).await.unwrap_err();
        let Denial::Unavailable(error) = &denial else { panic!("{denial:?}") };
        assert!(error.is_transient(), "{error:?}");
        assert!(denial.retry_after().is_some());
        assert_eq!(node.store.take_asked(), 4);
        assert_eq!(node.ask(&issued.key).await, (503, 4), "that was not remembered");

        // One below is no better; the very revision is.
        let revisions = |revision| if of_owner { (1, revision) } else { (revision, 1) };
        let (key, user) = revisions(6);
        node.store.edit(&issued, key, user, |_| {});
        assert_eq!(node.ask(&issued.key).await, (503, 4));
        let (key, user) = revisions(7);
        node.store.edit(&issued, key, user, |_| {});
        assert_eq!(node.ask(&issued.key).await, ASKED);
        assert_eq!(node.ask(&issued.key).await, HIT);
    }
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_catches_up_meanwhile_is_asked_until_it_has() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.emit(prefix(&issued, 7)).await;
    node.store.hold();
    let (asking, key) = (node.authenticator.clone(), issued.key.clone());
    let answer = tokio::spawn(async move { asking.authenticate(&key).await });
    // Three times it has read the old row; what it reads next is new.
    for n in 1..=4 {
        eventually("it is asked", async || node.store.asked() == n).await;
        if n == 3 {
            node.store.edit(&issued, 7, 1, revoke);
        }
        node.store.let_go(1);
    }
    let denial = answer.await.unwrap().unwrap_err();
    assert!(matches!(denial, Denial::InvalidKey(InvalidKey::Revoked)), "{denial:?}");
    assert_eq!(node.store.take_asked(), 4);
    assert_eq!(node.ask(&issued.key).await, DENIED_HIT);
}

#[tokio::test(start_paused = true)]
async fn unknown_from_before_a_change_that_is_known_is_not_believed_either() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    node.store.delete(&issued, 3);
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
    // By the feed it was stored again, but the replica lags behind.
    node.store.emit(prefix(&issued, 4)).await;
    assert_eq!(node.ask(&issued.key).await, (503, 4));
    node.store.delete(&issued, 4);
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
    assert_eq!(node.ask(&issued.key).await, DENIED_HIT);
}

#[tokio::test(start_paused = true)]
async fn a_feed_that_ends_is_listened_to_again() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.is_listened_to(1).await;
    for times in 2..5 {
        node.store.end_feed();
        eventually("it is listened to again", async || node.store.times_listened() == times).await;
        node.store.edit(&issued, times as u64, 1, |_| {});
        node.store.emit(prefix(&issued, times as u64)).await;
        assert_eq!(node.ask(&issued.key).await, ASKED);
        assert_eq!(node.ask(&issued.key).await, HIT);
    }
}

/// A feed looks back for 65 minutes when it is listened to anew. Whoever did not listen for longer has
/// missed what was before.
#[tokio::test(start_paused = true)]
async fn a_feed_that_was_away_for_longer_than_it_looks_back_makes_nothing_fresh_again() {
    let node = Node::over(Scripted::new());
    let (issued, other) = (node.store.issue(1).await, node.store.issue(2).await);
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.is_listened_to(1).await;
    node.sync().await;
    node.store.end_feed();
    // Nobody receives this.
    node.store.edit(&issued, 2, 1, revoke);
    node.seconds(2 * 3600);
    eventually("it is listened to again", async || node.store.times_listened() == 2).await;
    // Nothing has happened within the last 65 minutes.
    node.sync().await;
    assert_eq!(node.ask(&other.key).await, ASKED);
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
}

#[tokio::test]
async fn a_store_without_a_feed_is_asked_for_it_once() {
    let node = Node::over(Scripted::without_feed());
    for _ in 0..10 {
        let issued = node.store.issue(1).await;
        assert_eq!(node.ask(&issued.key).await, ASKED);
    }
    node.store.is_listened_to(1).await;
}

#[tokio::test]
async fn a_key_that_is_issued_after_it_was_asked_for_in_vain_works_soon() {
    let store = MemoryStore::new();
    let authenticator = Authenticator::new(store.clone());
    let key = unknown_key();
    assert_eq!(status(&authenticator, &key).await, 401);
    let user = store.insert_user("ada@example.com", "user", &Attribution::default()).await.unwrap();
    let record = KeyRecord::new(0, "z".repeat(10), user);
    store
        .insert_key(&StoredKey::new(record, KeyHash::sha256(&key)), &Attribution::default())
        .await
        .unwrap();
    eventually("it works", async || status(&authenticator, &key).await == 200).await;
}

#[tokio::test]
async fn an_owner_who_is_made_inactive_takes_all_their_keys_along() {
    let fixture = fixture().await;
    let (second, authenticator) =
        (fixture.issue(|new| new).await, Authenticator::new(fixture.store.clone()));
    let bob = fixture.manager.create_user("bob@example.com", "user").await.unwrap().id;
    let bobs = fixture.manager.issue(NewKey::new(bob, "k")).await.unwrap();
    let keys = [&*fixture.key, second.expose_secret()];
    for key in keys.iter().chain(&[bobs.expose_secret()]) {
        assert_eq!(status(&authenticator, key).await, 200);
    }
    let mut ada = User::new(fixture.user.clone(), "ada@example.com");
    ada.is_active = false;
    fixture.store.update_user(&ada, &Attribution::default()).await.unwrap().unwrap();
    for key in keys {
        eventually("it is refused", async || status(&authenticator, key).await == 401).await;
    }
    assert_eq!(status(&authenticator, bobs.expose_secret()).await, 200);
}

#[tokio::test]
async fn layers_and_clones_of_one_authenticator_share_what_is_cached_and_others_do_not() {
    let fixture = fixture().await;
    let store = Counted::over(fixture.store.clone());
    let authenticator = Authenticator::new(store.clone());
    let first = ApiKeyAuthLayer::from(authenticator.clone());
    let second = ApiKeyAuthLayer::from(authenticator.clone()).optional();
    assert_eq!(send(&first, bearer(&fixture.key)).await.status(), 200);
    assert_eq!(store.take_asked(), 1);
    assert_eq!(send(&second, bearer(&fixture.key)).await.body, "ada@example.com");
    assert_eq!(status(&authenticator.clone(), &fixture.key).await, 200);
    assert_eq!(send(&first.clone(), bearer(&fixture.key)).await.status(), 200);
    assert_eq!(store.take_asked(), 0);
    let third = first.clone().scheme(KeyScheme::default());
    for stranger in [third, ApiKeyAuthLayer::new(store.clone())] {
        assert_eq!(send(&stranger, bearer(&fixture.key)).await.status(), 200);
        assert_eq!(store.take_asked(), 1);
    }
}

#[tokio::test]
async fn settings_stay_when_a_layer_gets_another_scheme() {
    let fixture = fixture().await;
    let store = Counted::over(fixture.store.clone());
    let authenticator = Authenticator::builder(store.clone()).cache_capacity(0).build();
    let layer = ApiKeyAuthLayer::from(authenticator).scheme(KeyScheme::default());
    for _ in 0..2 {
        assert_eq!(send(&layer, bearer(&fixture.key)).await.status(), 200);
        assert_eq!(store.take_asked(), 1);
    }
}

#[tokio::test]
async fn health_says_how_the_caches_stand() {
    let node = Node::over(Scripted::new());
    let (issued, other) = (node.store.issue(1).await, node.store.issue(1).await);
    let figures = || {
        let health = node.authenticator.health();
        (health.cached_keys, health.lookups_under_way, health.is_store_failing, health.last_sync)
    };
    assert_eq!(figures(), (0, 0, false, None));
    node.ask(&issued.key).await;
    node.ask(&unknown_key()).await;
    assert_eq!(figures(), (1, 0, false, None));

    node.sync().await;
    assert_eq!(figures(), (1, 0, false, Some(Duration::ZERO)));
    node.seconds(7);
    assert_eq!(figures(), (1, 0, false, Some(Duration::from_secs(7))));
    node.clock.set_wall(node.now() + Duration::from_secs(5));
    assert_eq!(figures(), (1, 0, false, Some(Duration::from_secs(12))));

    node.store.hold();
    let (asking, key) = (node.authenticator.clone(), other.key.clone());
    let waiting = tokio::spawn(async move { status(&asking, &key).await });
    node.store.has_under_way(1).await;
    assert_eq!(figures().1, 1);
    node.store.fail();
    node.store.let_go(1);
    assert_eq!(waiting.await.unwrap(), 503);
    assert_eq!((figures().1, figures().2), (0, true));
    node.store.hold_no_more();
    node.store.recover();
    assert_eq!(status(&node.authenticator, &other.key).await, 200);
    assert_eq!((figures().0, figures().1, figures().2), (2, 0, false));
}

#[tokio::test]
async fn a_store_that_is_overloaded_does_not_count_as_failing() {
    let node = Node::over(Scripted::new());
    node.store.fail_with(StoreError::overloaded("busy", Duration::from_secs(1)));
    assert_eq!(node.ask(&unknown_key()).await, (503, 1));
    assert!(!node.authenticator.health().is_store_failing);
}

#[tokio::test]
async fn after_a_shutdown_a_node_is_like_one_that_is_cut_off() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.sync().await;
    assert!(node.store.has_listeners());
    node.authenticator.shutdown().await;
    others_make("nobody listens", || !node.store.has_listeners()).await;
    node.authenticator.shutdown().await;

    node.seconds(MAX_STALENESS);
    assert_eq!(node.ask(&issued.key).await, HIT);
    node.store.edit(&issued, 2, 1, revoke);
    node.moment();
    assert_eq!(node.ask(&issued.key).await, DENIED_ASKED);
    assert_eq!(node.ask(&node.store.issue(1).await.key).await, ASKED);
    assert_eq!(node.store.times_listened(), 1, "nobody began to listen again");
}

#[tokio::test]
async fn a_node_that_is_shut_down_before_its_first_request_never_listens() {
    let node = Node::over(Scripted::new());
    node.authenticator.shutdown().await;
    assert_eq!(node.ask(&node.store.issue(1).await.key).await, ASKED);
    assert_eq!(node.store.times_listened(), 0);
}

#[tokio::test]
async fn nobody_listens_before_the_first_request_or_after_the_last_clone() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    tokio::task::yield_now().await;
    assert_eq!(node.store.times_listened(), 0);
    let clone = node.authenticator.clone();
    assert_eq!(node.ask(&issued.key).await, ASKED);
    node.store.is_listened_to(1).await;
    let store = node.store.clone();
    drop(node);
    tokio::task::yield_now().await;
    assert!(store.has_listeners());
    drop(clone);
    others_make("nobody listens", || !store.has_listeners()).await;
}

#[tokio::test]
async fn what_is_cached_is_not_in_the_debug_output() {
    let fixture = fixture().await;
    let authenticator = Authenticator::new(fixture.store.clone());
    assert_eq!(status(&authenticator, &fixture.key).await, 200);
    let shown = format!("{authenticator:?} {authenticator:#?} {:?}", authenticator.health());
    assert!(!shown.contains("ada@example.com") && !shown.contains(&fixture.key[20..]), "{shown}");
    assert!(shown.contains("cached_keys: 1"), "{shown}");
}

/// Whoever takes the trouble to write a feed may well assume_verified for keys that are proven elsewhere.
struct Provider(tokio::sync::broadcast::Sender<Change>);

impl KeyStore for Provider {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let record = KeyRecord::new(1, lookup.id(), User::new(7, "a@b.c"));
        Ok(lookup.assume_verified(record).with_key_revision(Revision(5)))
    }

    fn changes(&self, _: SystemTime) -> ChangeStream {
        let mut wakes = self.0.subscribe();
        ChangeStream::new(futures_util::stream::poll_fn(move |cx| {
            let mut next = std::pin::pin!(wakes.recv());
            next.as_mut().poll(cx).map(Result::ok)
        }))
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_vouches_can_say_that_an_owner_has_changed() {
    let (feed, _) = tokio::sync::broadcast::channel(8);
    let authenticator = Authenticator::new(Provider(feed.clone()));
    let key = unknown_key();
    assert_eq!(status(&authenticator, &key).await, 200);
    others_make("it listens", || feed.receiver_count() == 1).await;
    feed.send(Change::Owner(7.into(), Revision(0))).unwrap();
    feed.send(Change::Prefix("z".repeat(10), Revision(5))).unwrap();
    tokio::task::yield_now().await;
    assert_eq!(status(&authenticator, &key).await, 200);
}
