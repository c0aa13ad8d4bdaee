//! What a gRPC caller sees of a denial: the fields, and what a stock client reads from them.

use http::{Response, Version};
use tonic::{
    Code, Status,
    service::LayerExt,
    transport::{
        Channel, Endpoint, Server,
        server::{TcpConnectInfo, TcpIncoming},
    },
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tower::ServiceExt;
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, Denial, MemoryStore, StoreError,
    denial::{Forbidden, InvalidKey},
    middleware::openai_error,
};

use crate::support::{
    Answer, bearer, fixture, get, grpc, read, rule, send, stores::Failing, unknown_key,
    with_wrong_secret,
};

/// HTTP 200, the status in the header fields, and nothing after them.
fn assert_trailers_only(answer: &Answer, content_type: &str, code: Code) {
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.header("content-type"), Some(content_type));
    assert_eq!(answer.header("grpc-status"), Some(&*(code as i32).to_string()));
    assert!(!answer.header("grpc-message").unwrap().is_empty());
    assert_eq!(answer.body, "");
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    assert!(answer.response.extensions().get::<Denial>().is_some());
}

const CONTENT_TYPES: [&str; 8] = [
    "application/grpc",
    "application/grpc+proto",
    "application/grpc-web",
    "application/grpc-web+proto",
    "application/grpc-web-text",
    "application/grpc-web-text+proto",
    "application/grpc; charset=utf-8",
    "Application/gRPC",
];

#[tokio::test]
async fn every_grpc_and_grpc_web_content_type_gets_a_trailers_only_answer() {
    let fixture = fixture().await;
    for content_type in CONTENT_TYPES {
        for request in [get(&[]), bearer("nonsense"), bearer(&unknown_key())] {
            let answer = send(&fixture.layer(), grpc(request, content_type)).await;
            assert_trailers_only(&answer, content_type, Code::Unauthenticated);
        }
    }
}

#[tokio::test]
async fn a_content_type_alone_never_makes_a_denial_a_success() {
    let fixture = fixture().await;
    let versions =
        [Version::HTTP_09, Version::HTTP_10, Version::HTTP_11, Version::HTTP_2, Version::HTTP_3];
    for content_type in CONTENT_TYPES {
        for version in versions {
            for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY"] {
                let mut request = grpc(get(&[]), content_type);
                *request.method_mut() = method.parse().unwrap();
                *request.version_mut() = version;
                let is_web = content_type.starts_with("application/grpc-web");
                let is_call = method == "POST" && (is_web || version == Version::HTTP_2);
                let answer = send(&fixture.layer(), request).await;
                let expected = if is_call { 200 } else { 401 };
                assert_eq!(answer.status(), expected, "{method} {version:?} {content_type}");
                assert_eq!(answer.header("grpc-status").is_some(), is_call);
                assert_eq!(answer.header("www-authenticate").is_some(), !is_call);
                assert_eq!(answer.header("cache-control"), Some("no-store"));
            }
        }
    }
}

#[tokio::test]
async fn a_layer_for_http_only_answers_grpc_calls_in_http() {
    let fixture = fixture().await;
    for content_type in CONTENT_TYPES {
        let request = grpc(get(&[]), content_type);
        let answer = send(&fixture.layer().http_only(), request).await;
        assert_eq!((answer.status(), answer.header("grpc-status")), (401, None));
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    }
}

#[tokio::test]
async fn what_only_resembles_grpc_gets_an_http_answer() {
    let fixture = fixture().await;
    for content_type in [
        "application/grpcfoo",
        "application/grpc-foo",
        "application/grpc-webby",
        "application/grp",
        "text/grpc",
        "application/json",
    ] {
        let answer = send(&fixture.layer(), grpc(get(&[]), content_type)).await;
        assert_eq!(answer.status(), 401, "{content_type}");
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        assert_eq!(answer.header("grpc-status"), None);
    }
}

