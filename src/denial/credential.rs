//! Reasons for which a credential is not a key.

use std::fmt;

/// Reason for which a credential breaks the grammar of its header field: 400 `invalid_request`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MalformedCredential {
    /// The credential is empty: nothing follows the scheme, or the header field is empty.
    Empty,
    /// The credential contains bytes other than visible ASCII.
    ForbiddenBytes,
    /// The `Authorization` header does not start with a scheme and a space.
    NoScheme,
    /// The `Authorization` header has a key that does not follow the scheme `Bearer`: the scheme is missing, is not
    /// followed by a space, or is another scheme.
    NoBearer,
    /// The text after `Bearer` is neither a `b64token` (RFC 6750 §2.1) nor a key of an accepted format: it contains
    /// quotes, commas or brackets.
    NotB64Token,
    /// There is more than one `Authorization` header.
    Repeated,
    /// The request carries two different credentials.
    Conflicting,
    /// The user-pass of HTTP Basic is not the base64 encoding of a user name and a password (RFC 7617 §2).
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

impl std::error::Error for MalformedCredential {}

/// Reason for which a well-formed credential is not a key of an accepted format: 401 `invalid_token`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum UnrecognizedKey {
    /// The key is longer than 512 bytes.
    TooLong,
    /// The key matches no accepted format.
    UnknownFormat,
    /// The key has a known brand, but an unknown environment or a wrong length.
    WrongShape,
    /// The checksum at the end of the key is wrong: a typo, or a forged key.
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

impl std::error::Error for UnrecognizedKey {}
