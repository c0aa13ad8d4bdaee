//! No key, hash, pepper or password is in a `Debug` or a log line.

use std::{
    fmt::Debug,
    sync::{Arc, Mutex},
    time::Duration,
};

use tower::{Layer, service_fn};
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, Denial, KeyManager, KeyScheme, MemoryStore, NewKey,
    PostgresStore, SqliteStore, StoreError,
    key::{KeyFormat, KeyHash},
    middleware::{Credential, RequestHead},
    record::{KeyRecord, User},
    store::{
        Answer, Attribution, CacheSecret, DynKeyStore, KeyRepository, KeyStore, Lookup, StoredKey,
    },
};

use crate::support::{
    self, Fixture, bearer, fixture, get, log, rule, send, stores::Failing, unknown_key,
    with_wrong_secret,
};

/// Neither shape of `Debug` shows any of the secrets, as text or as bytes.
#[track_caller]
fn assert_hides(value: impl Debug, secrets: &[&str]) {
    let (flat, pretty) = (format!("{value:?}"), format!("{value:#?}"));
    let unbroken: String = pretty.chars().filter(|c| !c.is_whitespace()).collect();
    for secret in secrets {
        let mut shapes = vec![(*secret).to_owned(), listed(secret.as_bytes())];
        shapes.extend(unhex(secret).map(|digest| listed(&digest)));
        let shows = |shape: &String| [&flat, &pretty, &unbroken].iter().any(|t| t.contains(shape));
        assert!(!shapes.iter().any(shows), "{secret:?} is in {flat}");
    }
}

/// Bytes as `Debug` lists them, without white space.
fn listed(bytes: &[u8]) -> String {
    bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(",")
}

/// The digest that hex digits stand for.
fn unhex(text: &str) -> Option<Vec<u8>> {
    let is_digest = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).ok();
    is_digest.then(|| (0..text.len()).step_by(2).filter_map(byte).collect())
}

/// The key, and its secret part.
fn secrets(key: &str) -> [&str; 2] {
    [key, &key[key.len() - 28..key.len() - 6]]
}

#[test]
#[should_panic = "hunter2 is no secret"]
fn a_secret_that_shows_is_found() {
    assert_hides(Some("hunter2 is no secret"), &["hunter2 is no secret"]);
}

#[test]
#[should_panic = "hunter2 is no secret"]
fn a_secret_that_shows_byte_by_byte_is_found() {
    assert_hides(b"hunter2 is no secret", &["hunter2 is no secret"]);
}

#[test]
#[should_panic = "abababab"]
fn a_digest_that_shows_byte_by_byte_is_found() {
    assert_hides([0xAB_u8; 32], &[&"ab".repeat(32)]);
}

#[tokio::test]
async fn an_issued_key_and_what_is_stored_of_it_hide_the_key_and_its_hash() {
    let fixture = fixture().await;
    let issued = fixture.issue(|new| new.scopes(["a"])).await;
    assert_hides(&issued, &secrets(issued.expose_secret()));
    assert!(format!("{issued:?}").contains(&issued.record().prefix));

    let hash = KeyHash::sha256(issued.expose_secret()).expose_hash();
    let digest = hash.strip_prefix("sha256$").unwrap();
    for secret in [&*hash, digest, issued.expose_secret()] {
        assert_hides(&fixture.store, &[secret]);
        assert_hides(&fixture.manager, &[secret]);
        assert_hides(DynKeyStore::new(fixture.store.clone()), &[secret]);
    }
}

#[test]
fn a_minted_key_shows_its_lookup_id_alone() {
    let minted = KeyScheme::default().mint().unwrap();
    let hash = minted.hash().expose_hash();
    assert_hides(&minted, &secrets(minted.expose_secret()));
    assert_hides(&minted, &[&*hash, hash.strip_prefix("sha256$").unwrap()]);
    assert!(format!("{minted:?}").contains(minted.lookup_id()));
}

#[test]
fn a_hash_shows_its_kind_alone() {
    let key = unknown_key();
    let sha256 = KeyHash::sha256(&key);
    let bcrypt = KeyHash::bcrypt(&key, 4).unwrap();
    let prehashed = KeyHash::bcrypt(&"x".repeat(80), 4).unwrap();
    let pepper = format!("hmac-sha256$01020304${}", "ab".repeat(32)).parse::<KeyHash>().unwrap();
    for hash in [sha256, bcrypt, prehashed, pepper] {
        let text = hash.expose_hash();
        let last = text.rsplit('$').next().unwrap();
        assert_hides(&hash, &[&text, last]);
        let record = KeyRecord::new(1, "p", User::new(1, "a@b.c"));
        let stored = StoredKey::new(record, hash.clone()).with_upgrade(hash);
        assert_hides(stored, &[&text, last]);
    }
}

