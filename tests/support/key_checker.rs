//! A scheme over a store that counts look-ups, and the outcomes for its keys.

use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, MemoryStore, NewKey,
    denial::{InvalidKey, MalformedCredential},
    key::{KeyFormat, KeySchemeBuilder},
    record::{KeyRecord, User, UserId},
    store::{Attribution, KeyRepository, StoredKey},
};

use super::{counted::Counted, some_user};

/// The outcome for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Passes,
    Malformed(MalformedCredential),
    Invalid(InvalidKey),
    /// Another denial, by its status.
    Status(u16),
}

pub struct KeyChecker {
    pub scheme: KeyScheme,
    pub keys: MemoryStore,
    pub user: UserId,
    store: Counted,
    authenticator: Authenticator,
}

impl KeyChecker {
    /// A checker for keys of `scheme`, with the keys of one user behind it.
    pub async fn new(scheme: KeySchemeBuilder) -> Self {
        let keys = MemoryStore::new();
        let user = some_user(keys.clone()).await;
        Self::over(scheme, keys, user)
    }

    fn over(scheme: KeySchemeBuilder, keys: MemoryStore, user: UserId) -> Self {
        let scheme = scheme.build().unwrap();
        let store = Counted::over(keys.clone());
        // Nothing is cached, so that each key reaches the store as often as it is tried.
        let authenticator = Authenticator::builder(store.clone());
        let authenticator = authenticator.scheme(scheme.clone()).cache_capacity(0).build();
        Self { scheme, keys, user, store, authenticator }
    }

    /// Another checker to the same keys.
    pub fn beside(&self, scheme: KeySchemeBuilder) -> Self {
        Self::over(scheme, self.keys.clone(), self.user.clone())
    }

    pub async fn issue(&self) -> String {
        let manager = KeyManager::new(self.keys.clone()).scheme(self.scheme.clone());
        let issued = manager.issue(NewKey::new(self.user.clone(), "key")).await.unwrap();
        issued.expose_secret().to_owned()
    }

    /// Stores a row as another service may have written it.
    pub async fn store(&self, prefix: &str, hash: &str) {
        let record = KeyRecord::new(0, prefix, User::new(self.user.clone(), ""));
        let key = StoredKey::new(record, hash.parse().unwrap());
        self.keys.insert_key(&key, &Attribution::default()).await.unwrap();
    }

    /// Tries a key. Returns the outcome and the number of look-ups in the store for it.
    pub async fn try_key(&self, key: &str) -> (Outcome, usize) {
        let outcome = match self.authenticator.authenticate(key).await {
            Ok(caller) if caller.user().email == "ada@example.com" => Outcome::Passes,
            Ok(caller) => panic!("somebody else: {caller:?}"),
            Err(Denial::MalformedCredential(reason)) => Outcome::Malformed(reason),
            Err(Denial::InvalidKey(reason)) => Outcome::Invalid(reason),
            Err(denial) => Outcome::Status(denial.status().as_u16()),
        };
        (outcome, self.store.take_asked())
    }
}

pub fn structured(brand: &str) -> KeyFormat {
    KeyFormat::structured(brand, "live").unwrap()
}

pub fn first_chars(n: usize) -> KeyFormat {
    KeyFormat::first_chars(n).unwrap()
}

/// A scheme with this format alone.
pub fn scheme(format: KeyFormat) -> KeySchemeBuilder {
    KeyScheme::builder().format(format)
}
