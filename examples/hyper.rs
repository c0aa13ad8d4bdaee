//! hyper without a framework: HTTP/1.1 and h2c on one port.
//!
//! `cargo run --example hyper`; `ADDR` (default `127.0.0.1:3001`) is read from the environment.

use std::{convert::Infallible, env, error::Error};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::net::TcpListener;
use tower::ServiceBuilder;
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, KeyManager, MemoryStore, NewKey,
    middleware::{ClientAddr, Credential},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let address = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3001".to_owned());

    // The store is in memory, so the key changes at each start.
    let store = MemoryStore::new();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "admin").await?;
    let issued = manager.issue(NewKey::new(user.id, "hyper")).await?;

    let x_api_key = Credential::header(http::HeaderName::from_static("x-api-key"));
    let layer = ApiKeyAuthLayer::new(store).credentials([Credential::basic(), x_api_key]);

    let listener = TcpListener::bind(&address).await?;
    let (address, key) = (listener.local_addr()?, issued.expose_secret());
    println!("  curl -i http://{address}/ -u '{key}:'");
    println!("  curl -i http://{address}/ -H 'x-api-key: {key}'");
    println!("Listening on http://{address}");
    loop {
        let (stream, peer) = listener.accept().await?;
        // Provides the peer's address to the layer; hyper does not insert it.
        let service = ServiceBuilder::new()
            .map_request(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert(ClientAddr::from(peer));
                request
            })
            .layer(layer.clone())
            .service_fn(hello);
        tokio::spawn(async move {
            let connection = auto::Builder::new(TokioExecutor::new());
            let service = TowerToHyperService::new(service);
            if let Err(error) = connection.serve_connection(TokioIo::new(stream), service).await {
                eprintln!("{peer}: {error}");
            }
        });
    }
}

async fn hello(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    // The layer only lets requests with a key through, so the context is always there.
    let email =
        request.extensions().get::<AuthContext>().map(|caller| caller.user().email.as_str());
    Ok(Response::new(Full::from(format!("Hello, {}!\n", email.unwrap_or_default()))))
}
