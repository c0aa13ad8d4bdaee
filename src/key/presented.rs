//! A key that a caller presents, from the first byte to a value that parsed.

use std::fmt;

use zeroize::Zeroizing;

use super::KeyDigest;

/// The longest credential that is looked at, in bytes.
const MAX_BYTES: usize = 512;

/// A key that was presented and is well-formed in one of the scheme's formats. Not yet proven.
///
/// `Debug` shows the lookup id alone, and the text is overwritten when it is dropped.
#[derive(Clone)]
pub(crate) struct PresentedKey {
    text: Zeroizing<Box<str>>,
    id: std::ops::Range<usize>,
    /// Whether the secret part is known to be random and long enough for a fast hash.
    pub(crate) is_structured: bool,
    pub(crate) digest: KeyDigest,
}

impl PresentedKey {
    pub(super) fn new(text: &str, id: std::ops::Range<usize>, is_structured: bool) -> Self {
        Self {
            text: Zeroizing::new(text.into()),
            id,
            is_structured,
            digest: KeyDigest::of(text.as_bytes()),
        }
    }

    /// The public lookup id.
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

/// Takes the surrounding white space off a credential and checks its bytes: one or more visible
/// ASCII characters (RFC 9110 §5.5, RFC 6750 §2.1), with no upper bound yet.
pub(crate) fn token(bytes: &[u8]) -> Result<&str, MalformedCredential> {
    let is_white = |byte: &u8| matches!(byte, b' ' | b'\t');
    let start = bytes.iter().position(|byte| !is_white(byte)).unwrap_or(bytes.len());
    let end = bytes.iter().rposition(|byte| !is_white(byte)).map_or(start, |last| last + 1);
    let token = &bytes[start..end];
    if token.is_empty() {
        return Err(MalformedCredential::Empty);
    }
    // To the end in any case: without a way out it is compiled to a few wide instructions.
    if !token.iter().fold(true, |all, byte| all & byte.is_ascii_graphic()) {
        return Err(MalformedCredential::ForbiddenBytes);
    }
    std::str::from_utf8(token).map_err(|_| MalformedCredential::ForbiddenBytes)
}

pub(super) fn check_length(token: &str) -> Result<(), UnrecognizedKey> {
    if token.len() > MAX_BYTES { Err(UnrecognizedKey::TooLong) } else { Ok(()) }
}

/// A credential that breaks the grammar of its header: 400 `invalid_request`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MalformedCredential {
    /// There is nothing after the scheme, or nothing in the header.
    Empty,
    /// There are bytes in it other than visible ASCII.
    ForbiddenBytes,
    /// The `Authorization` header does not start with a scheme and a space.
    NoScheme,
    /// The `Authorization` header has a key, but not behind the scheme `Bearer`: the scheme is missing, not followed
    /// by a space, or another one.
    NoBearer,
    /// What follows `Bearer` is no `b64token` (RFC 6750 §2.1), nor a key of an accepted format: it has quotes, commas
    /// or brackets around it.
    NotB64Token,
    /// There is more than one `Authorization` header.
    Repeated,
    /// The request carries two different credentials.
    Conflicting,
    /// The user-pass of HTTP Basic is not base64 of a user name and a password (RFC 7617 §2).
    NotBasic,
}

impl fmt::Display for MalformedCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "the credential is empty",
            Self::ForbiddenBytes => "the credential has bytes other than visible ASCII",
            Self::NoScheme => "the Authorization header does not start with a scheme and a space",
            Self::NoBearer => {
                "the API key in the Authorization header is not behind the scheme Bearer: \
                 write `Authorization: Bearer KEY`"
            }
            Self::NotB64Token => {
                "what follows Bearer has other characters than letters, digits and -._~+/ (and = at its end): \
                 write the key alone, without quotes, commas or brackets"
            }
            Self::Repeated => "there is more than one Authorization header",
            Self::Conflicting => "the request carries two different credentials",
            Self::NotBasic => "the Basic credential is not base64 of a user name and a password",
        })
    }
}

/// A well-formed credential that is no key of an accepted format: 401 `invalid_token`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnrecognizedKey {
    /// It is longer than 512 bytes.
    TooLong,
    /// No accepted format looks like this.
    UnknownFormat,
    /// Its brand is known, but its environment or its length is not.
    WrongShape,
    /// The check at its end is wrong: a typo, or a forged key.
    WrongCheck,
}

impl fmt::Display for UnrecognizedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TooLong => "the key is longer than 512 bytes",
            Self::UnknownFormat => "the key has none of the accepted formats",
            Self::WrongShape => "the key has the wrong environment or length",
            Self::WrongCheck => "the check at the end of the key is wrong",
        })
    }
}
