//! Base 62 in the order `0-9A-Za-z`. A double click selects such a text as one word, and it needs no escape in a URL.

use zeroize::Zeroize;

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

pub(super) fn is_base62(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// Returns the lowest `N` digits of `number`, most significant first.
pub(super) fn digits<const N: usize>(mut number: u64) -> [u8; N] {
    let mut digits = [ALPHABET[0]; N];
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[(number % 62) as usize];
        number /= 62;
    }
    digits
}

/// Appends `count` uniformly distributed digits from the operating system's random source.
pub(super) fn push_random(text: &mut String, count: usize) -> Result<(), getrandom::Error> {
    let end = text.len() + count;
    let mut bytes = [0; 32];
    while text.len() < end {
        getrandom::fill(&mut bytes)?;
        // 248 is the largest multiple of 62 in a byte. Larger bytes are dropped, so that the digits stay uniformly
        // distributed.
        let even = bytes.iter().filter(|&&byte| byte < 248);
        for byte in even.take(end - text.len()) {
            text.push(char::from(ALPHABET[usize::from(byte % 62)]));
        }
    }
    bytes.zeroize();
    Ok(())
}
