//! OpenAI-compatible gateway for a model that echoes the prompt: keys, allowed models, rate limits and budgets, in
//! the formats that the `openai` client libraries expect.
//!
//! `cargo run --example llm_gateway`; `ADDR` (default `127.0.0.1:3000`) and `DATABASE_URL` (a file, default
//! `llm_gateway.db`) are read from the environment. On the first start it prints a key for each plan.

use std::{collections::VecDeque, convert::Infallible, env, error::Error};

use axum::{
    Json, Router,
    extract::rejection::JsonRejection,
    http::StatusCode,
    response::{IntoResponse, Response, Sse, sse::Event},
    routing::{get, post},
};
use futures_util::stream;
use serde::Deserialize;
use serde_json::{Value, json};
use tower::ServiceBuilder;
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, Denial, KeyManager, NewKey, RateLimitLayer,
    RequireLayer, SqliteStore,
    metering::{Reservation, Usage},
    middleware::openai_error,
    rate_limit::LocalRateLimiter,
    record::{Budget, BudgetPeriod, RateLimits},
    store::{KeyRepository, ListKeys},
};

/// Names of models, and prices in micro-cents per token.
const MODELS: [(&str, u64); 2] = [("echo-small", 50), ("echo-large", 500)];
const DEFAULT_MAX_TOKENS: usize = 256;
const MAX_TOKENS: usize = 100_000;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt().init();
    let address = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let file = env::var("DATABASE_URL").unwrap_or_else(|_| "llm_gateway.db".to_owned());

    let store = SqliteStore::open(&file)?;
    store.migrate().await?;
    if store.list_keys(&ListKeys::default()).await?.keys.is_empty() {
        issue_keys(store.clone()).await?;
    }

    let authenticator = Authenticator::new(store);
    let guards = ServiceBuilder::new()
        .layer(ApiKeyAuthLayer::from(authenticator.clone()).on_denial(openai_error))
        .layer(RateLimitLayer::new(LocalRateLimiter::new()));
    let app = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/chat/completions", post(complete).layer(RequireLayer::scope("chat:write")))
        .layer(guards);
    let listener = tokio::net::TcpListener::bind(&address).await?;
    println!("Listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).with_graceful_shutdown(stopped()).await?;
    // Writes the usage of the last second.
    authenticator.shutdown().await;
    Ok(())
}

/// Issues a key for each plan and prints it once.
async fn issue_keys(store: SqliteStore) -> Result<(), Box<dyn Error>> {
    let manager = KeyManager::new(store);
    let user = manager.create_user("ada@example.com", "user").await?;
    let key = |name: &str| NewKey::new(user.id.clone(), name).scopes(["chat:*"]);
    let two_a_minute = RateLimits::default().per_minute(2);
    let plans = [
        ("everything", key("everything")),
        ("only echo-small", key("small").allowed_models(["echo-small"])),
        ("two requests a minute", key("trial").rate_limits(two_a_minute)),
        ("a cent a day", {
            key("capped").budget(Budget { limit_cents: 1, period: BudgetPeriod::Daily })
        }),
        ("no chat", NewKey::new(user.id.clone(), "reader").scopes(["models:read"])),
    ];
    for (plan, new) in plans {
        println!("{plan}:\n  {}", manager.issue(new).await?.expose_secret());
    }
    Ok(())
}

async fn models(caller: AuthContext) -> Json<Value> {
    let models = MODELS.iter().filter(|(name, _)| caller.can_access_model(name));
    let model = |(name, _): &(&str, u64)| json!({ "id": name, "object": "model", "created": 0, "owned_by": "echo" });
    Json(json!({ "object": "list", "data": models.map(model).collect::<Vec<_>>() }))
}

#[derive(Deserialize)]
struct ChatRequest {
    model: String,
    messages: Vec<Message>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    #[serde(default)]
    stream: bool,
    #[serde(default)]
    stream_options: StreamOptions,
}

#[derive(Deserialize, Default)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<Content>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    text: String,
}

impl Message {
    fn text(&self) -> String {
        match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => parts.iter().map(|part| part.text.as_str()).collect(),
        }
    }
}

