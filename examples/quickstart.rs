//! axum on an SQLite file. On the first start it creates a user and a key, and prints the key once.
//!
//! In the repository, run `cargo run -p quickstart`: that package has only the dependencies of this file, so it
//! compiles faster than the crate with all its examples. In the published crate, run `cargo run --example quickstart
//! --features axum,sqlite`. `ADDR` (default `127.0.0.1:3000`) and `DATABASE_URL` (a file, default `quickstart.db`)
//! are read from the environment.

use std::{env, error::Error, net::SocketAddr};

use axum::{Json, Router, routing::get};
use serde_json::{Value, json};
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, KeyManager, NewKey, SqliteStore,
    store::{KeyRepository, ListKeys},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().init();
    let address = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let file = env::var("DATABASE_URL").unwrap_or_else(|_| "quickstart.db".to_owned());

    let store = SqliteStore::open(&file)?;
    store.migrate().await?;

    let app = Router::new()
        .route("/me", get(me))
        .layer(ApiKeyAuthLayer::new(store.clone()))
        .into_make_service_with_connect_info::<SocketAddr>();
    let listener = tokio::net::TcpListener::bind(&address).await?;
    let address = listener.local_addr()?;

    if store.list_keys(&ListKeys::default()).await?.keys.is_empty() {
        let manager = KeyManager::new(store);
        let user = manager.create_user("ada@example.com", "admin").await?;
        let issued = manager.issue(NewKey::new(user.id, "quickstart").scopes(["demo"])).await?;
        let key = issued.expose_secret();
        println!("This is your key. It is shown this once:\n\n  {key}\n\nTry it:\n");
        println!("  curl -i http://{address}/me -H 'Authorization: Bearer {key}'");
    } else {
        println!("The key was shown at the first start; delete {file} for a new one. Try it:\n");
        println!("  curl -i http://{address}/me -H 'Authorization: Bearer YOUR-KEY'");
    }
    println!("  curl -i http://{address}/me");
    println!("  curl -i http://{address}/me -H 'x-api-key: tak_live_wrong'\n");
    println!("Listening on http://{address}");
    axum::serve(listener, app).with_graceful_shutdown(stopped()).await?;
    Ok(())
}

/// Returns the authenticated caller.
async fn me(caller: AuthContext) -> Json<Value> {
    Json(json!({
        "email": caller.user().email,
        "role": caller.user().role,
        "key": caller.key().name,
        "scopes": caller.scopes(),
    }))
}

async fn stopped() {
    // If no signal handler can be installed, the server shuts down at once.
    let _ = tokio::signal::ctrl_c().await;
}
