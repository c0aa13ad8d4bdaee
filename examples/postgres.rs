//! axum on PostgreSQL, with keys of a custom brand and keys in an older format.
//!
//! `cargo run --example postgres`; `ADDR` (default `127.0.0.1:3004`) and `DATABASE_URL` (default
//! `postgres://postgres@localhost/postgres`) are read from the environment.

use std::{env, error::Error, net::SocketAddr};

use axum::{Router, routing::get};
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, KeyManager, KeyScheme, NewKey, PostgresStore, key::KeyFormat,
    management::ManageError,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().init();
    let address = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3004".to_owned());
    let url = env::var("DATABASE_URL")
        .unwrap_or_else(|_| "postgres://postgres@localhost/postgres".to_owned());

    let store = PostgresStore::builder(&url).max_connections(8).build()?;
    // Creates the tables, or adopts existing ones. Every node can run it at every start.
    store.migrate().await?;

    // A real pepper is stored outside the database. This default is for the example only.
    let pepper = env::var("KEY_PEPPER").unwrap_or_else(|_| "only for this example".to_owned());
    let scheme = KeyScheme::builder()
        .format(KeyFormat::structured("acme", "live")?)
        .format(KeyFormat::first_chars(8)?)
        .pepper(pepper)
        .upgrade_hashes()
        .build()?;
    let layer = ApiKeyAuthLayer::new(store.clone()).scheme(scheme.clone()).realm("acme")?;

    let app = Router::new()
        .route("/", get(hello))
        .layer(layer)
        .into_make_service_with_connect_info::<SocketAddr>();
    let listener = tokio::net::TcpListener::bind(&address).await?;
    let address = listener.local_addr()?;

    let manager = KeyManager::new(store).scheme(scheme);
    match manager.create_user("ada@example.com", "admin").await {
        Ok(user) => {
            let issued = manager.issue(NewKey::new(user.id, "example")).await?;
            let key = issued.expose_secret();
            println!("  curl -i http://{address}/ -H 'Authorization: Bearer {key}'");
        }
        // At the second start the user exists, and the keys of the first start are still valid.
        Err(ManageError::Conflict { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    println!("Listening on http://{address}");
    axum::serve(listener, app).await?;
    Ok(())
}

async fn hello(caller: AuthContext) -> String {
    format!("Hello, {}!\n", caller.user().email)
}
