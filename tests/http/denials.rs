//! What a caller over HTTP sees of a denial.

use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};
use tower::ServiceExt;
use tower_api_key::{
    ApiKeyAuthLayer, Denial, MemoryStore, StoreError,
    denial::{Forbidden, InvalidKey, UnrecognizedKey},
    middleware::{Credential, InvalidRealm, openai_error},
    record::{KeyRecord, User},
    store::Attribution,
    store::KeyRepository,
};

use crate::support::{
    Answer, Fixture, bearer, fixture, get, read, rule, send,
    stores::{Failing, Vouching},
    unknown_key, with_wrong_secret,
};

fn problem(answer: &Answer) -> Value {
    assert_eq!(answer.header("content-type"), Some("application/problem+json"));
    serde_json::from_str(&answer.body).unwrap()
}

fn challenges(answer: &Answer) -> Vec<&str> {
    let all = answer.response.headers().get_all("www-authenticate");
    all.iter().map(|value| value.to_str().unwrap()).collect()
}

fn denial(answer: &Answer) -> &Denial {
    answer.response.extensions().get().expect("the denial is in the extensions")
}

fn store_fails(error: StoreError) -> ApiKeyAuthLayer {
    ApiKeyAuthLayer::new(Failing(error))
}

/// The answer to a handler behind the layer that denies the request itself.
async fn denied_by_handler(layer: ApiKeyAuthLayer, denial: impl Into<Denial>) -> Answer {
    let denial = denial.into();
    let handler = || async move { Err::<(), Denial>(denial) };
    let router = axum::Router::new().route("/", axum::routing::any(handler)).layer(layer);
    let request = Request::new(axum::body::Body::empty());
    read(router.oneshot(request).await.unwrap()).await
}

/// Keys that are not valid now, each with the reason and its text in a verbose answer.
async fn invalid_keys(fixture: &Fixture) -> Vec<(String, InvalidKey, &'static str)> {
    let revoked = fixture.issue(|new| new).await;
    fixture.manager.revoke(&revoked.record().id).await.unwrap();
    let expired =
        fixture.issue(|new| new.expires_at("2020-01-01T00:00:00Z".parse().unwrap())).await;
    let early = fixture.issue(|new| new.not_before("2999-01-01T00:00:00Z".parse().unwrap())).await;
    let mut leaver = fixture.manager.create_user("leaver@example.com", "user").await.unwrap();
    let owner = leaver.id.clone();
    let orphaned = fixture.manager.issue(tower_api_key::NewKey::new(owner, "old")).await.unwrap();
    leaver.is_active = false;
    assert!(fixture.store.update_user(&leaver, &Attribution::default()).await.unwrap().is_some());

    let mut typo = fixture.key.clone();
    let last = if typo.pop() == Some('a') { 'b' } else { 'a' };
    typo.push(last);
    let unrecognized = InvalidKey::Unrecognized;
    vec![
        ("no-key-of-ours".into(), unrecognized(UnrecognizedKey::UnknownFormat), "format"),
        ("tak_test_x".into(), unrecognized(UnrecognizedKey::WrongShape), "environment"),
        ("x".repeat(513), unrecognized(UnrecognizedKey::TooLong), "512"),
        (typo, unrecognized(UnrecognizedKey::WrongCheck), "check"),
        (unknown_key(), InvalidKey::Unknown, "unknown"),
        (with_wrong_secret(&fixture.key), InvalidKey::WrongSecret, "secret"),
        (revoked.expose_secret().into(), InvalidKey::Revoked, "revoked"),
        (expired.expose_secret().into(), InvalidKey::Expired, "expired"),
        (early.expose_secret().into(), InvalidKey::NotYetValid, "not valid yet"),
        (orphaned.expose_secret().into(), InvalidKey::OwnerInactive, "owner"),
    ]
}

