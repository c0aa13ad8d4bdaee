//! tonic: the standard health service behind API keys, one of them for one method alone.
//!
//! `cargo run --example tonic`; `ADDR` (default `127.0.0.1:3002`) is read from the environment. Any
//! gRPC client that knows `grpc.health.v1.Health` can call it, with the key in the metadata
//! `authorization: Bearer …` or `x-api-key: …`.

use std::{env, error::Error, pin::Pin};

use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{
    Request, Response, Status,
    service::LayerExt,
    transport::{Server, server::TcpConnectInfo},
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{Health, HealthServer},
};
use tower_api_key::{ApiKeyAuthLayer, AuthContext, KeyManager, MemoryStore, NewKey};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3002".to_owned());

    // In memory, so the keys are others each time.
    let store = MemoryStore::new();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "admin").await?.id;
    let anything = manager.issue(NewKey::new(user.clone(), "anything")).await?;
    let watch = ["/grpc.health.v1.Health/Watch".parse()?];
    let watcher = manager.issue(NewKey::new(user, "watcher").allowed_endpoints(watch)).await?;
    println!("A key for everything:\n  {}", anything.expose_secret());
    println!("A key for Health/Watch alone:\n  {}", watcher.expose_secret());

    let layer = ApiKeyAuthLayer::new(store).client_ip(|head| {
        let peer = head.extensions().get::<TcpConnectInfo>()?.remote_addr()?;
        Some(peer.ip())
    });
    let listener = tokio::net::TcpListener::bind(&address).await?;
    println!("Listening on http://{}", listener.local_addr()?);
    Server::builder()
        .add_service(layer.named_layer(HealthServer::new(Healthy)))
        .serve_with_incoming(TcpListenerStream::new(listener))
        .await?;
    Ok(())
}

struct Healthy;

#[tonic::async_trait]
impl Health for Healthy {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let caller = request
            .extensions()
            .get::<AuthContext>()
            .ok_or_else(|| Status::internal("no ApiKeyAuthLayer is around the service"))?;
        println!("checked by {}", caller.user().email);
        Ok(Response::new(HealthCheckResponse { status: ServingStatus::Serving.into() }))
    }

    async fn watch(
        &self,
        _request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("nothing changes here"))
    }
}
