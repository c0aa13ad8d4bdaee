//! What Tower asks of a service, branch by branch, with a probe behind the layer.

use std::{
    cell::Cell,
    convert::Infallible,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::Empty;
use tower::{Layer, Service, ServiceExt, limit::ConcurrencyLimit};
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, Denial, error::StoreErrorKind, middleware::ApiKeyAuth,
};

use crate::support::{
    Fixture,
    eventually::others_make,
    fixture,
    probe::{Control, Probe, ProbeError, Wakes, block_on, poll, poll_ready, poll_to_end, probe},
    read,
    stores::Held,
    unknown_key, with_wrong_secret,
};

type NoBody = Empty<Bytes>;

/// An empty request body that is neither `Clone` nor `Sync`.
struct Opaque {
    _alive: Arc<()>,
    _not_sync: Cell<u8>,
}

impl Body for Opaque {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(None)
    }
}

fn opaque(alive: &Arc<()>) -> Opaque {
    Opaque { _alive: Arc::clone(alive), _not_sync: Cell::new(0) }
}

fn request<B>(key: &str, body: B) -> Request<B> {
    Request::builder().header("authorization", format!("Bearer {key}")).body(body).unwrap()
}

struct Slow {
    fixture: Fixture,
    store: Held,
    service: ApiKeyAuth<Probe>,
    inner: Control,
}

/// A probe behind the layer, over a store whose look-ups wait.
async fn slow() -> Slow {
    let fixture = fixture().await;
    let store = Held::new(fixture.store.clone());
    let (probe, inner) = probe();
    let service = ApiKeyAuthLayer::new(store.clone()).layer(probe);
    Slow { fixture, store, service, inner }
}

#[tokio::test]
async fn after_a_slow_look_up_an_instance_is_polled_ready_anew_and_called() {
    let Slow { fixture, store, mut service, inner } = slow().await;
    assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
    let mut answer = service.call(request(&fixture.key, NoBody::new()));
    assert!(poll(&mut answer).is_pending());
    store.is_asked(1).await;
    assert!(poll(&mut answer).is_pending());
    assert!(inner.called().is_empty());
    assert_eq!(inner.polled_ready(), [0]);

    store.let_one_go();
    let response = poll_to_end(&mut answer).await.unwrap();
    assert_eq!(read(response).await.body, "ada@example.com");
    assert_eq!(inner.polled_ready(), [0, 1]);
    assert_eq!(inner.called(), [1]);
}

#[tokio::test]
async fn each_request_that_waits_for_a_look_up_gets_an_instance_of_its_own() {
    let Slow { fixture, store, mut service, inner } = slow().await;
    assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
    let another = fixture.issue(|new| new).await;
    let mut first = service.call(request(&fixture.key, NoBody::new()));
    assert!(poll(&mut first).is_pending());
    store.is_asked(1).await;
    // What is left in the service is not ready before it is polled.
    assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
    let mut second = service.call(request(another.expose_secret(), NoBody::new()));
    assert!(poll(&mut second).is_pending());
    store.is_asked(2).await;
    assert_eq!(inner.polled_ready(), [0, 2]);

    store.let_one_go();
    assert_eq!(poll_to_end(&mut first).await.unwrap().status(), 200);
    assert!(poll(&mut second).is_pending());
    assert_eq!(inner.called(), [1]);
    store.let_one_go();
    assert_eq!(poll_to_end(&mut second).await.unwrap().status(), 200);
    assert_eq!(inner.called(), [1, 3]);
}

#[tokio::test]
async fn requests_that_wait_for_one_look_up_each_call_an_instance_of_their_own() {
    let Slow { fixture, store, mut service, inner } = slow().await;
    let mut call = || {
        assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
        let mut answer = service.call(request(&fixture.key, NoBody::new()));
        assert!(poll(&mut answer).is_pending());
        answer
    };
    let (mut first, mut second) = (call(), call());
    store.is_asked(1).await;
    assert_eq!(inner.polled_ready(), [0, 2]);
    store.let_one_go();
    // The later one first: each has its own instance.
    assert_eq!(poll_to_end(&mut second).await.unwrap().status(), 200);
    assert_eq!(inner.called(), [3]);
    assert_eq!(poll_to_end(&mut first).await.unwrap().status(), 200);
    assert_eq!(inner.called(), [3, 1]);
    assert_eq!(store.under_way(), 0);
}

