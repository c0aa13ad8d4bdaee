//! nginx passes requests on (`proxy_pass`, `grpc_pass`): a denial has an HTTP status of its own, except where a gRPC or
//! gRPC-Web client reads its status from the header fields.

use axum::Router;
use http::Method;

use super::{METHODS, borrowed, denied_fields};
use crate::support::{
    Answer, Fixture, fixture,
    servers::Nginx,
    wire::{VERSIONS, exchange, request, serve},
};

/// nginx in front of a service with the layer, which it reaches by these directives.
async fn passing(fixture: &Fixture, http_only: bool, directives: &str) -> Nginx {
    let layer = fixture.layer();
    let layer = if http_only { layer.http_only() } else { layer };
    let service = serve(Router::new().fallback(|| async { "inside" }).layer(layer)).await;
    let directives = directives.replace("SERVICE", &service.to_string());
    Nginx::start("", &format!("location / {{ {directives} }}"))
}

/// Sends every kind of request that is to be denied, and returns those whose response is not as expected.
async fn unexpected(nginx: &Nginx, is_grpc: impl Fn(&Method, &str) -> bool) -> Vec<String> {
    let mut unexpected = Vec::new();
    for version in VERSIONS {
        for method in METHODS {
            for fields in denied_fields() {
                let fields = borrowed(&fields);
                let denied = request(version, &method, "/", &fields);
                let answer = exchange(nginx.address(version), denied).await;
                let content_type = fields.iter().find(|(name, _)| *name == "content-type");
                let is_grpc = content_type.is_some_and(|(_, value)| is_grpc(&method, value));
                let is_expected =
                    if is_grpc { is_trailers_only(&answer) } else { is_http(&answer) };
                if !is_expected {
                    let what = format!("{version:?} {method} {fields:?}");
                    unexpected.push(format!("{:?} for {what}", answer.response));
                }
            }
        }
    }
    unexpected
}

fn is_http(answer: &Answer) -> bool {
    answer.status() == 401
        && answer.header("grpc-status").is_none()
        && answer.header("www-authenticate").is_some()
        && answer.header("cache-control") == Some("no-store")
}

fn is_trailers_only(answer: &Answer) -> bool {
    answer.status() == 200
        && answer.header("grpc-status") == Some("16")
        && answer.header("cache-control") == Some("no-store")
        && answer.body.is_empty()
}

fn assert_none(unexpected: &[String]) {
    let first = &unexpected[..unexpected.len().min(5)];
    assert!(unexpected.is_empty(), "{}, the first: {first:#?}", unexpected.len());
}

#[tokio::test]
async fn no_request_turns_a_denial_into_a_2xx_behind_proxy_pass() {
    let fixture = fixture().await;
    for version in ["1.0", "1.1"] {
        let pass = format!("proxy_pass http://SERVICE; proxy_http_version {version};");
        let nginx = passing(&fixture, true, &pass).await;
        assert_none(&unexpected(&nginx, |_, _| false).await);
    }
}

#[tokio::test]
async fn only_a_grpc_web_call_gets_its_protocols_answer_behind_proxy_pass() {
    let fixture = fixture().await;
    for version in ["1.0", "1.1"] {
        let pass = format!("proxy_pass http://SERVICE; proxy_http_version {version};");
        let nginx = passing(&fixture, false, &pass).await;
        let is_web_call = |method: &Method, content_type: &str| {
            method == Method::POST && content_type.starts_with("application/grpc-web")
        };
        assert_none(&unexpected(&nginx, is_web_call).await);
    }
}

#[tokio::test]
async fn only_a_grpc_call_gets_its_protocols_answer_behind_grpc_pass() {
    let fixture = fixture().await;
    let nginx = passing(&fixture, false, "grpc_pass grpc://SERVICE;").await;
    let is_call = |method: &Method, content_type: &str| {
        method == Method::POST && content_type.starts_with("application/grpc")
    };
    assert_none(&unexpected(&nginx, is_call).await);
}