#[test]
fn a_text_that_is_no_hash_is_not_in_the_error() {
    for text in ["hunter2hunter2", "$2b$10$hunter2hunter2", "sha256$hunter2hunter2", "$1$hunter2"] {
        let error = text.parse::<KeyHash>().unwrap_err();
        assert_hides(error, &["hunter2"]);
        assert!(!error.to_string().contains("hunter2"), "{error}");
        let error = StoreError::from(error);
        assert_hides(&error, &["hunter2"]);
        assert_hides(Denial::from(error), &["hunter2"]);
    }
}

const MINT: &str = "mint secret of sixteen bytes";
const OLD_MINT: &str = "old mint secret of sixteen bytes";
const PEPPER: &str = "pepper of sixteen bytes";
const OLD_PEPPER: &str = "old pepper of sixteen bytes";

#[tokio::test]
async fn mint_secrets_and_peppers_show_nowhere() {
    let all = [MINT, OLD_MINT, PEPPER, OLD_PEPPER];
    let format = KeyFormat::structured("acme", "live").unwrap().with_mint_secret(MINT).unwrap();
    let format = format.with_retired_mint_secret(OLD_MINT).unwrap();
    assert_hides(&format, &all);
    let builder = KeyScheme::builder().format(format).pepper(PEPPER).retired_pepper(OLD_PEPPER);
    assert_hides(&builder, &all);
    let scheme = builder.build().unwrap();
    assert_hides(&scheme, &all);

    let store = MemoryStore::new();
    let builder = Authenticator::builder(store.clone()).scheme(scheme.clone());
    assert_hides(&builder, &all);
    let authenticator = builder.build();
    assert_hides(&authenticator, &all);
    let layer = ApiKeyAuthLayer::from(authenticator);
    assert_hides(&layer, &all);
    assert_hides(layer.layer("an inner service"), &all);
    assert_hides(KeyManager::new(store).scheme(scheme), &all);
}

#[test]
fn a_cache_secret_shows_its_id_alone() {
    let secret = CacheSecret::new(7, *b"0123456789abcdef0123456789abcdef");
    assert_hides(&secret, &["0123456789abcdef0123456789abcdef"]);
    assert!(format!("{secret:?}").contains('7'));
}

/// Prints each question and its answer.
#[derive(Clone)]
struct Spy(MemoryStore, Arc<Mutex<Vec<String>>>);

impl KeyStore for Spy {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let answer = self.0.resolve(lookup).await?;
        let upgrade = answer.upgrade();
        let printed =
            format!("{lookup:?} {lookup:#?} {answer:?} {answer:#?} {upgrade:?} {upgrade:#?}");
        self.1.lock().unwrap().push(printed);
        Ok(answer)
    }
}

#[tokio::test]
async fn a_question_and_its_answer_hide_the_key() {
    let store = MemoryStore::new();
    let user = support::some_user(store.clone()).await;
    let scheme = KeyScheme::builder()
        .format(KeyFormat::first_chars(8).unwrap())
        .pepper(PEPPER)
        .upgrade_hashes()
        .build()
        .unwrap();
    let (key, bytes) = ("prefix01-the-rest-of-an-old-key", "116, 104, 101, 45, 114");
    let hash = KeyHash::bcrypt(key, 4).unwrap();
    let record = KeyRecord::new(0, "prefix01", User::new(user, ""));
    store.insert_key(&StoredKey::new(record, hash.clone()), &Attribution::default()).await.unwrap();

    let spy = Spy(store, Arc::default());
    let authenticator = Authenticator::builder(spy.clone()).scheme(scheme).build();
    let caller = authenticator.authenticate(key).await.unwrap();
    assert_hides(&caller, &[key, "the-rest", &hash.expose_hash()]);
    authenticator.authenticate("prefix01-the-rest-is-wrong").await.unwrap_err();
    authenticator.authenticate("prefix02-the-rest-of-another").await.unwrap_err();

    let printed = spy.1.lock().unwrap().clone();
    assert_eq!(printed.len(), 3);
    assert!(printed[0].contains("HashUpgrade"), "there is an upgrade: {}", printed[0]);
    for text in printed {
        assert!(text.contains("prefix0"), "{text}");
        for secret in ["the-rest", bytes, "hmac-sha256$", &hash.expose_hash(), PEPPER] {
            assert!(!text.contains(secret), "{secret} is in {text}");
        }
    }
}

