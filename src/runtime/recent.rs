//! A map that keeps the most recently written entries: [`RecentMap`].

use std::{borrow::Borrow, collections::HashMap, hash::Hash};

/// A map of bounded size with two generations: when the young one is full, it replaces the old one, whose entries are
/// evicted. A write moves an entry into the young generation. At least `capacity / 2` other entries are therefore
/// written before an entry is evicted, and no write searches for the oldest entry.
#[derive(Debug)]
pub(crate) struct RecentMap<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    half: usize,
}

impl<K: Hash + Eq, V> RecentMap<K, V> {
    /// Creates an empty map of at most `capacity` entries, and at least two.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: (capacity / 2).max(1) }
    }

    pub(crate) fn get<Q>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    /// Returns the entry of `key` for writing. It is `default()` if there is none.
    pub(crate) fn entry(&mut self, key: K, default: impl FnOnce() -> V) -> &mut V {
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            let kept = self.old.remove(&key);
            self.old = std::mem::take(&mut self.young);
            let value = kept.unwrap_or_else(default);
            return self.young.entry(key).or_insert(value);
        }
        let old = &mut self.old;
        let kept = if self.young.contains_key(&key) { None } else { old.remove(&key) };
        self.young.entry(key).or_insert_with(|| kept.unwrap_or_else(default))
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_last_is_kept_and_the_size_is_bounded() {
        let mut map = RecentMap::new(100);
        for n in 0..10_000 {
            *map.entry(n, || 0) += 1;
            *map.entry(-1, || 0) += 1;
            assert!(map.len() <= 100, "{}", map.len());
        }
        assert_eq!(map.get(&-1), Some(&10_000), "a written entry is kept");
        assert_eq!((map.get(&9_999), map.get(&9_960), map.get(&5)), (Some(&1), Some(&1), None));
    }
}
