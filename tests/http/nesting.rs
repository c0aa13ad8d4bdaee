//! Contexts that are there already, answers of stores that can't be right, and the response body.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full};
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, Denial, StoreError,
    error::StoreErrorKind,
    middleware::ResponseBody,
    record::{KeyRecord, User},
};

use crate::support::{
    self, bearer,
    counted::Counted,
    fixture, get,
    probe::probe,
    read, send,
    stores::{Failing, MixedUp, Vouching},
    unknown_key,
};

fn mallory() -> KeyRecord {
    KeyRecord::new(666, "mallory", User::new(666, "mallory@example.com"))
}

#[tokio::test]
async fn the_layer_applied_twice_from_one_authenticator_asks_once() {
    let fixture = fixture().await;
    let store = Counted::over(fixture.store.clone());
    // With a memory of the answer, the inner layer could ask and nobody would see it.
    let authenticator = Authenticator::builder(store.clone()).cache_capacity(0).build();
    let layer = ApiKeyAuthLayer::from(authenticator);
    let service = ServiceBuilder::new().layer(layer.clone()).layer(layer).service(probe().0);
    let response = service.oneshot(bearer(&fixture.key)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(read(response).await.body, "ada@example.com");
    assert_eq!(store.take_asked(), 1);
}

#[tokio::test]
async fn a_layer_does_not_accept_the_context_of_another_authenticator() {
    let fixture = fixture().await;
    let stranger = ApiKeyAuthLayer::new(Vouching(mallory()));
    let (inner, control) = probe();
    let service =
        ServiceBuilder::new().layer(stranger.clone()).layer(fixture.layer()).service(inner.clone());
    // The outer layer has removed the key, and its context is not the inner one's.
    let response = service.oneshot(bearer(&unknown_key())).await.unwrap();
    assert_eq!(response.status(), 401);

    let service = ServiceBuilder::new()
        .layer(stranger.mark_sensitive())
        .layer(fixture.layer())
        .service(inner);
    let response = service.clone().oneshot(bearer(&unknown_key())).await.unwrap();
    assert_eq!(response.status(), 401);
    assert!(control.called().is_empty());
    let response = service.oneshot(bearer(&fixture.key)).await.unwrap();
    assert_eq!(read(response).await.body, "ada@example.com");
}

#[tokio::test]
async fn two_authenticators_over_one_store_are_strangers_to_each_other() {
    let fixture = fixture().await;
    let store = Counted::over(fixture.store.clone());
    let service = ServiceBuilder::new()
        .layer(ApiKeyAuthLayer::new(store.clone()).mark_sensitive())
        .layer(ApiKeyAuthLayer::new(store.clone()))
        .service(probe().0);
    let response = service.oneshot(bearer(&fixture.key)).await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(store.take_asked(), 2);
}

#[tokio::test]
async fn an_unverified_context_in_the_extensions_opens_nothing() {
    let fixture = fixture().await;
    let mut request = get(&[]);
    request.extensions_mut().insert(AuthContext::unverified(mallory()));
    let denied = send(&fixture.layer(), request).await;
    assert_eq!(denied.status(), 401);

    let mut request = bearer(&fixture.key);
    request.extensions_mut().insert(AuthContext::unverified(mallory()));
    assert_eq!(send(&fixture.layer(), request).await.body, "ada@example.com");
}

#[tokio::test]
async fn a_context_that_was_planted_does_not_survive_a_layer_that_lets_the_request_through() {
    let fixture = fixture().await;
    let stranger = Authenticator::new(Vouching(mallory()));
    let planted =
        [AuthContext::unverified(mallory()), stranger.authenticate(&unknown_key()).await.unwrap()];
    for layer in [fixture.layer().skip(|_| true), fixture.layer().optional()] {
        for context in &planted {
            let mut request = get(&[]);
            request.extensions_mut().insert(context.clone());
            let answer = send(&layer, request).await;
            assert_eq!((answer.status(), &*answer.body), (200, "-"));
        }
    }
}

#[tokio::test]
async fn behind_an_optional_layer_a_required_one_still_denies() {
    let fixture = fixture().await;
    let authenticator = Authenticator::new(fixture.store.clone());
    let layer = ApiKeyAuthLayer::from(authenticator);
    for outer in [layer.clone().optional(), layer.clone().skip(|_| true)] {
        let service = ServiceBuilder::new().layer(outer).layer(layer.clone()).service(probe().0);
        assert_eq!(service.oneshot(get(&[])).await.unwrap().status(), 401);
    }
}

#[tokio::test]
async fn an_answer_that_another_look_up_made_is_answered_503_and_lets_nobody_in() {
    let fixture = fixture().await;
    let another = fixture.issue(|new| new).await;
    let layer = ApiKeyAuthLayer::new(MixedUp::new(fixture.store.clone()));
    let (inner, control) = probe();
    let service = layer.layer(inner);
    let first = service.clone().oneshot(bearer(&fixture.key)).await.unwrap();
    assert_eq!(first.status(), 200);
    for key in [unknown_key(), another.expose_secret().to_owned()] {
        let response = service.clone().oneshot(bearer(&key)).await.unwrap();
        assert_eq!(response.status(), 503);
        assert!(matches!(response.extensions().get(), Some(Denial::Unavailable(_))));
    }
    assert_eq!(control.called().len(), 1);
}

#[tokio::test]
async fn a_store_that_fails_is_answered_503_and_never_401() {
    let errors = [
        StoreError::unavailable("refused"),
        StoreError::timeout(Duration::from_secs(5)),
        StoreError::overloaded("too much to do", Duration::from_secs(1)),
        StoreError::conflict("of writes"),
        StoreError::rejected("no such table"),
    ];
    for error in errors {
        let kind = error.kind();
        let layer = ApiKeyAuthLayer::new(Failing(error));
        for layer in [layer.clone(), layer.optional()] {
            let answer = send(&layer, bearer(&unknown_key())).await;
            assert_eq!(answer.status(), 503, "{kind:?}");
            let Some(Denial::Unavailable(error)) = answer.response.extensions().get() else {
                panic!("{:?}", answer.response.extensions().get::<Denial>())
            };
            assert_eq!(error.kind(), kind);
            assert_eq!(answer.header("www-authenticate"), None);
        }
    }
}

#[tokio::test]
async fn a_row_that_can_not_be_decoded_is_answered_500_and_logged_by_name() {
    let (log, _guard) = support::log::capture();
    let layer = ApiKeyAuthLayer::new(Failing(StoreError::bad_row("key 17: column key_hash")));
    let answer = send(&layer, bearer(&unknown_key())).await;
    assert_eq!(answer.status(), 500);
    let Some(Denial::BadRow(error)) = answer.response.extensions().get() else { panic!() };
    assert_eq!(error.kind(), StoreErrorKind::BadRow);
    assert!(!answer.body.contains("17"), "{}", answer.body);
    let is_named = |line: &String| line.contains("ERROR") && line.contains("key 17");
    assert!(log.lines().iter().any(is_named), "{}", log.text());
}

/// A body of two frames and trailers, which says so.
struct Frames(Vec<Frame<Bytes>>);

#[derive(Debug, PartialEq)]
struct BodyError;

impl Body for Frames {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Poll::Ready(Some(self.0.pop().ok_or(BodyError)))
    }

    fn is_end_stream(&self) -> bool {
        self.0.len() == 1
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = SizeHint::new();
        hint.set_lower(3);
        hint.set_upper(30);
        hint
    }
}