#[tokio::test]
async fn a_context_and_a_denial_hide_the_key() {
    let fixture = fixture().await;
    let authenticator = Authenticator::new(fixture.store.clone());
    let caller = authenticator.authenticate(&fixture.key).await.unwrap();
    assert_hides(&caller, &secrets(&fixture.key));
    assert_hides(caller.key(), &secrets(&fixture.key));
    let (wrong, unknown) = (with_wrong_secret(&fixture.key), unknown_key());
    let typo = format!("{}!", &fixture.key[..fixture.key.len() - 1]);
    let long = format!("{}{}", fixture.key, "x".repeat(600));
    for key in [&*wrong, &unknown, &typo, &long, "hunter2 hunter2", "hunter2\u{e9}"] {
        let denial = authenticator.authenticate(key).await.unwrap_err();
        let secret = if key.len() > 40 { &key[20..40] } else { "hunter2" };
        assert_hides(&denial, &[key, secret]);
        assert!(!denial.to_string().contains(secret), "{denial}");
    }
}

/// What `print` says of a request that carries the key in the header and in the query.
async fn printed(
    fixture: &Fixture,
    layer: impl FnOnce(ApiKeyAuthLayer, Arc<Mutex<String>>) -> ApiKeyAuthLayer,
) -> String {
    let printed = Arc::new(Mutex::new(String::new()));
    let layer = layer(fixture.layer(), Arc::clone(&printed));
    let wrong = with_wrong_secret(&fixture.key);
    let mut request = bearer(&wrong);
    *request.uri_mut() = format!("/v1?key={wrong}").parse().unwrap();
    assert_eq!(send(&layer, request).await.status(), 401);
    let printed = printed.lock().unwrap().clone();
    assert!(!printed.is_empty());
    for secret in secrets(&wrong) {
        assert!(!printed.contains(secret), "{secret} is in {printed}");
    }
    printed
}

#[tokio::test]
async fn the_head_of_a_request_hides_the_header_fields_that_may_hold_a_key() {
    let fixture = fixture().await;
    let print = |layer: ApiKeyAuthLayer, printed: Arc<Mutex<String>>| {
        layer.skip(move |head: &RequestHead<'_>| {
            // Without the query, which is not what this test is about.
            let mut bare = http::Request::new(());
            *bare.headers_mut() = head.headers().clone();
            *printed.lock().unwrap() = format!("{:?}", RequestHead::of(&bare));
            false
        })
    };
    printed(&fixture, print).await;
}

#[tokio::test]
async fn a_denial_hides_the_query_that_a_key_may_stand_in() {
    let fixture = fixture().await;
    let print = |layer: ApiKeyAuthLayer, printed: Arc<Mutex<String>>| {
        layer.on_denial(move |denial_of| {
            *printed.lock().unwrap() = format!("{denial_of:?}");
            denial_of.default_response()
        })
    };
    printed(&fixture, print).await;
}

#[tokio::test]
async fn a_key_that_stays_in_the_request_is_marked_so_that_debug_hides_it() {
    let fixture = fixture().await;
    let inner =
        service_fn(|request: http::Request<http_body_util::Full<bytes::Bytes>>| async move {
            assert_eq!(request.headers().len(), 1);
            let printed = format!("{:?}", request.headers());
            Ok::<_, std::convert::Infallible>(http::Response::new(http_body_util::Full::new(
                bytes::Bytes::from(printed),
            )))
        });
    let service = fixture.layer().mark_sensitive().layer(inner);
    let request = bearer(&fixture.key);
    let answer = support::read(tower::ServiceExt::oneshot(service, request).await.unwrap()).await;
    assert!(answer.body.contains("authorization"), "{}", answer.body);
    assert!(!answer.body.contains(&fixture.key), "{}", answer.body);
}

#[tokio::test]
async fn a_postgres_password_shows_nowhere() {
    // A port that nobody listens on.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("postgres://app:hunter2@127.0.0.1:{port}/app?sslmode=disable");
    let builder = PostgresStore::builder(&url).connect_timeout(Duration::from_secs(1));
    assert_hides(&builder, &["hunter2"]);
    let store = builder.build().unwrap();
    assert_hides(&store, &["hunter2"]);

    let (log, _guard) = log::capture();
    let layer = ApiKeyAuthLayer::new(store.clone()).verbose();
    let answer = send(&layer, bearer(&unknown_key())).await;
    assert_eq!(answer.status(), 503);
    assert_hides(answer.response.extensions().get::<Denial>().unwrap(), &["hunter2"]);
    assert!(!answer.body.contains("hunter2"), "{}", answer.body);
    let error = store.migrate().await.unwrap_err();
    assert_hides(&error, &["hunter2"]);
    assert!(!error.to_string().contains("hunter2"), "{error}");
    assert!(log.text().contains("WARN"), "the outage is logged");
    assert!(!log.text().contains("hunter2"), "{}", log.text());
}

