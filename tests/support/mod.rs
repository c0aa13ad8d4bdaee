//! What several test files use. Each uses a part of it.
#![allow(dead_code, unused_imports, unused_macros, unreachable_pub, missing_docs)]

pub mod alone;
pub mod auth_outcome;
pub mod checks;
pub mod counted;
pub mod database;
pub mod eventually;
pub mod every_store;
pub mod feed;
pub mod fleet;
pub mod history;
pub mod key_checker;
pub mod leaks;
pub mod log;
pub mod probe;
pub mod proxy;
pub mod scripted;
pub mod servers;
pub mod stores;
pub mod wire;

use std::{convert::Infallible, sync::Arc, time::SystemTime};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tower::{Service, ServiceExt, service_fn};
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, KeyManager, KeyScheme, MemoryStore, NewKey,
    clock::ManualClock,
    error::StoreError,
    key::{KeyFormat, KeyHash, KeySchemeBuilder},
    management::IssuedKey,
    record::{KeyRecord, Revision, Revisions, UserId},
    store::{Attribution, Change, KeyRepository, StoredKey},
};

/// The manager, with a clock that reads 1970: it issues keys that have expired.
pub fn from_the_past<R: KeyRepository + Clone>(manager: &KeyManager<R>) -> KeyManager<R> {
    manager.clone().clock(Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH)))
}

/// Sets the editable fields of a key, if the row has the expected revision.
pub async fn edit_key(
    store: &impl KeyRepository,
    record: &KeyRecord,
    expected: Option<Revision>,
) -> Result<Option<Change>, StoreError> {
    let Some(old) = store.find_key(&record.id).await? else { return Ok(None) };
    let (kept, mut record) = (old.record(), record.clone());
    record.user.clone_from(&kept.user);
    record.prefix.clone_from(&kept.prefix);
    record.is_active = kept.is_active;
    record.last_used_at = kept.last_used_at;
    let old = match expected {
        Some(key) => old.clone().with_revisions(Revisions { key, ..old.revisions() }),
        None => old,
    };
    let new = old.clone().with_record(record);
    let replaced = store.replace_key(&old, &new, &Attribution::default()).await?;
    Ok(replaced.map(|it| Change::Prefix(it.prefix, it.revision)))
}

/// A store with a user and one key of theirs that may do everything.
pub struct Fixture {
    pub store: MemoryStore,
    pub manager: KeyManager<MemoryStore>,
    pub user: UserId,
    pub key: String,
}

pub async fn fixture() -> Fixture {
    let store = MemoryStore::new();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "admin").await.unwrap().id;
    let issued = manager.issue(NewKey::new(user.clone(), "laptop")).await.unwrap();
    Fixture { store, manager, user, key: issued.expose_secret().to_owned() }
}

impl Fixture {
    pub async fn issue(&self, change: impl FnOnce(NewKey) -> NewKey) -> IssuedKey {
        let manager = from_the_past(&self.manager);
        manager.issue(change(NewKey::new(self.user.clone(), "another"))).await.unwrap()
    }

    pub fn layer(&self) -> ApiKeyAuthLayer {
        ApiKeyAuthLayer::new(self.store.clone())
    }
}

/// A user in any repository.
pub async fn some_user(repository: impl KeyRepository) -> UserId {
    KeyManager::new(repository).create_user("ada@example.com", "admin").await.unwrap().id
}

/// Keys `PREFIX-of-mine`, one for each prefix of 8 characters, in a store of their own.
pub async fn store_of(prefixes: impl IntoIterator<Item = String>, cost: u32) -> MemoryStore {
    let store = MemoryStore::new();
    let user = store.insert_user("ada@example.com", "user", &Attribution::default()).await.unwrap();
    for prefix in prefixes {
        let hash = KeyHash::bcrypt(&format!("{prefix}-of-mine"), cost).unwrap();
        let record = KeyRecord::new(0, prefix, user.clone());
        store.insert_key(&StoredKey::new(record, hash), &Attribution::default()).await.unwrap();
    }
    store
}

pub fn old_and_new_keys() -> KeySchemeBuilder {
    KeyScheme::builder()
        .format(KeyFormat::structured("tak", "live").unwrap())
        .format(KeyFormat::first_chars(8).unwrap())
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub response: Response<()>,
    pub body: String,
}

impl Answer {
    pub fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.response.headers().get(name).map(|value| value.to_str().unwrap())
    }
}

/// Sends a request through `layer` to a service that answers with the caller's e-mail address, `-` for
/// nobody, and in `x-headers` the names of the header fields that it saw.
pub async fn send(layer: &ApiKeyAuthLayer, request: Request<Full<Bytes>>) -> Answer {
    let inner = service_fn(|request: Request<Full<Bytes>>| async move {
        let caller = request.extensions().get::<AuthContext>();
        let email = caller.map_or("-".to_owned(), |caller| caller.user().email.clone());
        let names: Vec<_> = request.headers().keys().map(|name| name.as_str().to_owned()).collect();
        let mut response = Response::new(Full::new(Bytes::from(email)));
        response.headers_mut().insert("x-headers", names.join(",").parse().unwrap());
        Ok::<_, Infallible>(response)
    });
    let mut service = tower::Layer::layer(layer, inner);
    let response = service.ready().await.unwrap().call(request).await.unwrap();
    read(response).await
}

pub async fn read<B: http_body::Body<Data = Bytes>>(response: Response<B>) -> Answer
where
    B::Error: std::fmt::Debug,
{
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answer {
        response: Response::from_parts(parts, ()),
        body: String::from_utf8(body.to_vec()).unwrap(),
    }
}

/// A GET request of `/` with these header fields.
pub fn get(headers: &[(&str, &[u8])]) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::default());
    for (name, value) in headers {
        let name = http::HeaderName::from_bytes(name.as_bytes()).unwrap();
        request.headers_mut().append(name, http::HeaderValue::from_bytes(value).unwrap());
    }
    request
}

pub fn bearer(key: &str) -> Request<Full<Bytes>> {
    get(&[("authorization", format!("Bearer {key}").as_bytes())])
}

/// The request as a gRPC client sends it: a POST over HTTP/2.
pub fn grpc<B>(mut request: Request<B>, content_type: &str) -> Request<B> {
    *request.method_mut() = http::Method::POST;
    *request.version_mut() = http::Version::HTTP_2;
    request.headers_mut().insert("content-type", content_type.parse().unwrap());
    request
}

/// The path, or method and path, of an endpoint rule.
pub fn rule(text: &str) -> tower_api_key::record::EndpointRule {
    text.parse().unwrap()
}

/// The key with other digits for a secret: well-formed, its check right, its id known.
pub fn with_wrong_secret(key: &str) -> String {
    let (checked, _) = key.split_at(key.len() - 6);
    let last = if checked.ends_with('a') { 'b' } else { 'a' };
    let forged = format!("{}{last}", &checked[..checked.len() - 1]);
    let check = base62(crc32(forged.as_bytes()));
    format!("{forged}{check}")
}

/// A well-formed key of the default format that nobody has.
pub fn unknown_key() -> String {
    unknown_key_with_id(&"z".repeat(10))
}

/// Another one, with an id of 10 digits.
pub fn unknown_key_with_id(id: &str) -> String {
    let checked = format!("tak_live_{id}_{}", "z".repeat(22));
    format!("{checked}{}", base62(crc32(checked.as_bytes())))
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), step))
}

fn base62(mut number: u32) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut digits = ['0'; 6];
    for digit in digits.iter_mut().rev() {
        *digit = char::from(DIGITS[(number % 62) as usize]);
        number /= 62;
    }
    digits.iter().collect()
}