#[tokio::test]
async fn each_reason_has_the_status_code_of_the_table() {
    let fixture = fixture().await;
    let ruled = fixture.issue(|new| new.allowed_endpoints([rule("/a.B/C")])).await;
    let network = "192.0.2.1".parse().unwrap();
    let bound = fixture.issue(|new| new.allowed_ips([network])).await;
    let layer = fixture.layer();
    let fails = |error| ApiKeyAuthLayer::new(Failing(error));
    let busy = StoreError::overloaded("busy", std::time::Duration::from_secs(2));
    for (layer, request, code) in [
        (layer.clone(), get(&[]), Code::Unauthenticated),
        (layer.clone(), get(&[("x-api-key", b"")]), Code::InvalidArgument),
        (layer.clone(), bearer(&with_wrong_secret(&fixture.key)), Code::Unauthenticated),
        (layer.clone(), bearer(ruled.expose_secret()), Code::PermissionDenied),
        (layer, bearer(bound.expose_secret()), Code::PermissionDenied),
        (fails(StoreError::unavailable("x")), bearer(&unknown_key()), Code::Unavailable),
        (fails(busy), bearer(&unknown_key()), Code::Unavailable),
        (fails(StoreError::bad_row("key 17")), bearer(&unknown_key()), Code::Internal),
    ] {
        let answer = send(&layer, grpc(request, "application/grpc")).await;
        assert_trailers_only(&answer, "application/grpc", code);
    }
}

#[tokio::test]
async fn the_message_says_no_more_than_the_layer_may() {
    let fixture = fixture().await;
    let answer = send(&fixture.layer(), grpc(bearer(&unknown_key()), "application/grpc")).await;
    assert_eq!(answer.header("grpc-message"), Some("the API key is not valid"));
    let verbose = fixture.layer().verbose();
    let answer = send(&verbose, grpc(bearer(&unknown_key()), "application/grpc")).await;
    assert_eq!(answer.header("grpc-message"), Some("the API key is unknown"));
}

#[tokio::test]
async fn the_message_is_percent_encoded() {
    let layer = ApiKeyAuthLayer::new(MemoryStore::new()).optional();
    let denial = Denial::from(Forbidden::Model("50%\u{e9}".into()));
    let handler = || async move { Err::<(), Denial>(denial) };
    let router = axum::Router::new().fallback(handler).layer(layer);
    let request = grpc(get(&[]), "application/grpc").map(axum::body::Body::new);
    let answer = read(router.oneshot(request).await.unwrap()).await;
    assert_trailers_only(&answer, "application/grpc", Code::PermissionDenied);
    let message = r#"the API key may not use the model "50%25%C3%A9""#;
    assert_eq!(answer.header("grpc-message"), Some(message));
}

#[tokio::test]
async fn a_responder_for_http_is_not_asked() {
    let fixture = fixture().await;
    let own = fixture.layer().on_denial(|_| Response::new("own".into()));
    for layer in [fixture.layer().on_denial(openai_error), own] {
        let answer = send(&layer, grpc(get(&[]), "application/grpc")).await;
        assert_trailers_only(&answer, "application/grpc", Code::Unauthenticated);
    }
}

#[tokio::test]
async fn a_denial_of_a_handler_becomes_a_status_with_the_text_that_callers_may_see() {
    let fixture = fixture().await;
    let bad_row = Denial::from(StoreError::bad_row("key 17: column key_hash"));
    let busy = StoreError::overloaded("pool of 10.0.0.7", std::time::Duration::from_millis(1500));
    for (denial, code, message) in [
        (Denial::MissingCredential, Code::Unauthenticated, "an API key is required"),
        (Denial::from(InvalidKey::Revoked), Code::Unauthenticated, "the API key is not valid"),
        (Denial::from(InvalidKey::NotYetValid), Code::Unauthenticated, "the API key is not valid"),
        (
            Denial::from(Forbidden::Scope("chat:write".into())),
            Code::PermissionDenied,
            r#"the API key lacks the scope "chat:write""#,
        ),
        (bad_row, Code::Internal, "internal error"),
        (
            Denial::from(busy),
            Code::Unavailable,
            "API keys can't be checked right now; try again later",
        ),
    ] {
        assert_eq!(denial.detail(), message);
        let retry_after = denial.retry_after().map(|_| "2");
        let status = Status::from(denial);
        assert_eq!((status.code(), status.message()), (code, message));
        let metadata = status.metadata().get("retry-after").map(|value| value.to_str().unwrap());
        assert_eq!(metadata, retry_after);
    }
    // With `?` in a handler.
    let handler = |extensions: &http::Extensions| -> Result<String, Status> {
        Ok(AuthContext::from_extensions(extensions)?.user().email.clone())
    };
    let bare = handler(&http::Extensions::new()).unwrap_err();
    assert_eq!(bare.code(), Code::Internal);
    let caller = Authenticator::new(fixture.store.clone()).authenticate(&fixture.key).await;
    let mut extensions = http::Extensions::new();
    extensions.insert(caller.unwrap());
    assert_eq!(handler(&extensions).unwrap(), "ada@example.com");
}

