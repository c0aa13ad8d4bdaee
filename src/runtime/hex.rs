//! Bytes as hexadecimal digits.

pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut digits = vec![0; 2 * bytes.len()];
    hex_in(bytes, &mut digits);
    String::from_utf8(digits).unwrap_or_default()
}

/// Appends the digits.
#[cfg(feature = "redis")]
pub(crate) fn push_hex(bytes: &[u8], text: &mut String) {
    text.reserve(2 * bytes.len());
    for byte in bytes {
        let mut digits = [0; 2];
        text.push_str(hex_in(&[*byte], &mut digits));
    }
}

/// Writes the digits to a buffer that has room for all of them, and returns them.
pub(crate) fn hex_in<'a>(bytes: &[u8], digits: &'a mut [u8]) -> &'a str {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    debug_assert!(digits.len() >= 2 * bytes.len());
    for (byte, pair) in bytes.iter().zip(digits.chunks_exact_mut(2)) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    let len = digits.len().min(2 * bytes.len());
    // Digits are ASCII.
    str::from_utf8(&digits[..len]).unwrap_or_default()
}

pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16);
        *byte = u8::try_from(digit(0)? << 4 | digit(1)?).ok()?;
    }
    Some(bytes)
}
