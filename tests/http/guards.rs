//! Guards behind the layer, and the same checks in handlers.

use std::convert::Infallible;

use axum::{Router, body::Body, routing::get as on_get};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, limit::ConcurrencyLimitLayer, service_fn};
use tower_api_key::{
    AuthContext, Denial, RateLimitLayer, RequireLayer,
    denial::Forbidden,
    middleware::{BudgetLayer, openai_error},
    rate_limit::LocalRateLimiter,
    record::{Budget, BudgetPeriod, RateLimits},
};

use crate::support::{self, Answer, Fixture, bearer, fixture, get, probe::probe, read};

/// Sends a request with the key `key` through the auth layer and then `guard`.
async fn through(fixture: &Fixture, guard: RequireLayer, key: &str) -> Answer {
    let inner = service_fn(|_: Request<Full<Bytes>>| async {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("inside"))))
    });
    let service = ServiceBuilder::new().layer(fixture.layer()).layer(guard).service(inner);
    read(service.oneshot(bearer(key)).await.unwrap()).await
}

async fn key_with_scopes(fixture: &Fixture, scopes: &[&str]) -> String {
    let issued = fixture.issue(|key| key.scopes(scopes.iter().copied())).await;
    issued.expose_secret().to_owned()
}

#[tokio::test]
async fn a_scope_lets_in_and_its_lack_is_named_in_the_challenge() {
    let fixture = fixture().await;
    let key = key_with_scopes(&fixture, &["models:read"]).await;
    let answer = through(&fixture, RequireLayer::scope("models:read"), &key).await;
    assert_eq!((answer.status(), &*answer.body), (200, "inside"));
    let answer = through(&fixture, RequireLayer::scope("models:write"), &key).await;
    assert_eq!(answer.status(), 403);
    let challenge = r#"Bearer realm="api", error="insufficient_scope", scope="models:write""#;
    assert_eq!(answer.header("www-authenticate"), Some(challenge));
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
}

#[tokio::test]
async fn a_wildcard_of_the_holder_grants_what_is_below_it() {
    let fixture = fixture().await;
    let key = key_with_scopes(&fixture, &["models:*"]).await;
    assert_eq!(through(&fixture, RequireLayer::scope("models:read"), &key).await.status(), 200);
    assert_eq!(through(&fixture, RequireLayer::scope("models"), &key).await.status(), 403);
    assert_eq!(through(&fixture, RequireLayer::scope("files:read"), &key).await.status(), 403);
    // What is required is no pattern.
    let key = key_with_scopes(&fixture, &["models:read"]).await;
    assert_eq!(through(&fixture, RequireLayer::scope("models:*"), &key).await.status(), 403);
}

