//! A custom key store in a few lines. The keys are in a text, which only a restart changes.
//!
//! `cargo run --example custom_store`; `ADDR` (default `127.0.0.1:3003`) is read from the
//! environment.

use std::{collections::HashMap, env, error::Error, net::SocketAddr};

use axum::{Router, routing::get};
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, KeyScheme, StoreError,
    key::{KeyFormat, MintedKey},
    record::{KeyRecord, User},
    store::{Answer, KeyStore, Lookup, StoredKey},
};

/// Lookup id, e-mail address and hash of each key. Only the hash of a key is stored.
///
/// The keys are `team-one-7Bz1nYl0` and `team-two-c9QmXw42`.
const KEYS: &str = "
    team-one ada@example.com $2b$10$2iRmIfOV7sNRzgVr8qaLv.5HmcHtPJlNT174WrPSHmwhjETXs6PRC
    team-two bob@example.com $2b$10$q6eTUJLJpXc1ZYAUrTgCvu10jIN7fajWurCdHx6ths4RSWf4EUOIK
";

/// E-mail addresses and hashes by lookup id.
struct TextFile(HashMap<String, (String, String)>);

impl TextFile {
    fn parse(text: &str) -> Self {
        let keys = text.lines().filter_map(|line| {
            let mut words = line.split_whitespace().map(str::to_owned);
            Some((words.next()?, (words.next()?, words.next()?)))
        });
        Self(keys.collect())
    }

    /// Adds a minted key as a line like those in [`KEYS`], without the key itself.
    fn add(&mut self, key: &MintedKey, email: &str) {
        let line = (email.to_owned(), key.hash().expose_hash());
        self.0.insert(key.lookup_id().to_owned(), line);
    }
}

impl KeyStore for TextFile {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let Some((email, hash)) = self.0.get(lookup.id()) else { return lookup.verify([]).await };
        let user = User::new(email.as_str(), email);
        let record = KeyRecord::new(lookup.id(), lookup.id(), user);
        lookup.verify([StoredKey::new(record, hash.parse()?)]).await
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().init();
    let address = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3003".to_owned());
    let scheme = KeyScheme::builder()
        // New keys are minted in the structured format. The keys in the text have the other format.
        .format(KeyFormat::structured("acme", "live")?)
        .format(KeyFormat::first_chars(8)?)
        .build()?;
    let mut store = TextFile::parse(KEYS);
    let minted = scheme.mint()?;
    store.add(&minted, "eve@example.com");

    // The store records no usage and has no budgets.
    let authenticator = Authenticator::builder(store).scheme(scheme).without_usage().build();
    // Provides the peer's address, so that failed guesses of one client do not limit other clients.
    let app = Router::new()
        .route("/", get(hello))
        .layer(ApiKeyAuthLayer::from(authenticator))
        .into_make_service_with_connect_info::<SocketAddr>();

    let listener = tokio::net::TcpListener::bind(&address).await?;
    let address = listener.local_addr()?;
    println!("  curl -i http://{address}/ -H 'Authorization: Bearer team-one-7Bz1nYl0'");
    let key = minted.expose_secret();
    println!("  curl -i http://{address}/ -H 'Authorization: Bearer {key}'");
    println!("Listening on http://{address}");
    axum::serve(listener, app).await?;
    Ok(())
}

async fn hello(caller: AuthContext) -> String {
    format!("Hello, {}!\n", caller.user().email)
}
