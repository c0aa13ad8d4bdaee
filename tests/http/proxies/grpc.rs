//! Stock gRPC and gRPC-Web clients read the status of each denial, directly and behind nginx (`grpc_pass`).

use std::net::{Ipv4Addr, SocketAddr};

use bytes::Bytes;
use http::Version;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::process::Command;
use tonic::{
    Code,
    body::Body,
    client::GrpcService,
    codegen::StdError,
    service::LayerExt,
    transport::{Endpoint, Server, server::TcpIncoming},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_web::{GrpcWebClientLayer, GrpcWebClientService, GrpcWebLayer};
use tower::ServiceBuilder;
use tower_api_key::{
    ApiKeyAuthLayer, MemoryStore, RateLimitLayer, RequireLayer, StoreError,
    rate_limit::LocalRateLimiter,
    record::RateLimits,
    store::{Answer, KeyStore, Lookup},
};

use super::programs::{in_crate, is_there, lines};
use crate::support::{fixture, servers::Nginx, unknown_key, unknown_key_with_id};

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
    // By default, nginx takes messages of at most 1 MB.
    let server = format!("client_max_body_size 10m; location / {{ grpc_pass grpc://{service}; }}");
    let nginx = Nginx::start("", &server);
    let address = nginx.address(Version::HTTP_2);
    (nginx, address)
}

/// Calls the health service with each key, and asserts that the client reads the status.
async fn assert_reads_each_status<T: Transport>(
    mut client: HealthClient<T>,
    callers: &[(String, Code)],
) where
    <T::ResponseBody as http_body::Body>::Error: Into<StdError> + Send,
{
    for (key, expected) in callers {
        let read = check(&mut client, key).await;
        let code = read.as_ref().map_or_else(tonic::Status::code, |()| Code::Ok);
        assert_eq!(code, *expected, "{read:?}");
    }
}

async fn check<T: Transport>(client: &mut HealthClient<T>, key: &str) -> Result<(), tonic::Status>
where
    <T::ResponseBody as http_body::Body>::Error: Into<StdError> + Send,
{
    let mut request = tonic::Request::new(HealthCheckRequest::default());
    if !key.is_empty() {
        request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    }
    client.check(request).await.map(|_| ())
}

/// What tonic's clients send requests over.
trait Transport:
    GrpcService<
        Body,
        Error: Into<StdError>,
        ResponseBody: http_body::Body<Data = Bytes> + Send + 'static,
    >
{
}

impl<T> Transport for T where
    T: GrpcService<
            Body,
            Error: Into<StdError>,
            ResponseBody: http_body::Body<Data = Bytes> + Send + 'static,
        >
{
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
        for size in ["0", "3000000"] {
            let mut command = Command::new(&python);
            command.arg(in_crate("tests/clients/check_health.py"));
            command.args([&address.to_string(), size]).args(keys.clone());
            assert_eq!(lines(&mut command).await, expected, "{address}, {size} bytes");
        }
    }
}

/// A gRPC-Web client over the HTTP client of hyper-util.
fn web_client(address: SocketAddr, is_http_2: bool) -> WebClient {
    let http = Client::builder(TokioExecutor::new()).http2_only(is_http_2).build_http();
    let web = ServiceBuilder::new().layer(GrpcWebClientLayer::new()).service(http);
    HealthClient::with_origin(web, format!("http://{address}").parse().unwrap())
}

type WebClient =
    HealthClient<GrpcWebClientService<Client<HttpConnector, tonic_web::GrpcWebCall<Body>>>>;

#[tokio::test]
async fn a_grpc_web_client_reads_each_status_of_a_layer_around_the_translation() {
    let ((auth, limit, require), callers) = guarded().await;
    let layers = (auth, limit, require, GrpcWebLayer::new());
    let (_, service) = tonic_health::server::health_reporter();

    // Around a whole server, and around one service.
    let (whole, whole_address) = listen();
    let mut server = Server::builder().accept_http1(true).layer(layers.clone());
    tokio::spawn(server.add_service(service.clone()).serve_with_incoming(whole));
    let (single, single_address) = listen();
    let server = Server::builder().accept_http1(true).add_service(layers.named_layer(service));
    tokio::spawn(server.serve_with_incoming(single));

    for address in [whole_address, single_address] {
        for is_http_2 in [false, true] {
            assert_reads_each_status(web_client(address, is_http_2), &callers).await;
        }
    }
}

#[tokio::test]
async fn a_layer_inside_the_translation_has_its_status_read_over_http_2_alone() {
    let ((auth, limit, require), callers) = guarded().await;
    let (incoming, address) = listen();
    let (_, service) = tonic_health::server::health_reporter();
    let layers = (GrpcWebLayer::new(), auth, limit, require);
    let server = Server::builder().accept_http1(true).layer(layers).add_service(service);
    tokio::spawn(server.serve_with_incoming(incoming));
    assert_reads_each_status(web_client(address, true), &callers).await;

    // The translation turns a call over HTTP/1.1 into a request that differs from any other in its content type alone.
    // It is denied in HTTP.
    let mut client = web_client(address, false);
    for (key, expected) in callers {
        let read = check(&mut client, &key).await;
        assert_eq!(read.is_ok(), expected == Code::Ok, "{read:?}");
    }
}
