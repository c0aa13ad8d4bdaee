//! The axum extractors, and handlers that deny a request themselves.

use std::net::SocketAddr;

use axum::{
    Extension, Router,
    body::Body,
    http::{Method, Request},
    routing::{any, get},
};
use serde_json::Value;
use tokio::net::TcpListener;
use tower::ServiceExt;
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, Denial, MemoryStore,
    denial::Forbidden,
    middleware::openai_error,
    record::{KeyRecord, User},
};

use crate::support::{self, Answer, fixture, log, read, rule, unknown_key};

async fn who(caller: AuthContext) -> String {
    caller.user().email.clone()
}

async fn who_if_any(caller: Option<AuthContext>) -> String {
    caller.map_or("nobody".to_owned(), |caller| caller.user().email.clone())
}

async fn needs_scope(caller: Option<AuthContext>) -> Result<String, Denial> {
    let has_scope = caller.is_some_and(|caller| caller.has_scope("chat"));
    if has_scope { Ok("chat".into()) } else { Err(Forbidden::Scope("chat".into()).into()) }
}

fn router() -> Router {
    Router::new()
        .route("/who", any(who))
        .route("/who-if-any", get(who_if_any))
        .route("/scope", any(needs_scope))
}

fn request(path: &str, key: Option<&str>) -> Request<Body> {
    let request = Request::builder().uri(path);
    let request = match key {
        Some(key) => request.header("authorization", format!("Bearer {key}")),
        None => request,
    };
    request.body(Body::empty()).unwrap()
}

async fn send(router: &Router, request: Request<Body>) -> Answer {
    read(router.clone().oneshot(request).await.unwrap()).await
}

async fn ask(router: &Router, path: &str, key: Option<&str>) -> (u16, String) {
    let answer = send(router, request(path, key)).await;
    (answer.status(), answer.body)
}

#[tokio::test]
async fn a_handler_gets_who_calls() {
    let fixture = fixture().await;
    let router = router().layer(fixture.layer());
    for path in ["/who", "/who-if-any"] {
        let answer = ask(&router, path, Some(&fixture.key)).await;
        assert_eq!(answer, (200, "ada@example.com".into()));
        assert_eq!(ask(&router, path, Some(&unknown_key())).await.0, 401);
        assert_eq!(ask(&router, path, None).await.0, 401);
    }
}

#[tokio::test]
async fn without_a_layer_the_answer_is_500_and_the_log_names_the_layer_to_add() {
    for path in ["/who", "/who-if-any"] {
        let (log, _guard) = log::capture();
        let answer = send(&router(), request(path, Some("tak_live_x"))).await;
        assert_eq!(answer.status(), 500);
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        assert!(!answer.body.contains("Layer"), "callers learn of our insides: {}", answer.body);
        let lines = log.lines();
        let [line] = &lines[..] else { panic!("{lines:?}") };
        assert!(line.contains("ERROR") && line.contains("ApiKeyAuthLayer"), "{line}");
    }
}