#[tokio::test]
async fn after_a_look_up_a_request_waits_until_the_inner_service_is_ready_and_is_woken_by_it() {
    let Slow { fixture, store, mut service, inner } = slow().await;
    assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
    let mut answer = service.call(request(&fixture.key, NoBody::new()));
    inner.block();
    store.let_one_go();
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(Arc::clone(&wakes));
    let mut cx = Context::from_waker(&waker);
    let looked_up = || {
        assert!(Pin::new(&mut answer).poll(&mut cx).is_pending());
        inner.is_waited_for()
    };
    others_make("the request waits for the inner service", looked_up).await;
    let before = wakes.count();
    inner.unblock();
    assert_eq!(wakes.count(), before + 1);
    let Poll::Ready(Ok(response)) = poll(&mut answer) else { panic!("no answer") };
    assert_eq!(read(response).await.body, "ada@example.com");
}

#[tokio::test]
async fn the_readiness_error_after_a_look_up_comes_out_as_it_is() {
    let Slow { fixture, store, mut service, inner } = slow().await;
    assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
    let mut answer = service.call(request(&fixture.key, NoBody::new()));
    inner.fail_readiness(ProbeError(7));
    store.let_one_go();
    assert_eq!(poll_to_end(&mut answer).await.unwrap_err(), ProbeError(7));
    assert!(inner.called().is_empty());
}

#[tokio::test]
async fn a_request_that_needs_no_look_up_goes_to_the_instance_that_was_polled_ready() {
    let fixture = fixture().await;
    let (probe, inner) = probe();
    let mut service = fixture.layer().skip(|_| true).layer(probe);
    for _ in 0..2 {
        assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
        service.call(Request::new(NoBody::new())).await.unwrap();
    }
    assert_eq!(inner.called(), inner.polled_ready());
}

#[tokio::test]
async fn after_a_denial_the_service_wants_to_be_polled_ready_anew() {
    let fixture = fixture().await;
    let (probe, inner) = probe();
    let mut service = fixture.layer().layer(probe);
    assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
    let denied = service.call(Request::new(NoBody::new())).await.unwrap();
    assert_eq!(denied.status(), 401);
    let ready = ServiceExt::<Request<NoBody>>::ready(&mut service).await.unwrap();
    assert_eq!(ready.call(request(&fixture.key, NoBody::new())).await.unwrap().status(), 200);
    // The one that was ready for the denied request is gone, and was not called.
    assert_eq!(inner.polled_ready(), [0, 1, 2]);
    assert_eq!(inner.called(), [2]);
}

#[tokio::test]
async fn the_inner_service_s_readiness_error_passes_through() {
    let Slow { mut service, inner, .. } = slow().await;
    inner.fail_readiness(ProbeError(7));
    let Poll::Ready(Err(error)) = poll_ready::<_, Request<NoBody>>(&mut service) else {
        panic!("no error")
    };
    assert_eq!(error, ProbeError(7));
}

#[tokio::test]
async fn a_service_that_waits_for_the_inner_one_is_woken_by_it() {
    let Slow { mut service, inner, .. } = slow().await;
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(Arc::clone(&wakes));
    let mut ready =
        || Service::<Request<NoBody>>::poll_ready(&mut service, &mut Context::from_waker(&waker));
    inner.block();
    assert!(ready().is_pending());
    assert_eq!(wakes.count(), 0);
    inner.unblock();
    assert_eq!(wakes.count(), 1);
    assert!(matches!(ready(), Poll::Ready(Ok(()))));
}

#[tokio::test]
async fn a_look_up_that_ends_wakes_the_task_that_waits_for_the_response() {
    let Slow { fixture, store, mut service, .. } = slow().await;
    assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
    let mut answer = service.call(request(&fixture.key, NoBody::new()));
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(Arc::clone(&wakes));
    let mut cx = Context::from_waker(&waker);
    assert!(Future::poll(std::pin::Pin::new(&mut answer), &mut cx).is_pending());
    store.is_asked(1).await;
    assert_eq!(wakes.count(), 0);
    store.let_one_go();
    let mut seen = 0;
    others_make("the look-up wakes who waits for it", || {
        let wakes = wakes.count();
        std::mem::replace(&mut seen, wakes) < wakes
            && matches!(std::pin::Pin::new(&mut answer).poll(&mut cx), Poll::Ready(Ok(_)))
    })
    .await;
    // The look-up may move from this task to its own.
    assert!(seen <= 2, "woken {seen} times");
}

