//! One look-up for everybody who wants to know the same, on a task of its own.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use http_body_util::Full;
use tokio::{
    runtime::{Builder, Runtime},
    task::JoinHandle,
};
use tower::Layer;
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, Denial, StoreError,
    denial::InvalidKey,
    error::StoreErrorKind,
    record::{Revision, UserId},
    store::Change,
};

use crate::support::{
    self, bearer,
    counted::Counted,
    eventually::{eventually, others_make},
    fixture,
    probe::{block_on, poll, poll_ready, poll_to_end, probe},
    scripted::{Issued, Node, Scripted, status},
    stores::Held,
    unknown_key,
};

/// The name of the key that a request is let in with, or why it is not.
type Pending = JoinHandle<Result<String, Denial>>;

/// A request on a task of its own, which has begun.
async fn begin(authenticator: &Authenticator, key: &str) -> Pending {
    let (authenticator, key) = (authenticator.clone(), key.to_owned());
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let request = tokio::spawn(async move {
        let mut request = Box::pin(authenticator.authenticate(&key));
        let first = poll(&mut request);
        begun.send(()).unwrap();
        let answer_of = match first {
            std::task::Poll::Ready(answer_of) => answer_of,
            std::task::Poll::Pending => request.await,
        };
        answer_of.map(|caller| caller.key().name.clone())
    });
    has_begun.await.unwrap();
    request
}

async fn answer_of(request: Pending) -> Result<String, Denial> {
    request.await.expect("the request does not panic")
}

fn named(issued: &Issued, node: &Node, revision: u64, name: &str) {
    node.store.edit(issued, revision, revision, |record| record.name = name.into());
}