#[tokio::test]
async fn behind_a_layer_that_lets_requests_through_nobody_calls() {
    let fixture = fixture().await;
    let (log, _guard) = log::capture();
    for layer in [fixture.layer().optional(), fixture.layer().skip(|_| true)] {
        let router = router().layer(layer.realm("acme").unwrap());
        assert_eq!(ask(&router, "/who-if-any", None).await, (200, "nobody".into()));
        let denied = send(&router, request("/who", None)).await;
        assert_eq!(denied.status(), 401);
        assert_eq!(denied.header("www-authenticate"), Some(r#"Bearer realm="acme""#));
    }
    assert!(!log.text().contains("ERROR"), "{}", log.text());
}

#[tokio::test]
async fn behind_an_optional_layer_a_key_counts_and_a_bad_one_is_denied() {
    let fixture = fixture().await;
    let router = router().layer(fixture.layer().optional());
    let answer = ask(&router, "/who-if-any", Some(&fixture.key)).await;
    assert_eq!(answer, (200, "ada@example.com".into()));
    assert_eq!(ask(&router, "/who-if-any", Some(&unknown_key())).await.0, 401);
}

#[tokio::test]
async fn a_handler_under_test_gets_the_context_that_its_test_made() {
    let record = KeyRecord::new(1, "p", User::new(1, "test@example.com"));
    let router = router().layer(Extension(AuthContext::unverified(record)));
    assert_eq!(ask(&router, "/who", None).await, (200, "test@example.com".into()));
    assert_eq!(ask(&router, "/who-if-any", None).await, (200, "test@example.com".into()));
}

#[tokio::test]
async fn a_handler_s_denial_without_a_layer_has_the_default_shape() {
    let refuse = || async { Err::<(), Denial>(Forbidden::Scope("chat".into()).into()) };
    let answer = send(&Router::new().route("/", get(refuse)), request("/", None)).await;
    assert_eq!(answer.status(), 403);
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    let challenge = r#"Bearer realm="api", error="insufficient_scope", scope="chat""#;
    assert_eq!(answer.header("www-authenticate"), Some(challenge));
    assert!(answer.response.extensions().get::<Denial>().is_some());
}

#[tokio::test]
async fn a_handler_s_denial_gets_the_realm_of_the_layer_around_it() {
    let fixture = fixture().await;
    let router = router().layer(fixture.layer().realm("acme").unwrap());
    let answer = send(&router, request("/scope", Some(&fixture.key))).await;
    assert_eq!(answer.status(), 403);
    let challenge = r#"Bearer realm="acme", error="insufficient_scope", scope="chat""#;
    assert_eq!(answer.header("www-authenticate"), Some(challenge));
    let denial = answer.response.extensions().get();
    assert!(matches!(denial, Some(Denial::Forbidden(Forbidden::Scope(scope))) if scope == "chat"));
}

#[tokio::test]
async fn a_handler_s_denial_gets_the_shape_of_the_layer_around_it() {
    let fixture = fixture().await;
    let openai = router().layer(fixture.layer().on_denial(openai_error));
    let answer = send(&openai, request("/scope", Some(&fixture.key))).await;
    assert_eq!(answer.status(), 403);
    let body: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(body["error"]["code"], "insufficient_permissions");

    let own = fixture.layer().on_denial(|denial_of| {
        denial_of.respond_with("text/plain", format!("{} {}", denial_of.method(), denial_of.uri()))
    });
    let answer = send(&router().layer(own), request("/scope?a=b", Some(&fixture.key))).await;
    assert_eq!((answer.status(), &*answer.body), (403, "GET /scope?a=b"));
}

#[tokio::test]
async fn a_handler_s_denial_of_a_grpc_request_is_a_grpc_answer() {
    let fixture = fixture().await;
    let router = router().layer(fixture.layer());
    let request = support::grpc(request("/scope", Some(&fixture.key)), "application/grpc+proto");
    let answer = send(&router, request).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.header("content-type"), Some("application/grpc+proto"));
    assert_eq!(answer.header("grpc-status"), Some("7"));
    assert_eq!(answer.body, "");
}

#[tokio::test]
async fn of_two_layers_the_inner_one_shapes_a_handler_s_denial() {
    let fixture = fixture().await;
    let authenticator = Authenticator::new(fixture.store.clone());
    let layer = ApiKeyAuthLayer::from(authenticator);
    let router = router()
        .layer(layer.clone().realm("inner").unwrap())
        .layer(layer.on_denial(openai_error).realm("outer").unwrap());
    let answer = send(&router, request("/scope", Some(&fixture.key))).await;
    assert!(answer.header("www-authenticate").unwrap().contains("inner"));
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
}

#[tokio::test]
async fn a_head_request_that_a_handler_denies_gets_no_body() {
    let fixture = fixture().await;
    let own = fixture.layer().on_denial(|denial_of| denial_of.respond_with("text/plain", "no"));
    for layer in [fixture.layer(), own] {
        let mut request = request("/scope", Some(&fixture.key));
        *request.method_mut() = Method::HEAD;
        let answer = send(&router().layer(layer), request).await;
        assert_eq!((answer.status(), &*answer.body), (403, ""));
        assert!(answer.header("www-authenticate").is_some());
    }
}

/// RFC 9110 §8.6: the length in an answer to HEAD is the one that GET would have, or there is none.
#[tokio::test]
async fn a_head_request_gets_no_other_length_than_a_get() {
    let fixture = fixture().await;
    let router = router().layer(fixture.layer());
    for (path, key) in [("/who", None), ("/scope", Some(&*fixture.key))] {
        let of_get = send(&router, request(path, key)).await;
        let mut head = request(path, key);
        *head.method_mut() = Method::HEAD;
        let of_head = send(&router, head).await;
        let length = of_head.header("content-length");
        let is_right = length.is_none() || length == of_get.header("content-length");
        assert!(is_right, "{path}: {length:?}, GET {:?}", of_get.header("content-length"));
    }
}

#[tokio::test]
async fn endpoint_rules_are_about_the_path_that_the_client_sent() {
    let fixture = fixture().await;
    let key = fixture.issue(|new| new.allowed_endpoints([rule("GET /v1/a/who")])).await;
    let key = Some(key.expose_secret());
    let other = fixture.issue(|new| new.allowed_endpoints([rule("/who")])).await;
    let other = Some(other.expose_secret());

    let around_all =
        Router::new().nest("/v1", Router::new().nest("/a", router())).layer(fixture.layer());
    let within =
        Router::new().nest("/v1", Router::new().nest("/a", router().layer(fixture.layer())));
    let service = Router::new().nest_service("/v1/a", router().layer(fixture.layer()));
    for nested in [around_all, within, service] {
        assert_eq!(ask(&nested, "/v1/a/who?q=1", key).await.0, 200);
        assert_eq!(ask(&nested, "/v1/a/who-if-any", key).await.0, 403);
        let mut post = request("/v1/a/who", key);
        *post.method_mut() = Method::POST;
        assert_eq!(send(&nested, post).await.status(), 403);
        // What is left of the path within the nested router is no rule's business.
        assert_eq!(ask(&nested, "/v1/a/who", other).await.0, 403);
    }
}

#[tokio::test]
async fn address_rules_see_axum_s_connect_info() {
    let fixture = fixture().await;
    let network = "192.0.2.0/24".parse().unwrap();
    let key = fixture.issue(|new| new.allowed_ips([network])).await;
    let key = Some(key.expose_secret());
    let router = router().layer(fixture.layer());
    // Nobody has said where the request comes from.
    assert_eq!(ask(&router, "/who", key).await.0, 403);
    for (peer, status) in [
        ("192.0.2.7:1234", 200),
        ("[::ffff:192.0.2.7]:1234", 200),
        ("198.51.100.7:1234", 403),
        ("[2001:db8::1]:1234", 403),
    ] {
        let mut from_peer = request("/who", key);
        let peer: SocketAddr = peer.parse().unwrap();
        from_peer.extensions_mut().insert(axum::extract::ConnectInfo(peer));
        assert_eq!(send(&router, from_peer).await.status(), status, "{peer}");
    }
}

#[tokio::test]
async fn address_rules_see_the_peer_of_a_real_connection() {
    let fixture = fixture().await;
    let here = "127.0.0.0/8".parse().unwrap();
    let there = "192.0.2.0/24".parse().unwrap();
    let here = fixture.issue(|new| new.allowed_ips([here])).await;
    let there = fixture.issue(|new| new.allowed_ips([there])).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let make = router().layer(fixture.layer()).into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move { axum::serve(listener, make).await });

    let executor = hyper_util::rt::TokioExecutor::new();
    let client = hyper_util::client::legacy::Client::builder(executor).build_http::<Body>();
    for (key, status) in [(here, 200), (there, 403)] {
        let uri = format!("http://{address}/who");
        let response = client.request(request(&uri, Some(key.expose_secret()))).await.unwrap();
        assert_eq!(response.status(), status);
    }
}

#[tokio::test]
async fn a_router_without_any_key_still_answers_what_is_skipped() {
    let layer =
        ApiKeyAuthLayer::new(MemoryStore::new()).skip(|head| head.uri().path() == "/health");
    let router = router().route("/health", get(|| async { "well" })).layer(layer);
    assert_eq!(ask(&router, "/health", None).await, (200, "well".into()));
    assert_eq!(ask(&router, "/who", None).await.0, 401);
}