#[test]
fn a_postgres_url_that_can_not_be_used_is_not_in_the_error() {
    for url in [
        "postgres://app:hunter2@db:port/app",
        "postgres://app:hunter2@db/app?sslmode=hunter2",
        "postgres://app:hunter2@db/app?hunter2=1",
        "postgres://app:hunter2@db/app?connect_timeout=hunter2",
        "postgres://app:hunter2@[::/app",
        "postgres://app:hunter2%zz@db/app",
        "postgres://app:hunter2@db/app?sslmode=verify-full&sslrootcert=/no/such/file",
        "mysql://app:hunter2@db/app",
        "host=db password=hunter2",
    ] {
        let Err(error) = PostgresStore::new(url) else { continue };
        assert_hides(&error, &["hunter2"]);
        let mut cause: Option<&dyn std::error::Error> = Some(&error);
        while let Some(error) = cause {
            assert!(!error.to_string().contains("hunter2"), "{error}");
            cause = error.source();
        }
    }
    let is_denied = |url| PostgresStore::new(url).is_err();
    assert!(is_denied("postgres://app:hunter2@db:port/app") && is_denied("mysql://app:hunter2@db"));
}

/// Everything that can happen to a key, over any store.
async fn exercise<R: KeyRepository + Clone>(repository: R, keys: &mut Vec<String>) {
    let manager = KeyManager::new(repository.clone());
    let user = support::some_user(repository.clone()).await;
    let mut issue = async |change: fn(NewKey) -> NewKey| {
        let issued = manager.issue(change(NewKey::new(user.clone(), "k"))).await.unwrap();
        keys.push(issued.expose_secret().to_owned());
        issued
    };
    let good = issue(|new| new).await;
    let revoked = issue(|new| new).await;
    manager.revoke(&revoked.record().id).await.unwrap();
    let ruled = issue(|new| new.allowed_endpoints([rule("/elsewhere")])).await;
    let bound = issue(|new| new.allowed_ips(["192.0.2.1".parse().unwrap()])).await;
    let wrong = with_wrong_secret(good.expose_secret());
    let layer = ApiKeyAuthLayer::new(repository);
    let issued = [&good, &revoked, &ruled, &bound].map(|key| key.expose_secret().to_owned());
    let statuses = [200, 401, 403, 403, 401, 401, 400];
    let typo = format!("{}!", good.expose_secret());
    for (key, status) in issued.into_iter().chain([wrong, unknown_key(), typo]).zip(statuses) {
        assert_eq!(send(&layer, bearer(&key)).await.status(), status);
        keys.push(key);
    }
    let twice =
        [("authorization", format!("Bearer {}", good.expose_secret())), ("x-api-key", "b".into())];
    let twice = twice.each_ref().map(|(name, value)| (*name, value.as_bytes()));
    assert_eq!(send(&layer, get(&twice)).await.status(), 400);
    let basic = layer.credentials([Credential::basic()]);
    assert_eq!(send(&basic, get(&[("authorization", b"Basic %%%hunter2")])).await.status(), 400);
    let down = ApiKeyAuthLayer::new(Failing(StoreError::unavailable("refused")));
    assert_eq!(send(&down, bearer(good.expose_secret())).await.status(), 503);
}

#[tokio::test]
async fn no_log_line_holds_a_key_whatever_becomes_of_the_request() {
    let (log, _guard) = log::capture();
    let mut keys = Vec::new();
    exercise(MemoryStore::new(), &mut keys).await;
    let sqlite = SqliteStore::in_memory().unwrap();
    sqlite.migrate().await.unwrap();
    exercise(sqlite, &mut keys).await;

    let text = log.text();
    assert!(text.contains("the API key was revoked") && text.contains("WARN"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
    for key in &keys {
        let hash = KeyHash::sha256(key).expose_hash();
        for secret in [&**key, &key[key.len() - 28..key.len() - 6], &hash["sha256$".len()..]] {
            assert!(!text.contains(secret), "{secret} is in {text}");
        }
    }
}
