//! Why a credential is no key.

use std::fmt;

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
