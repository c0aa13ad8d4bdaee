//! A hash table in parts with a lock each: [`Shards`].

use std::{
    borrow::Borrow,
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hash},
    sync::{PoisonError, RwLock},
};

/// A hash table in parts, so that the growth of one of them blocks few look-ups, and not for long.
pub(super) struct Shards<K, V> {
    parts: Box<[RwLock<HashMap<K, V>>]>,
    hasher: RandomState,
}

const PARTS: usize = 256;

impl<K: Hash + Eq, V> Shards<K, V> {
    pub(super) fn new() -> Self {
        let parts = std::iter::repeat_with(RwLock::default).take(PARTS).collect();
        Self { parts, hasher: RandomState::new() }
    }

    /// Calls `read` with the value of `key`.
    pub(super) fn with<Q, T>(&self, key: &Q, read: impl FnOnce(Option<&V>) -> T) -> T
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        let part = self.part(key).read().unwrap_or_else(PoisonError::into_inner);
        read(part.get(key))
    }

    /// Calls `change` with the value of `key`, and stores or removes it.
    pub(super) fn update<T>(&self, key: K, change: impl FnOnce(&mut Option<V>) -> T) -> T {
        let mut part = self.part(&key).write().unwrap_or_else(PoisonError::into_inner);
        let mut value = part.remove(&key);
        let result = change(&mut value);
        if let Some(value) = value {
            part.insert(key, value);
        }
        result
    }

    /// Removes all values, one part after the other.
    pub(super) fn clear(&self) {
        for part in &self.parts {
            *part.write().unwrap_or_else(PoisonError::into_inner) = HashMap::new();
        }
    }

    pub(super) fn len(&self) -> usize {
        let len = |part: &RwLock<HashMap<K, V>>| part.read().map_or(0, |part| part.len());
        self.parts.iter().map(len).sum()
    }

    fn part<Q: Hash + ?Sized>(&self, key: &Q) -> &RwLock<HashMap<K, V>> {
        // The table uses the low bits and the highest ones.
        &self.parts[(self.hasher.hash_one(key) >> 32) as usize % PARTS]
    }
}