#[tokio::test]
async fn the_inner_body_comes_through_frame_by_frame_with_its_trailers_and_its_error() {
    let fixture = fixture().await;
    let inner = service_fn(|_: Request<Full<Bytes>>| async {
        let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "6".parse().unwrap())]);
        let frames =
            [Frame::trailers(trailers), Frame::data("def".into()), Frame::data("abc".into())];
        Ok::<_, Infallible>(Response::new(Frames(frames.into())))
    });
    let response = fixture.layer().layer(inner).oneshot(bearer(&fixture.key)).await.unwrap();
    let mut body: ResponseBody<Frames> = response.into_body();
    assert_eq!((body.size_hint().lower(), body.size_hint().upper()), (3, Some(30)));
    assert!(!body.is_end_stream());
    for data in ["abc", "def"] {
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), data);
    }
    assert!(body.is_end_stream());
    assert_eq!(body.frame().await.unwrap().unwrap().into_trailers().unwrap()["x-sum"], "6");
    assert_eq!(body.frame().await.unwrap().unwrap_err(), BodyError);
}

#[tokio::test]
async fn the_body_of_a_denial_knows_its_length_and_ends() {
    let fixture = fixture().await;
    let service = fixture.layer().layer(probe().0);
    let mut body = service.oneshot(get(&[])).await.unwrap().into_body();
    let length = body.size_hint().exact().unwrap();
    assert!(length > 0);
    assert!(!body.is_end_stream());
    let data = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(data.len() as u64, length);
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
    assert!(body.frame().await.is_none());
}

#[tokio::test]
async fn a_default_body_is_the_inner_one_s() {
    let body = ResponseBody::<Empty<Bytes>>::default();
    assert!(body.is_end_stream());
    assert_eq!(body.collect().await.unwrap().to_bytes(), Bytes::new());
}