#[tokio::test]
async fn all_scopes_and_any_scope() {
    let fixture = fixture().await;
    let key = key_with_scopes(&fixture, &["a", "b"]).await;
    let cases: [(RequireLayer, u16); 6] = [
        (RequireLayer::all_scopes(["a", "b"]), 200),
        (RequireLayer::all_scopes(["a", "c"]), 403),
        (RequireLayer::all_scopes::<&str>([]), 200),
        (RequireLayer::any_scope(["c", "b"]), 200),
        (RequireLayer::any_scope(["c", "d"]), 403),
        (RequireLayer::any_scope::<&str>([]), 403),
    ];
    for (at, (guard, expected)) in cases.into_iter().enumerate() {
        assert_eq!(through(&fixture, guard, &key).await.status(), expected, "case {at}");
    }
    let answer = through(&fixture, RequireLayer::all_scopes(["a", "c"]), &key).await;
    assert!(answer.header("www-authenticate").unwrap().ends_with(r#"scope="a c""#));
}

#[tokio::test]
async fn permissions_roles_and_rules_of_ones_own() {
    let fixture = fixture().await;
    let issued = fixture.issue(|key| key.permissions(["deploy"])).await;
    let key = issued.expose_secret();
    let metadata_rule = RequireLayer::new(|caller, head| {
        let may = caller.user().role == "admin" && head.uri().path() == "/";
        if may { Ok(()) } else { Err(Forbidden::Endpoint.into()) }
    });
    let cases = [
        (RequireLayer::permission("deploy"), 200),
        (RequireLayer::permission("deploy:*"), 403),
        (RequireLayer::permission("Deploy"), 403),
        (RequireLayer::role("admin"), 200),
        (RequireLayer::role("adm"), 403),
        (metadata_rule, 200),
    ];
    for (at, (guard, expected)) in cases.into_iter().enumerate() {
        assert_eq!(through(&fixture, guard, key).await.status(), expected, "case {at}");
    }
}

#[tokio::test]
async fn handlers_have_the_same_checks() {
    let fixture = fixture().await;
    let key = fixture.issue(|key| key.scopes(["a"]).allowed_models(["small"])).await;
    let app = Router::new()
        .route(
            "/{model}",
            on_get(|caller: AuthContext, path: axum::extract::Path<String>| async move {
                caller.require_any_scope(&["a", "b"])?;
                caller.require_model(&path)?;
                Ok::<_, Denial>("inside")
            }),
        )
        .layer(fixture.layer().on_denial(openai_error));
    let ask = |path: &str| {
        let request = Request::get(path).header("x-api-key", key.expose_secret());
        app.clone().oneshot(request.body(Body::empty()).unwrap())
    };
    assert_eq!(ask("/small").await.unwrap().status(), 200);
    let answer = read(ask("/large").await.unwrap()).await;
    assert_eq!(answer.status(), 403);
    assert!(answer.body.contains("model_not_allowed"), "{}", answer.body);
}

#[tokio::test]
async fn guards_stand_on_routers_and_routes() {
    let fixture = fixture().await;
    let key = key_with_scopes(&fixture, &["read"]).await;
    let app = Router::new()
        .route("/read", on_get(|| async { "inside" }))
        .route("/write", on_get(|| async { "inside" }).layer(RequireLayer::scope("write")))
        .layer(RequireLayer::scope("read"))
        .layer(fixture.layer());
    for (path, expected) in [("/read", 200), ("/write", 403)] {
        let request = Request::get(path).header("x-api-key", &key).body(Body::empty()).unwrap();
        assert_eq!(app.clone().oneshot(request).await.unwrap().status(), expected, "{path}");
    }
}

#[tokio::test]
async fn a_request_that_passes_without_a_key_is_stopped_by_a_requirement_alone() {
    let fixture = fixture().await;
    let issued = fixture
        .issue(|key| {
            let mut limits = RateLimits::default();
            limits.per_minute = Some(100);
            let budget = Budget { limit_cents: 100, period: BudgetPeriod::Total };
            key.scopes(["a"]).rate_limits(limits).budget(budget)
        })
        .await;
    let skips = fixture.layer().skip(|head| head.method() == http::Method::OPTIONS);
    let optional = fixture.layer().optional();
    let (key, nobody, preflight) = (bearer(issued.expose_secret()), get(&[]), {
        let mut request = get(&[]);
        *request.method_mut() = http::Method::OPTIONS;
        request
    });
    let bad_key = bearer("nonsense");
    // The request, whether it is let through without a key, and what the guards that are no requirement answer.
    let cases = [
        (&skips, &key, false, 200),
        (&skips, &preflight, true, 200),
        (&skips, &nobody, false, 401),
        (&optional, &key, false, 200),
        (&optional, &nobody, true, 200),
        (&optional, &bad_key, false, 401),
    ];
    for (at, (auth, request, is_let_through, expected)) in cases.into_iter().enumerate() {
        for combination in 0..8 {
            let [requires, limits, charges] = [1, 2, 4].map(|bit| combination & bit != 0);
            let mut app = Router::new().fallback(|| async { "inside" });
            if requires {
                app = app.layer(RequireLayer::scope("a"));
            }
            if charges {
                app = app.layer(BudgetLayer::new(1));
            }
            if limits {
                app = app.layer(RateLimitLayer::new(LocalRateLimiter::new()));
            }
            let expected = if requires && is_let_through { 401 } else { expected };
            let request = request.clone().map(Body::new);
            let response = app.layer(auth.clone()).oneshot(request).await.unwrap();
            assert_eq!(response.status(), expected, "case {at}: {requires} {limits} {charges}");
        }
    }
}

#[tokio::test]
async fn nobody_is_401_and_no_layer_is_500() {
    let fixture = fixture().await;
    let guard = RequireLayer::scope("a");
    let optional = ServiceBuilder::new()
        .layer(fixture.layer().optional())
        .layer(guard.clone())
        .service(probe().0);
    assert_eq!(optional.oneshot(get(&[])).await.unwrap().status(), 401);
    let bare = guard.layer(probe().0);
    let response = bare.oneshot(bearer(&fixture.key)).await.unwrap();
    assert_eq!(response.status(), 500);
    assert!(matches!(response.extensions().get(), Some(Denial::LayerMissing)));
}

#[tokio::test]
async fn a_grpc_caller_is_answered_in_its_own_protocol() {
    let fixture = fixture().await;
    let request = support::grpc(bearer(&fixture.key), "application/grpc");
    let service = ServiceBuilder::new()
        .layer(fixture.layer())
        .layer(RequireLayer::scope("a"))
        .service(probe().0);
    let answer = read(service.oneshot(request).await.unwrap()).await;
    assert_eq!((answer.status(), answer.header("grpc-status")), (200, Some("7")));
}

#[tokio::test]
async fn a_denial_gives_back_the_permit_of_the_ready_service() {
    let fixture = fixture().await;
    let mut service = ServiceBuilder::new()
        .layer(fixture.layer())
        .layer(RequireLayer::scope("a"))
        .layer(ConcurrencyLimitLayer::new(1))
        .service(probe().0);
    for _ in 0..3 {
        let request = bearer(&fixture.key);
        let ready = ServiceExt::<Request<Full<Bytes>>>::ready(&mut service).await.unwrap();
        assert_eq!(ready.call(request).await.unwrap().status(), 403);
    }
}
