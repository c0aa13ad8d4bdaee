//! The SHA-256 of a key, which identifies it within a process: [`KeyDigest`].

use std::hash::{Hash, Hasher};

use sha2::{Digest, Sha256, block_api::compress256};

use super::mac::equal;

/// SHA-256 of a whole key. It never leaves the process.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeyDigest(pub(super) [u8; 32]);

/// Maximum length of a message of one block, in bytes. A bit and the length follow the message (FIPS 180-4 §5.1.1).
const ONE_BLOCK: usize = 55;

impl KeyDigest {
    /// Returns the SHA-256 of `key`. It is most of the cost of a cache hit. The common case of one block avoids the
    /// buffer and the counters for messages of any length, which are a third of it.
    #[inline]
    pub(crate) fn of(key: &[u8]) -> Self {
        if key.len() > ONE_BLOCK {
            return Self::of_blocks(key);
        }
        let mut block = [0; 64];
        block[..key.len()].copy_from_slice(key);
        block[key.len()] = 0x80;
        block[62..].copy_from_slice(&(key.len() as u16 * 8).to_be_bytes());
        let mut state = INITIAL;
        compress256(&mut state, &[block]);
        let mut digest = [0; 32];
        for (bytes, word) in digest.chunks_exact_mut(4).zip(state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        Self(digest)
    }

    /// Not inlined, so that its buffer and counters take no room and no instructions in the common case.
    #[inline(never)]
    fn of_blocks(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }

    /// Returns the digest of a look-up of this key without its text, which the proof `proof` must match.
    pub(crate) fn for_recheck(&self, proof: &[u8]) -> Self {
        Self::of(&[b"recheck:".as_slice(), &self.0, proof].concat())
    }
}

/// Initial hash value (FIPS 180-4 §5.3.3).
const INITIAL: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// Eight bytes are sufficient for a hash map: a client can't choose those of many keys.
impl Hash for KeyDigest {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        state.write_u64(u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
    }
}

impl KeyDigest {
    /// Compares in constant time.
    pub(crate) fn is(&self, other: &Self) -> bool {
        equal(&self.0, &other.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_the_sha256_of_a_key_of_any_length(key in prop::collection::vec(any::<u8>(), 0..200)) {
            let expected: [u8; 32] = Sha256::digest(&key).into();
            prop_assert_eq!(KeyDigest::of(&key).0, expected);
        }
    }

    #[test]
    fn is_right_on_both_sides_of_a_block() {
        for length in 0..130 {
            let key = vec![b'k'; length];
            let expected: [u8; 32] = Sha256::digest(&key).into();
            assert_eq!(KeyDigest::of(&key).0, expected, "{length} bytes");
        }
    }
}