/// A health service behind the layer on a port of its own, and a client of it.
async fn health(layer: ApiKeyAuthLayer) -> HealthClient<Channel> {
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let (_, service) = tonic_health::server::health_reporter();
    let server = Server::builder().layer(layer).add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming));
    let endpoint = Endpoint::try_from(format!("http://{address}")).unwrap();
    HealthClient::new(endpoint.connect().await.unwrap())
}

async fn check(client: &mut HealthClient<Channel>, key: Option<&str>) -> Result<(), Status> {
    let mut request = tonic::Request::new(HealthCheckRequest::default());
    if let Some(key) = key {
        request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    }
    let response = client.check(request).await?;
    assert_eq!(response.into_inner().status(), ServingStatus::Serving);
    Ok(())
}

#[tokio::test]
async fn a_stock_client_reads_why_it_is_denied() {
    let fixture = fixture().await;
    let mut client = health(fixture.layer()).await;
    check(&mut client, Some(&fixture.key)).await.unwrap();

    let denied = check(&mut client, None).await.unwrap_err();
    assert_eq!(denied.code(), Code::Unauthenticated);
    assert_eq!(denied.message(), "an API key is required");
    for key in ["nonsense", &unknown_key(), &with_wrong_secret(&fixture.key)] {
        let denied = check(&mut client, Some(key)).await.unwrap_err();
        assert_eq!(denied.code(), Code::Unauthenticated);
        assert_eq!(denied.message(), "the API key is not valid");
    }
    let denied = check(&mut client, Some("")).await.unwrap_err();
    assert_eq!(denied.code(), Code::InvalidArgument);
    // The connection is none the worse for it.
    check(&mut client, Some(&fixture.key)).await.unwrap();
}

#[tokio::test]
async fn a_stock_client_reads_that_its_key_may_not_call_the_method() {
    let fixture = fixture().await;
    let may =
        fixture.issue(|new| new.allowed_endpoints([rule("/grpc.health.v1.Health/Check")])).await;
    let may_not =
        fixture.issue(|new| new.allowed_endpoints([rule("/grpc.health.v1.Health/Watch")])).await;
    let mut client = health(fixture.layer()).await;
    check(&mut client, Some(may.expose_secret())).await.unwrap();
    let denied = check(&mut client, Some(may_not.expose_secret())).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn a_stock_client_reads_that_a_stream_is_denied() {
    let fixture = fixture().await;
    let mut client = health(fixture.layer()).await;
    let denied = client.watch(HealthCheckRequest::default()).await.unwrap_err();
    assert_eq!(denied.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_stock_client_reads_that_the_store_is_down() {
    for (error, code) in [
        (StoreError::unavailable("refused"), Code::Unavailable),
        (StoreError::bad_row("key 17"), Code::Internal),
    ] {
        let mut client = health(ApiKeyAuthLayer::new(Failing(error))).await;
        let denied = check(&mut client, Some(&unknown_key())).await.unwrap_err();
        assert_eq!(denied.code(), code);
        assert!(!denied.message().contains("17"), "{}", denied.message());
    }
}

#[tokio::test]
async fn address_rules_see_the_peer_of_a_tonic_connection() {
    let fixture = fixture().await;
    let loopback = "127.0.0.0/8".parse().unwrap();
    let key = fixture.issue(|new| new.allowed_ips([loopback])).await;
    let peer = |head: &tower_api_key::middleware::RequestHead<'_>| {
        Some(head.extensions().get::<TcpConnectInfo>()?.remote_addr()?.ip())
    };
    let mut client = health(fixture.layer().client_ip(peer)).await;
    check(&mut client, Some(key.expose_secret())).await.unwrap();
    // Nobody has said where the address is.
    let mut client = health(fixture.layer()).await;
    let denied = check(&mut client, Some(key.expose_secret())).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
}

#[tokio::test]
async fn one_service_of_several_can_be_behind_the_layer() {
    let fixture = fixture().await;
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = incoming.local_addr().unwrap();
    let (_, service) = tonic_health::server::health_reporter();
    let service = fixture.layer().named_layer(service);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    let endpoint = Endpoint::try_from(format!("http://{address}")).unwrap();
    let mut client = HealthClient::new(endpoint.connect().await.unwrap());
    check(&mut client, Some(&fixture.key)).await.unwrap();
    assert_eq!(check(&mut client, None).await.unwrap_err().code(), Code::Unauthenticated);
}
