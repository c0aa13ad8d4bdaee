//! The layer among tower-http's.

use std::sync::{Arc, Mutex};

use axum::{Router, body::Body, routing::get};
use http::{Method, Request};
use tower::ServiceExt;
use tower_api_key::{AuthContext, Denial};
use tower_http::{cors::CorsLayer, trace::TraceLayer};

use crate::support::{fixture, read};

#[tokio::test]
async fn a_preflight_passes_where_cors_is_inside_and_options_are_skipped() {
    let fixture = fixture().await;
    let app = Router::new()
        .route("/", get(|caller: AuthContext| async move { caller.user().email.clone() }))
        .layer(CorsLayer::permissive())
        .layer(fixture.layer().skip(|head| head.method() == Method::OPTIONS));
    let preflight = Request::options("/")
        .header("origin", "https://example.com")
        .header("access-control-request-method", "GET")
        .body(Body::empty())
        .unwrap();
    let answer = read(app.clone().oneshot(preflight).await.unwrap()).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    let request = Request::get("/").header("x-api-key", &fixture.key).body(Body::empty()).unwrap();
    assert_eq!(read(app.clone().oneshot(request).await.unwrap()).await.body, "ada@example.com");
    let request = Request::get("/").body(Body::empty()).unwrap();
    assert_eq!(app.oneshot(request).await.unwrap().status(), 401);
}

#[tokio::test]
async fn a_trace_layer_outside_sees_why_a_request_was_denied() {
    let fixture = fixture().await;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let on_response =
        move |response: &http::Response<_>, _: std::time::Duration, _: &tracing::Span| {
            let denial = response.extensions().get::<Denial>().map(ToString::to_string);
            log.lock().unwrap().push(denial);
        };
    let app: Router = Router::new()
        .route("/", get(|| async {}))
        .layer(fixture.layer())
        .layer(TraceLayer::new_for_http().on_response(on_response));
    for key in [&*fixture.key, "tak_live_wrong"] {
        let request = Request::get("/").header("x-api-key", key).body(Body::empty()).unwrap();
        app.clone().oneshot(request).await.unwrap();
    }
    let wrong = "the key has the wrong environment or length".to_owned();
    assert_eq!(*seen.lock().unwrap(), [None, Some(wrong)]);
}