#[tokio::test]
async fn without_a_key_the_answer_is_401_with_a_challenge_that_names_no_error() {
    let fixture = fixture().await;
    let answer = send(&fixture.layer(), get(&[])).await;
    assert_eq!(answer.status(), 401);
    assert_eq!(challenges(&answer), [r#"Bearer realm="api""#]);
    let expected = json!({
        "type": "about:blank", "title": "Unauthorized", "status": 401,
        "detail": "an API key is required",
    });
    assert_eq!(problem(&answer), expected);
    assert_eq!(answer.header("retry-after"), None);
    assert!(matches!(denial(&answer), Denial::MissingCredential));
}

#[tokio::test]
async fn a_credential_that_breaks_the_grammar_is_answered_400_invalid_request() {
    let fixture = fixture().await;
    let two = [("authorization", &b"Bearer a"[..]), ("x-api-key", b"b")];
    for (request, detail) in [
        (get(&[("authorization", b"Bearer")]), "the credential is empty"),
        (get(&two), "the request carries two different credentials"),
    ] {
        let answer = send(&fixture.layer(), request).await;
        assert_eq!(answer.status(), 400);
        assert_eq!(challenges(&answer), [r#"Bearer realm="api", error="invalid_request""#]);
        let expected = json!({
            "type": "about:blank", "title": "Bad Request", "status": 400,
            "detail": detail, "error": "invalid_request",
        });
        assert_eq!(problem(&answer), expected);
        assert!(matches!(denial(&answer), Denial::MalformedCredential(_)));
    }
}

#[tokio::test]
async fn a_key_that_is_not_valid_is_answered_401_and_the_answer_does_not_say_why() {
    let fixture = fixture().await;
    let expected = json!({
        "type": "about:blank", "title": "Unauthorized", "status": 401,
        "detail": "the API key is not valid", "error": "invalid_token",
    });
    let mut answers = Vec::new();
    for (key, reason, _) in invalid_keys(&fixture).await {
        let answer = send(&fixture.layer(), bearer(&key)).await;
        assert_eq!(answer.status(), 401, "{reason:?}");
        assert_eq!(challenges(&answer), [r#"Bearer realm="api", error="invalid_token""#]);
        assert_eq!(problem(&answer), expected, "{reason:?}");
        assert!(matches!(denial(&answer), Denial::InvalidKey(found) if *found == reason));
        answers.push((answer.response.headers().clone(), answer.body));
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "the answers differ: {answers:?}");
}

#[tokio::test]
async fn a_verbose_layer_says_why_a_key_is_not_valid() {
    let fixture = fixture().await;
    let layer = fixture.layer().verbose();
    for (key, reason, word) in invalid_keys(&fixture).await {
        let answer = send(&layer, bearer(&key)).await;
        let detail = problem(&answer)["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(word), "{reason:?}: {detail}");
        let terse = send(&fixture.layer(), bearer(&key)).await;
        assert_eq!(problem(&terse)["detail"], "the API key is not valid");
    }
}

#[tokio::test]
async fn a_verbose_layer_says_nothing_of_the_insides_of_the_service() {
    for error in [StoreError::unavailable("db.internal:5432"), StoreError::bad_row("key 17")] {
        for layer in [store_fails(error.clone()), store_fails(error).verbose()] {
            let answer = send(&layer, bearer(&unknown_key())).await;
            for secret in ["db.internal", "17", "can't be reached"] {
                assert!(!answer.body.contains(secret), "{}", answer.body);
            }
        }
    }
}

#[tokio::test]
async fn a_valid_key_that_may_not_do_this_is_answered_403_without_a_challenge() {
    let fixture = fixture().await;
    let endpoint = fixture.issue(|new| new.allowed_endpoints([rule("POST /v1/chat")])).await;
    let network = "192.0.2.0/24".parse().unwrap();
    let address = fixture.issue(|new| new.allowed_ips([network])).await;
    for (key, reason, detail) in [
        (endpoint, Forbidden::Endpoint, "the API key may not call this endpoint"),
        (address, Forbidden::Address, "the API key may not be used from this address"),
    ] {
        let answer = send(&fixture.layer(), bearer(key.expose_secret())).await;
        assert_eq!(answer.status(), 403);
        assert!(challenges(&answer).is_empty());
        let expected = json!({
            "type": "about:blank", "title": "Forbidden", "status": 403, "detail": detail,
        });
        assert_eq!(problem(&answer), expected);
        assert!(matches!(denial(&answer), Denial::Forbidden(found) if *found == reason));
    }
}

#[tokio::test]
async fn a_missing_scope_is_named_in_the_challenge() {
    let layer = ApiKeyAuthLayer::new(MemoryStore::new()).optional().realm("acme").unwrap();
    let answer = denied_by_handler(layer, Forbidden::Scope("chat:write".into())).await;
    assert_eq!(answer.status(), 403);
    let challenge = r#"Bearer realm="acme", error="insufficient_scope", scope="chat:write""#;
    assert_eq!(challenges(&answer), [challenge]);
    assert_eq!(problem(&answer)["error"], "insufficient_scope");
}

#[tokio::test]
async fn a_scope_can_not_break_out_of_the_challenge() {
    let layer = ApiKeyAuthLayer::new(MemoryStore::new()).optional();
    let answer = denied_by_handler(layer, Forbidden::Scope("a\", b=\"\r\nx: \\é".into())).await;
    let challenge = r#"Bearer realm="api", error="insufficient_scope", scope="a\", b=\"x: \\""#;
    assert_eq!(challenges(&answer), [challenge]);
}

#[tokio::test]
async fn a_missing_permission_role_or_model_is_answered_403_without_a_challenge() {
    for (reason, word) in [
        (Forbidden::Permission("deploy".into()), "deploy"),
        (Forbidden::Role("admin".into()), "admin"),
        (Forbidden::Model("gpt-9".into()), "gpt-9"),
    ] {
        let layer = ApiKeyAuthLayer::new(MemoryStore::new()).optional();
        let answer = denied_by_handler(layer, reason).await;
        assert_eq!(answer.status(), 403);
        assert!(challenges(&answer).is_empty());
        assert!(problem(&answer)["detail"].as_str().unwrap().contains(word));
    }
}

#[tokio::test]
async fn a_store_out_of_reach_is_answered_503_and_says_when_to_come_again() {
    let answer =
        send(&store_fails(StoreError::unavailable("refused")), bearer(&unknown_key())).await;
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert!(challenges(&answer).is_empty());
    let expected = json!({
        "type": "about:blank", "title": "Service Unavailable", "status": 503,
        "detail": "API keys can't be checked right now; try again later",
    });
    assert_eq!(problem(&answer), expected);
}

#[tokio::test]
async fn retry_after_is_in_whole_seconds_rounded_up_and_never_zero() {
    for (wait, seconds) in
        [(0, "1"), (1, "1"), (1000, "1"), (1001, "2"), (2500, "3"), (60_000, "60")]
    {
        let error = StoreError::overloaded("busy", Duration::from_millis(wait));
        let answer = send(&store_fails(error), bearer(&unknown_key())).await;
        assert_eq!(answer.status(), 503);
        assert_eq!(answer.header("retry-after"), Some(seconds), "{wait} ms");
    }
}

#[tokio::test]
async fn a_bad_row_is_answered_500_without_a_reason_and_without_retry_after() {
    let answer = send(&store_fails(StoreError::bad_row("key 17")), bearer(&unknown_key())).await;
    assert_eq!(answer.status(), 500);
    assert_eq!(answer.header("retry-after"), None);
    let expected = json!({
        "type": "about:blank", "title": "Internal Server Error", "status": 500,
        "detail": "internal error",
    });
    assert_eq!(problem(&answer), expected);
}

#[tokio::test]
async fn a_realm_is_quoted_in_the_challenge() {
    let fixture = fixture().await;
    for (realm, quoted) in [
        ("acme", r#"Bearer realm="acme""#),
        (r#"the "A" \ B"#, r#"Bearer realm="the \"A\" \\ B""#),
        ("", r#"Bearer realm="""#),
    ] {
        let answer = send(&fixture.layer().realm(realm).unwrap(), get(&[])).await;
        assert_eq!(challenges(&answer), [quoted]);
    }
}

#[test]
fn a_realm_that_no_header_can_hold_is_rejected_when_the_layer_is_built() {
    let layer = ApiKeyAuthLayer::new(MemoryStore::new());
    for bad in ["a\r\nset-cookie: x", "caf\u{e9}", "\0", "\t", "\u{7f}", &"x".repeat(257)] {
        assert_eq!(layer.clone().realm(bad).unwrap_err(), InvalidRealm, "{bad:?}");
    }
    assert!(layer.realm(&"x".repeat(256)).is_ok());
    assert!(InvalidRealm.to_string().contains("256"));
}

#[tokio::test]
async fn basic_is_offered_only_where_it_is_accepted() {
    let fixture = fixture().await;
    let layer = fixture.layer().realm("acme").unwrap();
    let basic = layer.clone().credentials([Credential::bearer(), Credential::basic()]);
    let answer = send(&basic, get(&[])).await;
    let both = [r#"Bearer realm="acme""#, r#"Basic realm="acme", charset="UTF-8""#];
    assert_eq!(challenges(&answer), both);
    assert_eq!(challenges(&send(&layer, get(&[])).await).len(), 1);
    // The last list of credentials counts.
    let no_more = basic.credentials([Credential::bearer()]);
    assert_eq!(challenges(&send(&no_more, get(&[])).await).len(), 1);
}

#[tokio::test]
async fn the_openai_shape_is_the_one_that_its_clients_read() {
    let fixture = fixture().await;
    let layer = fixture.layer().on_denial(openai_error);
    let key = fixture.issue(|new| new.allowed_endpoints([rule("/v1/*")])).await;
    let down = store_fails(StoreError::unavailable("refused")).on_denial(openai_error);
    let broken = store_fails(StoreError::bad_row("key 17")).on_denial(openai_error);
    let invalid = "invalid_request_error";
    for (layer, request, status, kind, code) in [
        (&layer, get(&[]), 401, invalid, Value::Null),
        (&layer, get(&[("x-api-key", b" ")]), 400, invalid, "invalid_request".into()),
        (&layer, bearer("nonsense"), 401, invalid, "invalid_api_key".into()),
        (
            &layer,
            bearer(key.expose_secret()),
            403,
            "permission_error",
            "insufficient_permissions".into(),
        ),
        (&down, bearer(&unknown_key()), 503, "server_error", "service_unavailable".into()),
        (&broken, bearer(&unknown_key()), 500, "server_error", Value::Null),
    ] {
        let answer = send(layer, request).await;
        assert_eq!(answer.status(), status);
        assert_eq!(answer.header("content-type"), Some("application/json"));
        let body: Value = serde_json::from_str(&answer.body).unwrap();
        let message = body["error"]["message"].clone();
        assert!(!message.as_str().unwrap().is_empty());
        let error = json!({ "message": message, "type": kind, "param": null, "code": code });
        assert_eq!(body, json!({ "error": error }));
        assert_eq!(challenges(&answer).len(), usize::from(matches!(status, 400 | 401)));
        assert_eq!(answer.header("retry-after").is_some(), status == 503);
    }
    let model = denied_by_handler(layer.optional(), Forbidden::Model("gpt-9".into())).await;
    assert_eq!(model.status(), 403);
    assert!(model.body.contains(r#""code":"model_not_allowed""#), "{}", model.body);
}

#[tokio::test]
async fn a_responder_of_one_s_own_sees_the_request_and_has_the_last_word() {
    let fixture = fixture().await;
    let layer = fixture.layer().on_denial(|denial| {
        let (method, uri, status) = (denial.method(), denial.uri(), denial.status());
        let text = format!("{method} {uri} {status} {} {}", denial.denial(), denial.detail());
        let mut response = Response::new(Bytes::from(text));
        *response.status_mut() = StatusCode::NOT_FOUND;
        response
    });
    let mut request = bearer(&unknown_key());
    *request.method_mut() = Method::PUT;
    *request.uri_mut() = "/v1/models?a=b".parse().unwrap();
    let answer = send(&layer, request).await;
    assert_eq!(answer.status(), 404);
    let (denial_text, detail) = ("the API key is unknown", "the API key is not valid");
    let head = "PUT /v1/models?a=b 401 Unauthorized";
    assert_eq!(answer.body, format!("{head} {denial_text} {detail}"));
    assert!(matches!(denial(&answer), Denial::InvalidKey(InvalidKey::Unknown)));
}

#[tokio::test]
async fn a_responder_may_start_from_the_default_response() {
    let fixture = fixture().await;
    let layer = fixture.layer().on_denial(|denial| {
        let mut response = denial.default_response();
        response.headers_mut().insert("x-request-id", "7".parse().unwrap());
        response
    });
    let answer = send(&layer, get(&[])).await;
    assert_eq!(problem(&answer)["status"], 401);
    assert_eq!(challenges(&answer).len(), 1);
    assert_eq!(answer.header("x-request-id"), Some("7"));
}

#[tokio::test]
async fn a_head_request_is_denied_without_a_body() {
    let fixture = fixture().await;
    let own = fixture.layer().on_denial(|denial| denial.respond_with("text/plain", "no"));
    for (layer, content_type) in
        [(fixture.layer(), "application/problem+json"), (own, "text/plain")]
    {
        for key in ["nonsense", &unknown_key()] {
            let mut request: Request<Full<Bytes>> = bearer(key);
            *request.method_mut() = Method::HEAD;
            let answer = send(&layer, request).await;
            assert_eq!(answer.status(), 401);
            assert_eq!(answer.body, "");
            assert_eq!(answer.header("content-type"), Some(content_type));
            assert_eq!(challenges(&answer).len(), 1);
            let body = send(&layer, bearer(key)).await.body;
            assert_ne!(body, "", "a GET has one");
        }
    }
}

#[tokio::test]
async fn a_request_that_is_let_in_carries_no_denial() {
    let record = KeyRecord::new(1, "p", User::new(1, "a@b.c"));
    let answer = send(&ApiKeyAuthLayer::new(Vouching(record)), bearer(&unknown_key())).await;
    assert_eq!((answer.status(), &*answer.body), (200, "a@b.c"));
    assert!(answer.response.extensions().get::<Denial>().is_none());
}