#[tokio::test]
async fn the_inner_service_s_error_comes_out_as_it_is() {
    let fixture = fixture().await;
    let (probe, inner) = probe();
    inner.fail_response(ProbeError(42));
    // The annotation is the point: the layer has no error of its own.
    let outcome: Result<Response<_>, ProbeError> =
        fixture.layer().layer(probe).oneshot(request(&fixture.key, NoBody::new())).await;
    assert_eq!(outcome.unwrap_err(), ProbeError(42));
}

/// What is still there of a request, its service and its look-up.
fn left_over(slow: &Slow, body: &Arc<()>) -> (usize, usize, usize) {
    (Arc::strong_count(body) - 1, slow.inner.alive(), slow.store.under_way())
}

#[tokio::test]
async fn dropping_the_future_before_it_is_polled_leaves_nothing_behind() {
    let (mut slow, body) = (slow().await, Arc::new(()));
    assert!(poll_ready::<_, Request<Opaque>>(&mut slow.service).is_ready());
    let answer = slow.service.call(request(&slow.fixture.key, opaque(&body)));
    assert_eq!(left_over(&slow, &body), (1, 2, 0));
    drop(answer);
    assert_eq!(left_over(&slow, &body), (0, 1, 0));
    // Nor has a look-up begun.
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert_eq!(left_over(&slow, &body), (0, 1, 0));
    }
}

#[tokio::test]
async fn dropping_the_future_during_the_look_up_leaves_nothing_behind_but_an_answer_for_the_next() {
    let (mut slow, body) = (slow().await, Arc::new(()));
    assert!(poll_ready::<_, Request<Opaque>>(&mut slow.service).is_ready());
    let mut answer = slow.service.call(request(&slow.fixture.key, opaque(&body)));
    assert!(poll(&mut answer).is_pending());
    slow.store.is_asked(1).await;
    assert_eq!(left_over(&slow, &body), (1, 2, 1));
    drop(answer);
    // The request and the instance are gone at once, the look-up goes on …
    assert_eq!(left_over(&slow, &body), (0, 1, 1));
    slow.store.let_one_go();
    others_make("the look-up ends on its own", || slow.store.under_way() == 0).await;
    assert_eq!(left_over(&slow, &body), (0, 1, 0));
    assert!(slow.inner.called().is_empty());
    // … and the next caller has its answer without a wait. The store lets nobody go on any more.
    assert!(poll_ready::<_, Request<Opaque>>(&mut slow.service).is_ready());
    let mut next = slow.service.call(request(&slow.fixture.key, opaque(&body)));
    let Poll::Ready(Ok(response)) = poll(&mut next) else { panic!("no answer") };
    assert_eq!(read(response).await.body, "ada@example.com");
    drop(next);
    assert_eq!(left_over(&slow, &body), (0, 1, 0));
}

#[tokio::test]
async fn dropping_the_future_during_the_inner_call_leaves_nothing_behind() {
    let (mut slow, body) = (slow().await, Arc::new(()));
    slow.inner.hold_calls();
    slow.store.let_one_go();
    assert!(poll_ready::<_, Request<Opaque>>(&mut slow.service).is_ready());
    let mut answer = slow.service.call(request(&slow.fixture.key, opaque(&body)));
    let is_called = || {
        assert!(poll(&mut answer).is_pending());
        slow.inner.called() == [1]
    };
    others_make("the inner service is called", is_called).await;
    // The clone in the service and the call; the instance that was called and the look-up are gone.
    assert_eq!(left_over(&slow, &body), (1, 2, 0));
    drop(answer);
    assert_eq!(left_over(&slow, &body), (0, 1, 0));
}

