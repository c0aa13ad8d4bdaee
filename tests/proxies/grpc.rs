//! Stock gRPC and gRPC-Web clients read the status of each denial, directly and behind nginx (`grpc_pass`).

use std::net::{Ipv4Addr, SocketAddr};

use http::Version;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::process::Command;
use tonic::{
    Code,
    body::Body,
    client::GrpcService,
    transport::{Endpoint, Server, server::TcpIncoming},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_web::{GrpcWebClientLayer, GrpcWebLayer};
use tower::ServiceBuilder;
use tower_api_key::{
    Answer, ApiKeyAuthLayer, KeyStore, LocalRateLimiter, Lookup, MemoryStore, RateLimitLayer,
    RateLimits, RequireLayer, StoreError,
};

use super::{
    programs::{in_crate, is_there, lines},
    support::{fixture, servers::Nginx, unknown_key, unknown_key_with_id},
};

const ID_OF_AN_OUTAGE: &str = "yyyyyyyyyy";

/// A store that is down for look-ups of one id.
struct PartlyDown(MemoryStore);

impl KeyStore for PartlyDown {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        if lookup.id() == ID_OF_AN_OUTAGE {
            return Err(StoreError::unavailable("the database is down"));
        }
        self.0.resolve(lookup).await
    }
}

/// Outermost first.
type Guarded = (ApiKeyAuthLayer, RateLimitLayer, RequireLayer);

/// The layer with a rate limit and a scope behind it, and the keys of callers with the status that each has to read.
async fn guarded() -> (Guarded, Vec<(String, Code)>) {
    let fixture = fixture().await;
    let mut none = RateLimits::default();
    none.per_minute = Some(0);
    let good = fixture.issue(|key| key.scopes(["health:read"])).await;
    let limited = fixture.issue(|key| key.scopes(["health:read"]).rate_limits(none)).await;
    let guarded = (
        ApiKeyAuthLayer::new(PartlyDown(fixture.store.clone())),
        RateLimitLayer::new(LocalRateLimiter::new()),
        RequireLayer::scope("health:read"),
    );
    let callers = vec![
        (good.expose_secret().to_owned(), Code::Ok),
        (String::new(), Code::Unauthenticated),
        (unknown_key(), Code::Unauthenticated),
        (fixture.key, Code::PermissionDenied),
        (limited.expose_secret().to_owned(), Code::ResourceExhausted),
        (unknown_key_with_id(ID_OF_AN_OUTAGE), Code::Unavailable),
        // The denials before leave the connection as it was.
        (good.expose_secret().to_owned(), Code::Ok),
    ];
    (guarded, callers)
}

fn listen() -> (TcpIncoming, SocketAddr) {
    let incoming = TcpIncoming::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = incoming.local_addr().unwrap();
    (incoming.with_nodelay(Some(true)), address)
}

/// The health service behind the layer.
async fn health() -> (SocketAddr, Vec<(String, Code)>) {
    let ((guarded, callers), (incoming, address)) = (guarded().await, listen());
    let (_, service) = tonic_health::server::health_reporter();
    let server = Server::builder().layer(guarded).add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming));
    (address, callers)
}

/// nginx in front of it.
fn nginx(service: SocketAddr) -> (Nginx, SocketAddr) {
    let nginx = Nginx::start("", &format!("location / {{ grpc_pass grpc://{service}; }}"));
    let address = nginx.address(Version::HTTP_2);
    (nginx, address)
}

/// Calls the health service with each key, and asserts that the client reads the status.
async fn assert_reads_each_status<T>(mut client: HealthClient<T>, callers: &[(String, Code)])
where
    T: GrpcService<Body>,
    T::Error: Into<tonic::codegen::StdError>,
    T::ResponseBody: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    <T::ResponseBody as http_body::Body>::Error: Into<tonic::codegen::StdError> + Send,
{
    for (key, expected) in callers {
        let mut request = tonic::Request::new(HealthCheckRequest::default());
        if !key.is_empty() {
            request
                .metadata_mut()
                .insert("authorization", format!("Bearer {key}").parse().unwrap());
        }
        let read = client.check(request).await;
        let code = read.as_ref().map_or_else(|status| status.code(), |_| Code::Ok);
        assert_eq!(code, *expected, "{read:?}");
    }
}

#[tokio::test]
async fn tonics_client_reads_each_status_directly_and_behind_nginx() {
    let (service, callers) = health().await;
    let (_nginx, proxy) = nginx(service);
    for address in [service, proxy] {
        let channel = Endpoint::try_from(format!("http://{address}")).unwrap();
        let client = HealthClient::new(channel.connect().await.unwrap());
        assert_reads_each_status(client, &callers).await;
    }
}

#[tokio::test]
async fn grpcio_reads_each_status_directly_and_behind_nginx() {
    let python = in_crate("target/python/bin/python");
    if !is_there(&python, &["-c", "import grpc"]).await {
        return;
    }
    let (service, callers) = health().await;
    let (_nginx, proxy) = nginx(service);
    let keys = callers.iter().map(|(key, _)| key);
    let expected: Vec<_> = callers.iter().map(|(_, code)| (*code as i32).to_string()).collect();
    for address in [service, proxy] {
        let mut command = Command::new(&python);
        command.arg(in_crate("tests/clients/check_health.py")).arg(address.to_string());
        assert_eq!(lines(command.args(keys.clone())).await, expected);
    }
}

/// A gRPC-Web client over the HTTP client of hyper-util.
async fn assert_a_web_client_reads_each_status(address: SocketAddr, callers: &[(String, Code)]) {
    let http = Client::builder(TokioExecutor::new()).build_http();
    let web = ServiceBuilder::new().layer(GrpcWebClientLayer::new()).service(http);
    let client = HealthClient::with_origin(web, format!("http://{address}").parse().unwrap());
    assert_reads_each_status(client, callers).await;
}

#[tokio::test]
async fn a_grpc_web_client_reads_each_status_of_a_layer_around_the_translation() {
    let ((auth, limit, require), callers) = guarded().await;
    let (incoming, address) = listen();
    let (_, service) = tonic_health::server::health_reporter();
    let layers = (auth, limit, require, GrpcWebLayer::new());
    let server = Server::builder().accept_http1(true).layer(layers).add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming));
    assert_a_web_client_reads_each_status(address, &callers).await;
}

#[tokio::test]
async fn a_grpc_web_client_reads_each_status_of_a_layer_inside_the_translation() {
    let ((auth, limit, require), callers) = guarded().await;
    let (incoming, address) = listen();
    let (_, service) = tonic_health::server::health_reporter();
    let layers = (GrpcWebLayer::new(), auth, limit, require);
    let server = Server::builder().accept_http1(true).layer(layers).add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming));
    assert_a_web_client_reads_each_status(address, &callers).await;
}
