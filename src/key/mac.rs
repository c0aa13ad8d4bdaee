//! HMAC-SHA-256: [`MacKey`].

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

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
        let mac = self.0.clone();
        message.iter().fold(mac, |mac, part| mac.chain_update(part)).finalize().into_bytes().into()
    }
}

/// Returns the HMAC-SHA-256 of a message, for a key that is used once.
pub(crate) fn hmac_sha256(secret: &[u8], message: &[u8]) -> [u8; 32] {
    MacKey::new(secret).mac_of(&[message])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::hex;

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
