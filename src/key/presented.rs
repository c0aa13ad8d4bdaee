//! Keys as callers present them, from bytes to a parsed value.

use std::fmt;

use zeroize::Zeroizing;

use super::digest::KeyDigest;
use crate::denial::{MalformedCredential, UnrecognizedKey};

/// Maximum length of a credential, in bytes.
const MAX_BYTES: usize = 512;

/// A presented key that is well-formed in one of the scheme's formats. It is not verified yet.
///
/// `Debug` shows only the lookup id. The text is overwritten when the value is dropped.
#[derive(Clone)]
pub(crate) struct PresentedKey {
    text: Zeroizing<Box<str>>,
    id: std::ops::Range<usize>,
    /// Whether the secret part is random and long enough for a fast hash.
    pub(crate) is_structured: bool,
    pub(crate) digest: KeyDigest,
}

/// What a format recognizes in the text of a key.
pub(super) struct KeyShape {
    pub(super) id: std::ops::Range<usize>,
    pub(super) is_structured: bool,
}

impl PresentedKey {
    /// Creates a key from a text in this shape. `digest` is that of the text.
    pub(super) fn new(text: &str, shape: KeyShape, digest: KeyDigest) -> Self {
        let KeyShape { id, is_structured } = shape;
        Self { text: Zeroizing::new(text.into()), id, is_structured, digest }
    }

    /// Returns the public lookup id.
    pub(crate) fn id(&self) -> &str {
        self.text.get(self.id.clone()).unwrap_or_default()
    }

    pub(crate) fn expose_secret(&self) -> &str {
        &self.text
    }
}

impl fmt::Debug for PresentedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PresentedKey").field("id", &self.id()).finish_non_exhaustive()
    }
}

/// Trims white space around a credential and checks its bytes: one or more visible ASCII characters (RFC 9110 §5.5, RFC
/// 6750 §2.1). It does not check the length.
pub(crate) fn token(bytes: &[u8]) -> Result<&str, MalformedCredential> {
    let is_white = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = bytes.iter().position(|byte| !is_white(byte)).unwrap_or(bytes.len());
    let end = bytes.iter().rposition(|byte| !is_white(byte)).map_or(start, |last| last + 1);
    let token = &bytes[start..end];
    if token.is_empty() {
        return Err(MalformedCredential::Empty);
    }
    // The loop always runs to the end: without an early exit it is compiled to a few wide instructions.
    if !token.iter().fold(true, |all, byte| all & byte.is_ascii_graphic()) {
        return Err(MalformedCredential::ForbiddenBytes);
    }
    std::str::from_utf8(token).map_err(|_| MalformedCredential::ForbiddenBytes)
}

pub(super) fn check_length(token: &str) -> Result<(), UnrecognizedKey> {
    if token.len() > MAX_BYTES { Err(UnrecognizedKey::TooLong) } else { Ok(()) }
}
