//! What becomes of a request that passes: its key header, and what `optional` and `skip` let through.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{ServiceExt, service_fn};
use tower_api_key::{ApiKeyAuthLayer, middleware::Credential};

use crate::support::{
    self,
    auth_outcome::{
        A, Anonymous, AuthOutcome, Fields, InvalidRequest, InvalidToken, NoCredential, Passes, X,
        auth_outcome, check,
    },
    counted::Counted,
    fixture, get, send,
};

#[tokio::test]
async fn the_inner_service_does_not_see_the_key_but_every_other_field() {
    let setting = fixture().await;
    let (key, bearer) = (setting.key.as_bytes(), format!("Bearer {}", setting.key));
    let bearer = bearer.as_bytes();
    let basic = format!("Basic {}", STANDARD.encode(format!("{}:", setting.key)));
    let with_basic = setting.layer().credentials([Credential::basic()]);
    for (layer, fields, seen) in [
        (setting.layer(), &[(A, bearer), ("accept", b"*/*")][..], "accept"),
        (setting.layer(), &[(X, key), (X, key), ("accept", b"*/*")], "accept"),
        (setting.layer(), &[(A, bearer), (X, key)], ""),
        (setting.layer(), &[(A, b"Basic dTpw"), (X, key)], "authorization"),
        (with_basic, &[(A, basic.as_bytes()), (X, b"x")], "x-api-key"),
    ] {
        let answer = send(&layer, get(fields)).await;
        assert_eq!(auth_outcome(&answer), Passes);
        assert_eq!(answer.header("x-headers"), Some(seen));
    }
}

#[tokio::test]
async fn a_key_header_that_is_kept_is_marked_as_sensitive_and_no_other_field_is() {
    let setting = fixture().await;
    let seen = service_fn(|request: Request<Full<Bytes>>| async move {
        let list = request.headers().iter().map(|(n, v)| format!("{n} {}", v.is_sensitive()));
        Ok::<_, std::convert::Infallible>(Response::new(list.collect::<Vec<_>>().join(", ")))
    });
    let (key, bearer) = (setting.key.as_bytes(), format!("Bearer {}", setting.key));
    for (fields, expected) in [
        (&[(A, bearer.as_bytes())][..], "authorization true"),
        (&[(X, key), (X, key)], "x-api-key true, x-api-key true"),
        (&[(A, b"Basic dTpw"), (X, key)], "authorization false, x-api-key true"),
        (&[(X, key), ("accept", b"*/*")], "x-api-key true, accept false"),
    ] {
        let service = tower::Layer::layer(&setting.layer().mark_sensitive(), seen);
        let response = service.map_response(|r| r.map(http_body_util::Either::<_, String>::Left));
        let answer = support::read(response.oneshot(get(fields)).await.unwrap()).await;
        assert_eq!(answer.body, expected);
    }
}

#[tokio::test]
async fn an_optional_key_may_be_missing_but_not_bad() {
    let setting = fixture().await;
    let table: &[(Fields, AuthOutcome)] = &[
        (&[], Anonymous),
        (&[(A, "Basic dTpw")], Anonymous),
        (&[(A, "Bearer KEY")], Passes),
        (&[(X, "KEY")], Passes),
        (&[(A, "Bearer x")], InvalidToken),
        (&[(A, "Bearer KEYx")], InvalidToken),
        (&[(A, "Bearer")], InvalidRequest),
        (&[(X, "")], InvalidRequest),
        (&[(A, "Bearer KEY"), (X, "OTHER")], InvalidRequest),
        (&[(A, "Basic dTpw"), (A, "Basic dTpw")], InvalidRequest),
    ];
    check(&setting.layer().optional(), &setting, table).await;
    let answer = send(&setting.layer().optional(), get(&[(A, b"Basic dTpw")])).await;
    assert_eq!(answer.header("x-headers"), Some("authorization"));
}

#[tokio::test]
async fn a_skipped_request_goes_through_untouched_and_the_others_do_not() {
    let setting = fixture().await;
    let store = Counted::over(setting.store.clone());
    let layer = ApiKeyAuthLayer::new(store.clone())
        .skip(|head| head.uri().path() == "/health" || head.method() == http::Method::OPTIONS);
    let bearer = format!("Bearer {}", setting.key);
    for (method, path, skipped) in
        [("GET", "/health", true), ("OPTIONS", "/v1", true), ("GET", "/healthz", false)]
    {
        let bad = &[(A, &b"Bearer"[..]), (A, b"Bearer x")][..];
        let good = &[(A, bearer.as_bytes())][..];
        for (fields, otherwise) in [(bad, InvalidRequest), (&[], NoCredential), (good, Passes)] {
            let mut request = get(fields);
            *request.method_mut() = method.parse().unwrap();
            *request.uri_mut() = path.parse().unwrap();
            let answer = send(&layer, request).await;
            assert_eq!(auth_outcome(&answer), if skipped { Anonymous } else { otherwise });
            if skipped && !fields.is_empty() {
                assert_eq!(answer.header("x-headers"), Some("authorization"));
            }
        }
        assert_eq!(store.take_asked(), usize::from(!skipped));
    }
}
