//! axum on an SQLite file with a complete stack: CORS, routes that require a key and routes with an optional key, a
//! health check that skips the layer, rate limits, a cost for each request, and a method that requires a scope.
//!
//! `cargo run --example axum_stack`; `ADDR` (default `127.0.0.1:3000`) and `DATABASE_URL` (a file, default
//! `axum_stack.db`) are read from the environment. It prints keys on the first start.

use std::{env, error::Error, net::SocketAddr};

use axum::{
    Router,
    http::{HeaderName, Method, header},
    routing::{get, post},
};
use tower::ServiceBuilder;
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, KeyManager, NewKey, RateLimitLayer, RequireLayer,
    SqliteStore,
    middleware::BudgetLayer,
    rate_limit::LocalRateLimiter,
    record::{Budget, BudgetPeriod, RateLimits},
    store::{KeyRepository, ListKeys},
};
use tower_http::cors::{Any, CorsLayer};

/// Cost of a request: half a cent, in micro-cents.
const COST: u64 = 500_000;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().init();
    let address = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let file = env::var("DATABASE_URL").unwrap_or_else(|_| "axum_stack.db".to_owned());

    let store = SqliteStore::open(&file)?;
    store.migrate().await?;
    if store.list_keys(&ListKeys::default()).await?.keys.is_empty() {
        issue_keys(store.clone()).await?;
    }

    let authenticator = Authenticator::new(store);
    // Adds the peer's address to each request, for keys with address rules.
    let app = app(&authenticator).into_make_service_with_connect_info::<SocketAddr>();
    let listener = tokio::net::TcpListener::bind(&address).await?;
    println!("Listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).with_graceful_shutdown(stopped()).await?;
    // Writes the usage of the last second.
    authenticator.shutdown().await;
    Ok(())
}

fn app(authenticator: &Authenticator) -> Router {
    // Both groups of routes share the cache of keys and the counters.
    let guards = ServiceBuilder::new()
        .layer(RateLimitLayer::new(LocalRateLimiter::new()))
        .layer(BudgetLayer::new(COST));
    let required = ApiKeyAuthLayer::from(authenticator.clone());
    let optional = required.clone().optional().skip(|head| head.uri().path() == "/health");

    let change_greeting =
        post(|| async { "changed\n" }).layer(RequireLayer::scope("greeting:write"));
    let open = Router::new()
        .route("/health", get(|| async { "healthy\n" }))
        .route("/greeting", get(greeting).merge(change_greeting))
        .layer(ServiceBuilder::new().layer(optional).layer(guards.clone()));
    let closed = Router::new()
        .route("/me", get(|caller: AuthContext| async move { caller.user().email.clone() + "\n" }))
        .layer(ServiceBuilder::new().layer(required).layer(guards));

    // Outermost, because a preflight has no key, and because a page can read a denial only if it has the CORS fields.
    open.merge(closed).layer(cors())
}

fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(Any)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE])
        .expose_headers([header::RETRY_AFTER, HeaderName::from_static("ratelimit")])
}

/// Greets a caller with or without a key. A key that is not valid is denied.
async fn greeting(caller: Option<AuthContext>) -> String {
    let name = caller.map_or("guest".to_owned(), |caller| caller.user().email.clone());
    format!("Hello, {name}!\n")
}

/// Issues a key for each plan and prints it once.
async fn issue_keys(store: SqliteStore) -> Result<(), Box<dyn Error>> {
    let manager = KeyManager::new(store);
    let user = manager.create_user("ada@example.com", "user").await?;
    let key = |name: &str| NewKey::new(user.id.clone(), name);
    let mut two_a_minute = RateLimits::default();
    two_a_minute.per_minute = Some(2);
    let one_cent = Budget { limit_cents: 1, period: BudgetPeriod::Total };
    let plans = [
        ("everything", key("everything").scopes(["greeting:write"])),
        ("only from this machine", key("local").allowed_ips(["127.0.0.0/8".parse()?])),
        ("two requests a minute", key("trial").rate_limits(two_a_minute)),
        ("one cent in total, which is two requests", key("capped").budget(one_cent)),
    ];
    for (plan, new) in plans {
        println!("{plan}:\n  {}", manager.issue(new).await?.expose_secret());
    }
    Ok(())
}

async fn stopped() {
    // If no signal handler can be installed, the server shuts down at once.
    let _ = tokio::signal::ctrl_c().await;
}