async fn complete(
    caller: AuthContext,
    chat: Result<Json<ChatRequest>, JsonRejection>,
) -> Result<Response, GatewayError> {
    let Json(chat) = chat.map_err(|rejection| GatewayError::Request(rejection.body_text()))?;
    caller.require_model(&chat.model)?;
    let Some((_, price)) = MODELS.iter().find(|(name, _)| *name == chat.model) else {
        return Err(GatewayError::NoSuchModel(chat.model));
    };
    let messages: Vec<_> = chat.messages.iter().map(Message::text).collect();
    let prompt_tokens = messages.iter().map(|text| text.split_whitespace().count()).sum();
    let prompt = messages.last().map_or("", String::as_str);
    let max_tokens = chat.max_completion_tokens.or(chat.max_tokens).unwrap_or(DEFAULT_MAX_TOKENS);
    if max_tokens > MAX_TOKENS {
        return Err(GatewayError::Request(format!("max_tokens must be at most {MAX_TOKENS}")));
    }

    // Holds the maximum cost before the model runs.
    let max_cost = (max_tokens.saturating_add(prompt_tokens) as u64).saturating_mul(*price);
    let reservation = caller.reserve(max_cost).await?;
    let mut words: VecDeque<_> = prompt.split_inclusive(' ').map(str::to_owned).collect();
    let finish_reason = if words.len() > max_tokens { "length" } else { "stop" };
    words.truncate(max_tokens);
    let answer = Answer {
        words,
        finish_reason,
        model: chat.model,
        includes_usage: chat.stream_options.include_usage,
        prompt_tokens,
        completion_tokens: 0,
        price: *price,
        caller,
        reservation: Some(reservation),
    };
    Ok(if chat.stream { answer.streamed().into_response() } else { answer.whole().into_response() })
}

/// Answer that is being sent. If it is dropped before its last word, because the client has disconnected, the
/// reservation charges the estimate.
struct Answer {
    words: VecDeque<String>,
    finish_reason: &'static str,
    model: String,
    includes_usage: bool,
    prompt_tokens: usize,
    completion_tokens: usize,
    price: u64,
    caller: AuthContext,
    reservation: Option<Reservation>,
}

impl Answer {
    fn whole(mut self) -> Json<Value> {
        let text: String = std::iter::from_fn(|| self.next_word()).collect();
        self.settle();
        Json(json!({
            "id": "chatcmpl-echo", "object": "chat.completion", "created": 0, "model": self.model,
            "choices": [{
                "index": 0,
                "message": { "role": "assistant", "content": text },
                "finish_reason": self.finish_reason,
            }],
            "usage": self.usage(),
        }))
    }

    fn streamed(self) -> impl IntoResponse {
        let chunks = stream::unfold(Some(self), |answer| async move {
            let mut answer = answer?;
            let mut chunk = json!({
                "id": "chatcmpl-echo", "object": "chat.completion.chunk", "created": 0,
                "model": answer.model, "choices": [],
            });
            let word = answer.next_word();
            let is_last = answer.words.is_empty();
            if is_last {
                answer.settle();
            }
            if let Some(word) = word {
                chunk["choices"] = json!([{
                    "index": 0,
                    "delta": { "role": "assistant", "content": word },
                    "finish_reason": is_last.then_some(answer.finish_reason),
                }]);
            } else if std::mem::take(&mut answer.includes_usage) {
                chunk["usage"] = answer.usage();
            } else {
                return Some((Event::default().data("[DONE]"), None));
            }
            Some((Event::default().data(chunk.to_string()), Some(answer)))
        });
        Sse::new(futures_util::StreamExt::map(chunks, Ok::<_, Infallible>))
    }

    fn next_word(&mut self) -> Option<String> {
        let word = self.words.pop_front()?;
        self.completion_tokens += 1;
        Some(word)
    }

    /// Settles the reservation with the actual cost, once.
    fn settle(&mut self) {
        let tokens = (self.prompt_tokens + self.completion_tokens) as u64;
        if let Some(reservation) = self.reservation.take() {
            reservation.settle(tokens * self.price);
            self.caller.record_usage(Usage::tokens(tokens));
        }
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

enum GatewayError {
    /// The layer formats it like its own denials.
    Denied(Denial),
    Request(String),
    NoSuchModel(String),
}

impl From<Denial> for GatewayError {
    fn from(denial: Denial) -> Self {
        Self::Denied(denial)
    }
}

impl IntoResponse for GatewayError {
    fn into_response(self) -> Response {
        let (status, message, code) = match self {
            Self::Denied(denial) => return denial.into_response(),
            Self::Request(message) => (StatusCode::BAD_REQUEST, message, "invalid_request"),
            Self::NoSuchModel(model) => {
                let message = format!("the model {model:?} does not exist");
                (StatusCode::NOT_FOUND, message, "model_not_found")
            }
        };
        let error = json!({
            "message": message, "type": "invalid_request_error", "param": null, "code": code,
        });
        (status, Json(json!({ "error": error }))).into_response()
    }
}

async fn stopped() {
    // If no signal handler can be installed, the server shuts down at once.
    let _ = tokio::signal::ctrl_c().await;
}
