//! Stream of server-sent events that ends when its key is revoked: the handler rechecks the key every second.
//!
//! `cargo run --example sse`; `ADDR` (default `127.0.0.1:3004`) is read from the environment. It prints two curl
//! lines: one opens the stream, the other revokes its key.

use std::{convert::Infallible, env, error::Error, net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::State,
    http::StatusCode,
    response::{Sse, sse::Event},
    routing::{delete, get},
};
use futures_util::{Stream, stream};
use tokio::time::interval;
use tower_api_key::{ApiKeyAuthLayer, AuthContext, KeyManager, MemoryStore, NewKey};

/// Interval between two rechecks. A stream ends at most this long after the node has received the revocation.
const RECHECK_INTERVAL: Duration = Duration::from_secs(1);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().init();
    let address = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3004".to_owned());
    let store = MemoryStore::new();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await?;
    let issued = manager.issue(NewKey::new(user.id, "events")).await?;

    let app = Router::new()
        .route("/events", get(events))
        .route("/key", delete(revoke))
        .with_state(manager)
        .layer(ApiKeyAuthLayer::new(store))
        .into_make_service_with_connect_info::<SocketAddr>();
    let listener = tokio::net::TcpListener::bind(&address).await?;
    let address = listener.local_addr()?;
    let key = issued.expose_secret();
    println!("This is your key:\n\n  {key}\n\nOpen the stream, and revoke the key meanwhile:\n");
    println!("  curl -N http://{address}/events -H 'Authorization: Bearer {key}'");
    println!("  curl -i -X DELETE http://{address}/key -H 'Authorization: Bearer {key}'\n");
    println!("Listening on http://{address}");
    axum::serve(listener, app).await?;
    Ok(())
}

/// Sends an event every second while the key is valid.
async fn events(caller: AuthContext) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    let start = (caller, interval(RECHECK_INTERVAL), 1_u64);
    Sse::new(stream::unfold(start, |(caller, mut ticks, number)| async move {
        ticks.tick().await;
        // Any denial ends the stream. When the bounds of an outage are exceeded, the key can no longer be assumed to
        // be valid.
        let caller = caller
            .recheck()
            .await
            .inspect_err(|denial| tracing::info!(%denial, "the stream ends"))
            .ok()?;
        let event = Event::default().data(format!("event {number} for {}", caller.user().email));
        Some((Ok(event), (caller, ticks, number + 1)))
    }))
}

/// Revokes the key of the request.
async fn revoke(
    State(manager): State<KeyManager<MemoryStore>>,
    caller: AuthContext,
) -> Result<StatusCode, StatusCode> {
    let revoked = manager.revoke(&caller.key().id).await;
    revoked.map(|_| StatusCode::NO_CONTENT).map_err(|error| {
        tracing::error!(%error, "the key could not be revoked");
        StatusCode::INTERNAL_SERVER_ERROR
    })
}