#[tokio::test]
async fn a_denied_request_is_dropped_before_its_answer_is_sent() {
    let (mut slow, body) = (slow().await, Arc::new(()));
    slow.store.let_one_go();
    // The last one is a negative cache entry.
    for key in ["nonsense", &unknown_key(), &unknown_key()] {
        assert!(poll_ready::<_, Request<Opaque>>(&mut slow.service).is_ready());
        let mut answer = slow.service.call(request(key, opaque(&body)));
        let response = poll_to_end(&mut answer).await.unwrap();
        assert_eq!(response.status(), 401);
        assert_eq!(left_over(&slow, &body), (0, 1, 0));
    }
}

/// A service with one permit.
async fn limited() -> (Fixture, Held, ApiKeyAuth<ConcurrencyLimit<Probe>>) {
    let fixture = fixture().await;
    let store = Held::new(fixture.store.clone());
    let limit = ConcurrencyLimit::new(probe().0, 1);
    let service = ApiKeyAuthLayer::new(store.clone()).layer(limit);
    (fixture, store, service)
}

#[tokio::test]
async fn a_denial_that_needs_no_look_up_gives_the_permit_back_at_once() {
    let (_, _, service) = limited().await;
    let no_scheme = Request::builder().header("authorization", "\"").body(NoBody::new()).unwrap();
    for denied in [Request::new(NoBody::new()), request("nonsense", NoBody::new()), no_scheme] {
        let (mut service, mut other) = (service.clone(), service.clone());
        assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
        assert!(
            poll_ready::<_, Request<NoBody>>(&mut other).is_pending(),
            "the permit is not taken"
        );
        let mut answer = service.call(denied);
        // Not even the answer has been polled for.
        assert!(poll_ready::<_, Request<NoBody>>(&mut other).is_ready(), "the permit is lost");
        let Poll::Ready(Ok(response)) = poll(&mut answer) else { panic!("no answer") };
        assert!(response.status().is_client_error());
    }
}

#[tokio::test]
async fn a_look_up_holds_no_permit_so_that_cached_keys_pass_meanwhile() {
    let (fixture, store, service) = limited().await;
    let cached = fixture.issue(|new| new).await;
    let cached = || request(cached.expose_secret(), NoBody::new());
    store.let_one_go();
    assert_eq!(service.clone().oneshot(cached()).await.unwrap().status(), 200);

    let mut slow = service.clone();
    assert!(poll_ready::<_, Request<NoBody>>(&mut slow).is_ready());
    let mut answer = slow.call(request(&with_wrong_secret(&fixture.key), NoBody::new()));
    assert!(poll(&mut answer).is_pending());
    store.is_asked(1).await;
    // The service that was called is kept, as a server keeps one a connection.
    let mut other = service.clone();
    assert!(poll_ready::<_, Request<NoBody>>(&mut other).is_ready(), "the permit is held");
    assert_eq!(other.call(cached()).await.unwrap().status(), 200);
    assert!(poll(&mut answer).is_pending());
    store.let_one_go();
    assert_eq!(poll_to_end(&mut answer).await.unwrap().status(), 401);
}

#[tokio::test]
async fn a_caller_who_goes_away_while_it_waits_for_a_permit_leaves_it_to_others() {
    let (fixture, store, mut service) = limited().await;
    let (mut holder, mut other) = (service.clone(), service.clone());
    assert!(poll_ready::<_, Request<NoBody>>(&mut service).is_ready());
    let mut answer = service.call(request(&fixture.key, NoBody::new()));
    assert!(poll(&mut answer).is_pending());
    store.is_asked(1).await;
    assert!(poll_ready::<_, Request<NoBody>>(&mut holder).is_ready());
    store.let_one_go();
    others_make("the look-up ends", || store.under_way() == 0).await;
    assert!(poll(&mut answer).is_pending(), "let in without a permit");
    drop(answer);
    drop(holder);
    assert!(poll_ready::<_, Request<NoBody>>(&mut other).is_ready(), "the permit is lost");
}

