//! The outcome of a request in one word, and tables of requests.

use tower_api_key::ApiKeyAuthLayer;

use super::{Answer, Fixture, get, send};

/// The outcome for a caller, by status and challenge together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AuthOutcome {
    /// 200 with the owner's e-mail address.
    Passes,
    /// 200 without a caller.
    Anonymous,
    /// 401 without an error code.
    NoCredential,
    /// 400 `invalid_request`.
    InvalidRequest,
    /// 401 `invalid_token`.
    InvalidToken,
}
pub use AuthOutcome::{Anonymous, InvalidRequest, InvalidToken, NoCredential, Passes};

pub fn auth_outcome(answer: &Answer) -> AuthOutcome {
    match (answer.status(), answer.header("www-authenticate")) {
        (200, None) if answer.body == "ada@example.com" => Passes,
        (200, None) if answer.body == "-" => Anonymous,
        (401, Some("Bearer realm=\"api\"")) => NoCredential,
        (401, Some("Bearer realm=\"api\", error=\"invalid_token\"")) => InvalidToken,
        (400, Some("Bearer realm=\"api\", error=\"invalid_request\"")) => InvalidRequest,
        _ => panic!("{answer:?}"),
    }
}

/// Header fields in which `KEY` stands for the valid key, `OTHER` for a valid key of the same user.
pub type Fields = &'static [(&'static str, &'static str)];

/// Sends each of the requests, and checks the outcome.
pub async fn check(layer: &ApiKeyAuthLayer, setting: &Fixture, table: &[(Fields, AuthOutcome)]) {
    let other = setting.issue(|new| new).await;
    for (fields, expected) in table {
        let spell =
            |text: &str| text.replace("OTHER", other.expose_secret()).replace("KEY", &setting.key);
        let fields: Vec<_> = fields.iter().map(|(name, value)| (*name, spell(value))).collect();
        let request: Vec<_> = fields.iter().map(|(name, v)| (*name, v.as_bytes())).collect();
        assert_eq!(auth_outcome(&send(layer, get(&request)).await), *expected, "{fields:?}");
    }
}

pub const A: &str = "authorization";
pub const X: &str = "x-api-key";
