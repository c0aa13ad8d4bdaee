//! HMAC-SHA-256, and the comparison of MACs and hashes: [`MacKey`], [`equal`].

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::{Choice, ConstantTimeEq};

/// A key of HMAC-SHA-256 (RFC 2104), prepared: its two blocks are hashed once, not for each message. The state is zeroed on
/// drop.
#[derive(Clone)]
pub(crate) struct MacKey(Hmac<Sha256>);

impl MacKey {
    pub(crate) fn new(secret: &[u8]) -> Self {
        // HMAC accepts a key of any length (RFC 2104 §2). The constructor's error is for other MACs.
        let Ok(mac) = Hmac::new_from_slice(secret) else {
            unreachable!("HMAC accepts a key of any length")
        };
        Self(mac)
    }

    /// Returns the MAC of a message that consists of these parts.
    pub(crate) fn mac_of(&self, message: &[&[u8]]) -> [u8; 32] {
        let mut mac = self.0.clone();
        message.iter().for_each(|part| mac.update(part));
        mac.finalize().into_bytes().into()
    }
}

/// Returns the HMAC-SHA-256 of a message, for a key that is used once.
pub(crate) fn hmac_sha256(secret: &[u8], message: &[u8]) -> [u8; 32] {
    MacKey::new(secret).mac_of(&[message])
}

/// Compares two MACs or hashes in constant time. It compares words, because `subtle` compares arrays byte by byte, which
/// takes eight times as long.
pub(crate) fn equal(one: &[u8; 32], other: &[u8; 32]) -> bool {
    let words = one.chunks_exact(8).zip(other.chunks_exact(8));
    let are_equal = words.fold(Choice::from(1), |are_equal, (one, other)| {
        let mut differences = [0; 8];
        for (at, difference) in differences.iter_mut().enumerate() {
            *difference = one[at] ^ other[at];
        }
        are_equal & u64::from_ne_bytes(differences).ct_eq(&0)
    });
    are_equal.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::hex;

    #[test]
    fn arrays_that_differ_in_any_bit_are_not_equal() {
        let one: [u8; 32] = std::array::from_fn(|at| at as u8 * 7);
        assert!(equal(&one, &one));
        for bit in 0..256 {
            let mut other = one;
            other[bit / 8] ^= 1 << (bit % 8);
            assert!(!equal(&one, &other), "bit {bit}");
        }
    }

    #[test]
    fn the_test_vectors_of_rfc_4231_hold() {
        let vectors: [(&[u8], &str, &str); 3] = [
            (
                b"Jefe",
                "what do ya want for nothing?",
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                &[0x0b; 20],
                "Hi There",
                "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
            ),
            (
                &[0xaa; 131],
                "Test Using Larger Than Block-Size Key - Hash Key First",
                "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
            ),
        ];
        for (secret, message, expected) in vectors {
            let key = MacKey::new(secret);
            assert_eq!(hex(&hmac_sha256(secret, message.as_bytes())), expected);
            // The key is used more than once, and a message may have parts.
            for at in [0, 1, message.len()] {
                let (first, second) = message.as_bytes().split_at(at);
                assert_eq!(hex(&key.mac_of(&[first, second])), expected);
            }
        }
    }
}