fn unavailable(answer_of: Result<String, Denial>) -> StoreError {
    match answer_of {
        Err(Denial::Unavailable(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_thousand_requests_at_once_for_one_cold_key_are_one_look_up() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    node.store.hold();
    let mut requests = Vec::new();
    for _ in 0..1000 {
        requests.push(begin(&node.authenticator, &issued.key).await);
    }
    node.store.has_under_way(1).await;
    assert_eq!(node.authenticator.health().lookups_under_way, 1);
    node.store.let_go(1);
    for request in requests {
        assert!(answer_of(request).await.is_ok());
    }
    assert_eq!(node.store.take_asked(), 1);
    assert_eq!(node.authenticator.health().lookups_under_way, 0);
    assert_eq!(node.ask(&issued.key).await, (200, 0));
}

#[tokio::test]
async fn a_thousand_requests_at_once_for_one_unknown_key_are_one_look_up() {
    let node = Node::over(Scripted::new());
    let unknown = unknown_key();
    let requests = join_all((0..1000).map(|_| status(&node.authenticator, &unknown))).await;
    assert!(requests.into_iter().all(|answer_of| answer_of == 401));
    assert_eq!(node.store.take_asked(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_requests_on_several_threads_are_one_look_up() {
    for _ in 0..20 {
        let fixture = fixture().await;
        let store = Counted::over(fixture.store.clone());
        let authenticator = Authenticator::new(store.clone());
        let mut requests = tokio::task::JoinSet::new();
        for _ in 0..1000 {
            let (authenticator, key) = (authenticator.clone(), fixture.key.clone());
            requests.spawn(async move { status(&authenticator, &key).await });
        }
        assert!(requests.join_all().await.into_iter().all(|answer_of| answer_of == 200));
        assert_eq!(store.take_asked(), 1);
    }
}

#[tokio::test]
async fn a_bcrypt_key_that_a_thousand_ask_for_at_once_is_checked_once() {
    let store = support::store_of(["key-0001".to_owned()], 4).await;
    // Without look-ups or a memory, the queue would be full and the most of them turned away.
    let scheme = support::old_and_new_keys().bcrypt_queue(1).bcrypt_slots(1).build().unwrap();
    let authenticator = Authenticator::builder(store).scheme(scheme).build();
    let ask = || status(&authenticator, "key-0001-of-mine");
    let answers = join_all((0..1000).map(|_| ask())).await;
    assert!(answers.into_iter().all(|answer_of| answer_of == 200));
}

#[tokio::test]
async fn a_request_that_was_begun_before_another_had_its_answer_needs_no_look_up_of_its_own() {
    let fixture = fixture().await;
    let store = Counted::over(fixture.store.clone());
    let mut service = ApiKeyAuthLayer::new(store.clone()).layer(probe().0);
    let mut call = || {
        assert!(poll_ready::<_, http::Request<Full<bytes::Bytes>>>(&mut service).is_ready());
        tower::Service::call(&mut service, bearer(&fixture.key))
    };
    // Neither is known yet; the second is polled when the first has its answer.
    let (first, second) = (call(), call());
    assert_eq!(first.await.unwrap().status(), 200);
    assert_eq!(second.await.unwrap().status(), 200);
    assert_eq!(store.take_asked(), 1);
}

#[tokio::test]
async fn look_ups_of_different_keys_do_not_wait_for_each_other() {
    let node = Node::over(Scripted::new());
    let (slow, quick) = (node.store.issue(1).await, node.store.issue(1).await);
    node.store.hold();
    let waiting = begin(&node.authenticator, &slow.key).await;
    node.store.has_under_way(1).await;
    node.store.hold_no_more();
    assert_eq!(status(&node.authenticator, &quick.key).await, 200);
    assert!(!waiting.is_finished());
    node.store.let_go(1);
    assert!(answer_of(waiting).await.is_ok());
}

#[tokio::test]
async fn when_the_first_caller_goes_away_the_others_are_answered() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    node.store.hold();
    let first = begin(&node.authenticator, &issued.key).await;
    node.store.has_under_way(1).await;
    let mut others = Vec::new();
    for _ in 0..10 {
        others.push(begin(&node.authenticator, &issued.key).await);
    }
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    // Of the others, half.
    for gone in others.drain(..5) {
        gone.abort();
        assert!(gone.await.unwrap_err().is_cancelled());
    }
    assert_eq!(node.authenticator.health().lookups_under_way, 1);
    node.store.let_go(1);
    for request in others {
        assert!(answer_of(request).await.is_ok());
    }
    assert_eq!(node.store.take_asked(), 1);
}

#[tokio::test]
async fn a_store_that_panics_is_an_error_for_everybody_who_waits_and_the_next_request_works() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    node.store.hold();
    let mut requests = Vec::new();
    for _ in 0..10 {
        requests.push(begin(&node.authenticator, &issued.key).await);
    }
    node.store.has_under_way(1).await;
    node.store.panic();
    node.store.let_go(1);
    for request in requests {
        let error = unavailable(answer_of(request).await);
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
        assert!(error.is_transient());
    }
    assert_eq!(node.store.take_asked(), 1);
    node.store.hold_no_more();
    node.store.recover();
    assert_eq!(node.ask(&issued.key).await, (200, 1));
}

#[tokio::test]
async fn a_store_that_panics_makes_a_key_that_is_cached_stale_and_not_denied() {
    let node = Node::over(Scripted::without_feed());
    let issued = node.store.issue(1).await;
    assert_eq!(node.ask(&issued.key).await, (200, 1));
    node.store.panic();
    node.seconds(31);
    assert_eq!(node.ask(&issued.key).await, (200, 1));
    node.seconds(60);
    assert_eq!(node.ask(&issued.key).await, (503, 1));
}

#[tokio::test]
async fn an_error_reaches_everybody_who_waits_and_is_not_cached() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    node.store.hold();
    let mut requests = Vec::new();
    for _ in 0..10 {
        requests.push(begin(&node.authenticator, &issued.key).await);
    }
    node.store.has_under_way(1).await;
    node.store.fail_with(StoreError::rejected("no such table"));
    node.store.let_go(1);
    for request in requests {
        let error = unavailable(answer_of(request).await);
        assert_eq!(error.kind(), StoreErrorKind::Rejected);
        let source = std::error::Error::source(&error).expect("it keeps its cause");
        assert_eq!(source.to_string(), "no such table");
    }
    node.store.hold_no_more();
    assert_eq!(node.store.take_asked(), 1);
    for _ in 0..2 {
        assert_eq!(node.ask(&issued.key).await, (503, 1));
    }
    node.store.recover();
    assert_eq!(node.ask(&issued.key).await, (200, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_look_up_that_has_ended_is_not_joined_by_who_comes_after_it() {
    let node = Node::with(Scripted::without_feed(), |builder| builder.cache_capacity(0));
    let issued = node.store.issue(1).await;
    for n in 1..=1000 {
        assert_eq!(status(&node.authenticator, &issued.key).await, 200);
        assert_eq!(node.store.asked(), n);
    }
    node.store.take_asked();
    node.store.fail();
    for n in 1..=1000 {
        assert_eq!(status(&node.authenticator, &issued.key).await, 503);
        assert_eq!(node.store.asked(), n);
    }
}

/// Time does not pass but where nothing else is to be done: nobody waits for 15 s.
#[tokio::test(start_paused = true)]
async fn a_store_that_never_answers_is_given_up_for_everybody_who_waits() {
    let node = Node::over(Scripted::new());
    let issued = node.store.issue(1).await;
    node.store.hold();
    let begun = tokio::time::Instant::now();
    let requests = join_all((0..3).map(|_| node.authenticator.authenticate(&issued.key)));
    for answer_of in requests.await {
        let Err(Denial::Unavailable(error)) = answer_of else { panic!("{answer_of:?}") };
        assert_eq!(error.kind(), StoreErrorKind::Timeout);
    }
    assert_eq!(begun.elapsed().as_secs(), 15);
    assert!(node.authenticator.health().is_store_failing);
    node.store.has_under_way(0).await;
    node.store.hold_no_more();
    assert_eq!(status(&node.authenticator, &issued.key).await, 200);
}

/// What can make an answer that is under way one from before it, for a store without revisions.
#[derive(Debug, Clone, Copy)]
enum Event {
    Key,
    Owner,
    Reset,
    Invalidate,
}

impl Event {
    const ALL: [Self; 4] = [Self::Key, Self::Owner, Self::Reset, Self::Invalidate];

    async fn happen(self, node: &Node, issued: &Issued, revision: u64) {
        let revision = Revision(revision);
        let change = match self {
            Self::Key => Change::Prefix(issued.prefix.clone(), revision),
            Self::Owner => Change::Owner(issued.owner.clone(), revision),
            Self::Reset => Change::Reset,
            Self::Invalidate => return node.authenticator.invalidate(&issued.prefix),
        };
        node.store.emit(change).await;
    }
}

/// A node that listens, and a key without revisions that is not known yet and has the name "old".
async fn listening() -> (Node, Issued) {
    let node = Node::over(Scripted::new());
    let other = node.store.issue(99).await;
    assert_eq!(node.ask(&other.key).await, (200, 1));
    node.store.is_listened_to(1).await;
    let issued = node.store.issue(1).await;
    named(&issued, &node, 0, "old");
    (node, issued)
}

#[tokio::test]
async fn a_look_up_that_was_under_way_before_a_change_is_not_joined_after_it() {
    for event in Event::ALL {
        for old_lands_first in [true, false] {
            let (node, issued) = listening().await;
            node.store.hold();
            let before = [
                begin(&node.authenticator, &issued.key).await,
                begin(&node.authenticator, &issued.key).await,
            ];
            node.store.has_under_way(1).await;
            named(&issued, &node, 0, "new");
            event.happen(&node, &issued, 0).await;
            let after = [
                begin(&node.authenticator, &issued.key).await,
                begin(&node.authenticator, &issued.key).await,
            ];
            node.store.has_under_way(2).await;
            assert_eq!(node.store.take_asked(), 2, "{event:?}: one look-up for each two");

            if old_lands_first {
                // The gate is fair: the first to come goes first.
                node.store.let_go(1);
                for request in before {
                    assert_eq!(answer_of(request).await.unwrap(), "old", "{event:?}");
                }
                node.store.hold_no_more();
                // It is not cached, and the one under way is joined still.
                let third = begin(&node.authenticator, &issued.key).await;
                node.store.let_go(1);
                for request in after.into_iter().chain([third]) {
                    assert_eq!(answer_of(request).await.unwrap(), "new", "{event:?}");
                }
                assert_eq!(node.store.take_asked(), 0, "{event:?}");
            } else {
                node.store.hold_no_more();
                // A third one, after another change, is quicker than both.
                named(&issued, &node, 0, "newest");
                event.happen(&node, &issued, 0).await;
                let newest = begin(&node.authenticator, &issued.key).await;
                assert_eq!(answer_of(newest).await.unwrap(), "newest", "{event:?}");
                node.store.let_go(2);
                for request in before {
                    assert_eq!(answer_of(request).await.unwrap(), "old", "{event:?}");
                }
                for request in after {
                    assert_eq!(answer_of(request).await.unwrap(), "new", "{event:?}");
                }
                assert_eq!(node.store.take_asked(), 1, "{event:?}");
            }
            let last = node.authenticator.authenticate(&issued.key).await.unwrap();
            let expected = if old_lands_first { "new" } else { "newest" };
            assert_eq!(last.key().name, expected, "{event:?}");
            assert_eq!(node.store.take_asked(), 0, "{event:?}: the latest answer is remembered");
        }
    }
}

#[tokio::test]
async fn an_old_answer_that_nobody_overtook_is_not_cached() {
    for event in Event::ALL {
        let (node, issued) = listening().await;
        node.store.hold();
        let before = begin(&node.authenticator, &issued.key).await;
        node.store.has_under_way(1).await;
        named(&issued, &node, 0, "new");
        event.happen(&node, &issued, 0).await;
        node.store.let_go(1);
        assert_eq!(answer_of(before).await.unwrap(), "old", "{event:?}");
        node.store.hold_no_more();
        node.store.take_asked();
        let after = node.authenticator.authenticate(&issued.key).await.unwrap();
        assert_eq!((after.key().name.as_str(), node.store.take_asked()), ("new", 1), "{event:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn where_there_are_revisions_those_who_asked_before_a_change_get_the_new_answer_too() {
    for event in [Event::Key, Event::Owner] {
        let (node, issued) = listening().await;
        named(&issued, &node, 1, "old");
        node.store.hold();
        let before = begin(&node.authenticator, &issued.key).await;
        node.store.has_under_way(1).await;
        named(&issued, &node, 2, "new");
        event.happen(&node, &issued, 2).await;
        let after = begin(&node.authenticator, &issued.key).await;
        node.store.hold_no_more();
        node.store.let_go(2);
        for request in [before, after] {
            assert_eq!(answer_of(request).await.unwrap(), "new", "{event:?}");
        }
        assert_eq!(node.ask(&issued.key).await.0, 200);
        let last = node.authenticator.authenticate(&issued.key).await.unwrap();
        assert_eq!(last.key().name, "new");
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_gets_the_answer_from_before_a_revocation_that_has_a_revision() {
    let (node, issued) = listening().await;
    node.store.edit(&issued, 1, 1, |_| {});
    node.store.hold();
    let before = begin(&node.authenticator, &issued.key).await;
    node.store.has_under_way(1).await;
    node.store.edit(&issued, 2, 1, |record| record.is_active = false);
    Event::Key.happen(&node, &issued, 2).await;
    node.store.hold_no_more();
    node.store.let_go(1);
    let denial = answer_of(before).await.unwrap_err();
    assert!(matches!(denial, Denial::InvalidKey(InvalidKey::Revoked)), "{denial:?}");
    node.store.take_asked();
    assert_eq!(node.ask(&issued.key).await, (401, 0));
}

#[tokio::test]
async fn a_change_of_another_key_lets_requests_join_as_before() {
    let (node, other) = listening().await;
    let mut keys = Vec::new();
    for _ in 0..5 {
        keys.push(node.store.issue(1).await);
    }
    node.store.hold();
    let mut requests = Vec::new();
    for issued in &keys {
        requests.push(begin(&node.authenticator, &issued.key).await);
    }
    node.store.has_under_way(5).await;
    Event::Key.happen(&node, &other, 2).await;
    for issued in &keys {
        requests.push(begin(&node.authenticator, &issued.key).await);
    }
    node.store.let_go(10);
    for request in requests {
        assert!(answer_of(request).await.is_ok());
    }
    // Two prefixes may share a bucket, once in 8,192 times.
    let asked = node.store.take_asked();
    assert!((5..=6).contains(&asked), "{asked}");
}

#[tokio::test]
async fn a_hundred_requests_for_one_cold_key_are_one_look_up_while_others_sign_up() {
    let (node, _) = listening().await;
    let issued = node.store.issue(1).await;
    node.store.take_asked();
    node.store.hold();
    let mut requests = Vec::new();
    for n in 0..100 {
        requests.push(begin(&node.authenticator, &issued.key).await);
        let somebody = Change::Owner(UserId::from(1000 + n), Revision(1000 + n as u64));
        node.store.emit(somebody).await;
    }
    node.store.has_under_way(1).await;
    node.store.let_go(1);
    for request in requests {
        assert!(answer_of(request).await.is_ok());
    }
    // An owner may share the key's bucket, once in 8,192 times.
    let asked = node.store.take_asked();
    assert!((1..=2).contains(&asked), "{asked}");
}

#[tokio::test(start_paused = true)]
async fn who_joins_after_the_owner_was_deactivated_does_not_get_the_answer_from_before() {
    let (node, issued) = listening().await;
    node.store.edit(&issued, 1, 1, |_| {});
    node.store.hold();
    let before = begin(&node.authenticator, &issued.key).await;
    node.store.has_under_way(1).await;
    node.store.edit(&issued, 1, 2, |record| record.user.is_active = false);
    Event::Owner.happen(&node, &issued, 2).await;
    let after = begin(&node.authenticator, &issued.key).await;
    node.store.hold_no_more();
    node.store.let_go(1);
    for request in [before, after] {
        let denial = answer_of(request).await.unwrap_err();
        assert!(matches!(denial, Denial::InvalidKey(InvalidKey::OwnerInactive)), "{denial:?}");
    }
}

#[test]
fn without_a_runtime_a_key_that_is_cached_is_let_in_and_another_is_a_503() {
    let node = Node::over(Scripted::new());
    let here = runtime();
    let issued = here.block_on(node.store.issue(1));
    let unavailable = |key: &str| {
        let denial = block_on(node.authenticator.authenticate(key)).unwrap_err();
        let Denial::Unavailable(error) = &denial else { panic!("{denial:?}") };
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
        assert!(denial.retry_after().is_some());
    };
    unavailable(&issued.key);
    assert_eq!(node.store.take_asked(), 0);
    assert_eq!(here.block_on(node.ask(&issued.key)), (200, 1));
    drop(here);
    assert_eq!(block_on(status(&node.authenticator, &issued.key)), 200);
    unavailable(&unknown_key());
    node.seconds(31);
    unavailable(&issued.key);
    assert_eq!(node.store.take_asked(), 0);
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn a_runtime_that_dies_during_a_look_up_is_an_error_for_those_who_wait_on_another() {
    let node = Node::over(Scripted::new());
    let (first, second) = (runtime(), runtime());
    let issued = first.block_on(node.store.issue(1));
    node.store.hold();
    let died = first.block_on(begin(&node.authenticator, &issued.key));
    first.block_on(node.store.has_under_way(1));
    let waiting = second.block_on(begin(&node.authenticator, &issued.key));
    assert_eq!(node.store.take_asked(), 1, "the second has joined the first");
    drop(first);
    second.block_on(async {
        assert!(died.await.unwrap_err().is_cancelled());
        assert_eq!(unavailable(answer_of(waiting).await).kind(), StoreErrorKind::Unavailable);
        assert_eq!(node.authenticator.health().lookups_under_way, 0);
        node.store.hold_no_more();
        assert_eq!(node.ask(&issued.key).await, (200, 1));

        // The background work has begun anew here: the feed counts.
        node.store.is_listened_to(2).await;
        node.store.edit(&issued, 2, 1, |record| record.is_active = false);
        node.store.emit(Change::Prefix(issued.prefix.clone(), Revision(2))).await;
        assert_eq!(node.ask(&issued.key).await, (401, 1));
    });
}

/// Like a program that blocks on one thing after the other, and drops what takes too long.
#[test]
fn a_runtime_that_nobody_drives_any_more_does_not_hang_requests_on_another() {
    let node = Node::over(Scripted::new());
    let (idle, busy) =
        (runtime(), Builder::new_current_thread().enable_all().start_paused(true).build().unwrap());
    let issued = idle.block_on(async {
        let issued = node.store.issue(1).await;
        node.store.hold();
        let request = begin(&node.authenticator, &issued.key).await;
        node.store.has_under_way(1).await;
        request.abort();
        issued
    });
    node.store.hold_no_more();
    // The look-up could go on by now, but the runtime that it is on stands still.
    busy.block_on(async {
        let request = node.authenticator.authenticate(&issued.key);
        let answer = tokio::time::timeout(Duration::from_secs(3600), request).await;
        match answer.expect("it is answered within an hour") {
            Ok(_) | Err(Denial::Unavailable(_)) => {}
            Err(denial) => panic!("{denial:?}"),
        }
    });
    drop(idle);
}

#[tokio::test]
async fn a_runtime_without_a_timer_is_a_503_and_no_hang() {
    let fixture = fixture().await;
    let outcome = std::thread::spawn(move || {
        let bare = Builder::new_current_thread().build().unwrap();
        let authenticator = Authenticator::new(fixture.store.clone());
        bare.block_on(authenticator.authenticate(&fixture.key)).map(drop)
    });
    let denial =
        tokio::task::spawn_blocking(|| outcome.join().unwrap()).await.unwrap().unwrap_err();
    assert!(matches!(denial, Denial::Unavailable(_)), "{denial:?}");
}

#[tokio::test]
async fn a_look_up_that_outlives_the_last_handle_ends_on_its_own() {
    let fixture = fixture().await;
    let store = Held::new(fixture.store.clone());
    let authenticator = Authenticator::new(store.clone());
    let mut request = Box::pin(authenticator.authenticate(&fixture.key));
    assert!(poll(&mut request).is_pending());
    store.is_asked(1).await;
    drop(request);
    drop(authenticator);
    assert_eq!(store.under_way(), 1);
    store.let_one_go();
    others_make("the look-up ends", || store.under_way() == 0).await;
}

#[tokio::test]
async fn a_request_whose_authenticator_is_gone_is_answered() {
    let fixture = fixture().await;
    let store = Held::new(fixture.store.clone());
    let (inner, called) = probe();
    let mut service = ApiKeyAuthLayer::new(store.clone()).layer(inner);
    assert!(poll_ready::<_, http::Request<Full<bytes::Bytes>>>(&mut service).is_ready());
    let mut answer = tower::Service::call(&mut service, bearer(&fixture.key));
    drop(service);
    assert!(poll(&mut answer).is_pending());
    store.let_one_go();
    assert_eq!(poll_to_end(&mut answer).await.unwrap().status(), 200);
    // The instance that was made ready after the look-up.
    assert_eq!(called.called(), [1]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_that_comes_after_a_revocation_was_received_is_let_in_whatever_is_under_way() {
    let fixture = fixture().await;
    let authenticator = Authenticator::new(fixture.store.clone());
    for _ in 0..100 {
        let issued = fixture.issue(|new| new).await;
        let key: Arc<str> = issued.expose_secret().into();
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let (authenticator, key) = (authenticator.clone(), Arc::clone(&key));
            callers.spawn(async move {
                // Once denied, never let in again.
                let mut is_denied = false;
                for _ in 0..200 {
                    match status(&authenticator, &key).await {
                        200 => assert!(!is_denied, "it was refused before"),
                        401 => is_denied = true,
                        other => panic!("{other}"),
                    }
                    tokio::task::yield_now().await;
                }
            });
        }
        fixture.manager.revoke(&issued.record().id).await.unwrap();
        eventually("it is refused", async || status(&authenticator, &key).await == 401).await;
        callers.join_all().await;
        assert_eq!(status(&authenticator, &key).await, 401);
    }
}