#[tokio::test]
async fn a_permit_is_taken_once_for_a_request_that_is_let_in() {
    let (fixture, store, mut service) = limited().await;
    // Three requests that need a look-up, and three whose key is known.
    let mut keys = vec![fixture.key.clone()];
    for _ in 0..2 {
        keys.push(fixture.issue(|new| new).await.expose_secret().to_owned());
        store.let_one_go();
    }
    store.let_one_go();
    for key in keys.iter().chain(&keys) {
        let ready = ServiceExt::<Request<NoBody>>::ready(&mut service).await.unwrap();
        assert_eq!(ready.call(request(key, NoBody::new())).await.unwrap().status(), 200);
    }
}

#[test]
fn without_a_tokio_runtime_a_key_is_answered_503() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let fixture = runtime.block_on(fixture());
    drop(runtime);
    let (probe, inner) = probe();
    // Building one needs none.
    let layer = fixture.layer();
    let response =
        block_on(layer.layer(probe).oneshot(request(&fixture.key, NoBody::new()))).unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert!(inner.called().is_empty());

    let denial =
        block_on(Authenticator::new(fixture.store).authenticate(&fixture.key)).unwrap_err();
    let Denial::Unavailable(error) = denial else { panic!("{denial:?}") };
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
}

#[test]
fn without_a_tokio_runtime_what_needs_no_look_up_is_answered_as_ever() {
    let store = tower_api_key::MemoryStore::new();
    let (probe, _) = probe();
    let service = ApiKeyAuthLayer::new(store).skip(|head| head.uri() == "/health").layer(probe);
    let health = Request::builder().uri("/health").body(NoBody::new()).unwrap();
    assert_eq!(block_on(service.clone().oneshot(health)).unwrap().status(), 200);
    assert_eq!(block_on(service.oneshot(Request::new(NoBody::new()))).unwrap().status(), 401);
}

#[tokio::test]
async fn the_layer_works_behind_a_buffer() {
    let fixture = fixture().await;
    let layer = fixture.layer();
    let echo = tower::service_fn(|_: Request<NoBody>| async {
        Ok::<_, ProbeStdError>(Response::new(http_body_util::Full::new(bytes::Bytes::new())))
    });
    let service = tower::buffer::Buffer::new(layer.layer(ConcurrencyLimit::new(echo, 2)), 4);
    let mut tasks = tokio::task::JoinSet::new();
    for at in 0..40 {
        let key = if at % 2 == 0 { fixture.key.clone() } else { unknown_key() };
        let expected = if at % 2 == 0 { 200 } else { 401 };
        let answer = service.clone().oneshot(request(&key, NoBody::new()));
        tasks.spawn(async move { assert_eq!(answer.await.unwrap().status(), expected) });
    }
    while let Some(outcome) = tasks.join_next().await {
        outcome.unwrap();
    }
}

#[derive(Debug)]
struct ProbeStdError;

impl std::fmt::Display for ProbeStdError {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Ok(())
    }
}

impl std::error::Error for ProbeStdError {}

#[tokio::test]
async fn a_clone_for_each_request_works_as_axum_does_it() {
    let fixture = fixture().await;
    let (probe, inner) = probe();
    let service = fixture.layer().layer(probe);
    for _ in 0..3 {
        let response = service.clone().oneshot(request(&fixture.key, NoBody::new())).await.unwrap();
        assert_eq!(read(response).await.body, "ada@example.com");
    }
    // The first request waited for a look-up, and its service was polled ready anew after that.
    let (called, polled_ready) = (inner.called(), inner.polled_ready());
    assert_eq!(called.len(), 3);
    assert_eq!(called, polled_ready[1..]);
}

/// An inner service that is `Send` and `Sync` by its type parameter alone.
struct Is<T>(PhantomData<T>);

#[test]
fn the_service_and_its_future_are_as_send_and_sync_as_what_they_hold() {
    fn send_sync<T: Send + Sync>() {}
    fn send<T: Send>() {}
    fn clone<T: Clone>() {}
    fn generic<S: Clone + Send + Sync>() {
        send_sync::<ApiKeyAuth<S>>();
        clone::<ApiKeyAuth<S>>();
    }
    generic::<Probe>();
    send_sync::<ApiKeyAuth<Is<u8>>>();
    send_sync::<ApiKeyAuthLayer>();
    // The body is `Send` and not `Sync`.
    send::<tower_api_key::middleware::ResponseFuture<Probe, Opaque>>();
    send::<tower_api_key::middleware::ResponseBody<Opaque>>();
}
