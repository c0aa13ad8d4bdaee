//! tonic: the standard health service, which is open to everyone, beside a service that requires API keys.
//!
//! `cargo run --example tonic`; `ADDR` (default `127.0.0.1:3002`) is read from the environment. A gRPC client calls
//! `example.Greeter/SayHello` with the key in the metadata `authorization: Bearer …` or `x-api-key: …`. The method
//! takes `google.protobuf.Empty` and returns `google.protobuf.StringValue`.

use std::{
    convert::Infallible,
    env,
    error::Error,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status,
    body::Body,
    server::{Grpc, NamedService},
    service::LayerExt,
    transport::{Server, server::TcpConnectInfo},
};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};
use tower_api_key::{ApiKeyAuthLayer, AuthContext, KeyManager, MemoryStore, NewKey};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3002".to_owned());

    // The store is in memory, so the keys change at each start.
    let store = MemoryStore::new();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "admin").await?.id;
    let key = |name: &str| NewKey::new(user.clone(), name);
    let goodbye = ["/example.Greeter/SayGoodbye".parse()?];
    let plans = [
        ("for the greeting", key("greeting").scopes(["greeting:read"])),
        ("only for another method", key("goodbye").allowed_endpoints(goodbye)),
        ("without the scope", key("no scope")),
    ];
    for (plan, new) in plans {
        println!("A key {plan}:\n  {}", manager.issue(new).await?.expose_secret());
    }

    let layer = ApiKeyAuthLayer::new(store).client_ip(|head| {
        let peer = head.extensions().get::<TcpConnectInfo>()?.remote_addr()?;
        Some(peer.ip())
    });
    let (_health, health) = tonic_health::server::health_reporter();
    let listener = tokio::net::TcpListener::bind(&address).await?;
    println!("Listening on http://{}", listener.local_addr()?);
    Server::builder()
        .add_service(health)
        .add_service(layer.named_layer(Greeter))
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await?;
    Ok(())
}

async fn say_hello(request: Request<()>) -> Result<Response<String>, Status> {
    let caller = AuthContext::from_extensions(request.extensions())?;
    caller.require_scope("greeting:read")?;
    Ok(Response::new(format!("Hello, {}!", caller.user().email)))
}

/// Equivalent of the code that `tonic-prost-build` generates from a `.proto` file.
#[derive(Clone)]
struct Greeter;

impl NamedService for Greeter {
    const NAME: &'static str = "example.Greeter";
}

impl Service<http::Request<Body>> for Greeter {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            Ok(match request.uri().path() {
                "/example.Greeter/SayHello" => {
                    let mut grpc = Grpc::new(ProstCodec::<String, ()>::default());
                    grpc.unary(service_fn(say_hello), request).await
                }
                _ => Status::unimplemented("no such method").into_http(),
            })
        })
    }
}
