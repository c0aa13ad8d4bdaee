//! A scheme with a store that counts its look-ups, and what a key is told there.

use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, MemoryStore, NewKey,
    denial::{InvalidKey, MalformedCredential},
    key::{KeyFormat, KeySchemeBuilder},
    record::{KeyRecord, User, UserId},
    store::{KeyRepository, StoredKey},
};

use super::{counted::Counted, some_user};

/// What a key is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    Passes,
    Malformed(MalformedCredential),
    Invalid(InvalidKey),
    /// Another refusal, by its status.
    Status(u16),
}

pub struct Door {
    pub scheme: KeyScheme,
    pub keys: MemoryStore,
    pub user: UserId,
    store: Counted,
    authenticator: Authenticator,
}

impl Door {
    /// A door for keys of `scheme`, with the keys of one user behind it.
    pub async fn new(scheme: KeySchemeBuilder) -> Self {
        let keys = MemoryStore::new();
        let user = some_user(keys.clone()).await;
        Self::over(scheme, keys, user)
    }

    fn over(scheme: KeySchemeBuilder, keys: MemoryStore, user: UserId) -> Self {
        let scheme = scheme.build().unwrap();
        let store = Counted::over(keys.clone());
        // Nothing is remembered, so that each key reaches the store as often as it is tried.
        let authenticator = Authenticator::builder(store.clone());
        let authenticator = authenticator.scheme(scheme.clone()).cache_capacity(0).build();
        Self { scheme, keys, user, store, authenticator }
    }

    /// Another door to the same keys.
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
        self.keys.insert_key(&key).await.unwrap();
    }

    /// Tries a key, and says how often the store was asked for it.
    pub async fn try_key(&self, key: &str) -> (Told, usize) {
        let told = match self.authenticator.authenticate(key).await {
            Ok(caller) if caller.user().email == "ada@example.com" => Told::Passes,
            Ok(caller) => panic!("somebody else: {caller:?}"),
            Err(Denial::MalformedCredential(reason)) => Told::Malformed(reason),
            Err(Denial::InvalidKey(reason)) => Told::Invalid(reason),
            Err(denial) => Told::Status(denial.status().as_u16()),
        };
        (told, self.store.take_asked())
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
