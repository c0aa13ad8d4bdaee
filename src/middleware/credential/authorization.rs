//! The grammar of the `Authorization` field: schemes, `Bearer` tokens, `Basic` user names.

use std::borrow::Cow;

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, header};
use zeroize::Zeroizing;

use super::Credential;
use crate::{
    denial::{Denial, MalformedCredential, UnrecognizedKey},
    key::token,
};

/// Returns the text after `scheme` in the `Authorization` field (RFC 9110 §11.4: a scheme, spaces, the rest); `None`
/// if the field has another scheme or is missing.
pub(super) fn authorization<'a>(
    headers: &'a HeaderMap,
    scheme: &str,
) -> Result<Option<&'a [u8]>, MalformedCredential> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
    // Requests rarely repeat a field, and comparing two counts is cheap.
    let has_repeated = headers.len() > headers.keys_len();
    if has_repeated && headers.get_all(header::AUTHORIZATION).iter().nth(1).is_some() {
        return Err(MalformedCredential::Repeated);
    }
    let value = value.as_bytes();
    // Fast path for the most common form, without the grammar.
    if let Some((found, rest)) = value.split_at_checked(scheme.len())
        && found.eq_ignore_ascii_case(scheme.as_bytes())
        && let [b' ', next, ..] = rest
        && next.is_ascii_graphic()
    {
        return Ok(Some(&rest[1..]));
    }
    let value = value.trim_ascii();
    let scheme_end = value.iter().position(|&byte| !is_token_char(byte)).unwrap_or(value.len());
    let (found, rest) = value.split_at(scheme_end);
    if found.is_empty() || !matches!(rest.first(), None | Some(b' ')) {
        return Err(MalformedCredential::NoScheme);
    }
    let spaces = rest.iter().take_while(|&&byte| byte == b' ').count();
    if rest.get(spaces) == Some(&b'\t') {
        return Err(MalformedCredential::ForbiddenBytes);
    }
    Ok(found.eq_ignore_ascii_case(scheme.as_bytes()).then_some(&rest[spaces..]))
}

/// Returns whether the byte is a `tchar` of RFC 9110 §5.6.2.
fn is_token_char(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Maximum length in bytes of a base64-encoded user-pass: a key of 512 bytes, a colon and a password.
const MAX_BASIC_BYTES: usize = 2048;

/// Returns the user name of a Basic credential (RFC 7617 §2).
pub(super) fn user_name<'a>(encoded: &[u8]) -> Result<Cow<'a, str>, Denial> {
    let encoded = token(encoded)?;
    if encoded.len() > MAX_BASIC_BYTES {
        return Err(UnrecognizedKey::TooLong.into());
    }
    let user_pass =
        Zeroizing::new(STANDARD.decode(encoded).map_err(|_| MalformedCredential::NotBasic)?);
    let colon = user_pass.iter().position(|&byte| byte == b':');
    let user = &user_pass[..colon.ok_or(MalformedCredential::NotBasic)?];
    // White space is part of a user name, so it is rejected and not trimmed.
    if user
        .first()
        .zip(user.last())
        .is_some_and(|(a, b)| a.is_ascii_whitespace() || b.is_ascii_whitespace())
    {
        return Err(MalformedCredential::ForbiddenBytes.into());
    }
    Ok(Cow::Owned(token(user)?.to_owned()))
}

/// Returns whether the token matches `1*( ALPHA / DIGIT / "-" / "." / "_" / "~" / "+" / "/" ) *"="`.
pub(super) fn is_b64token(token: &[u8]) -> bool {
    let padding = token.iter().rev().take_while(|&&byte| byte == b'=').count();
    let (text, _) = token.split_at(token.len() - padding);
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(byte);
    !text.is_empty() && text.iter().all(is_allowed)
}

/// Possible key in an `Authorization` field that has no credential for `places`: the scheme `Bearer` is missing, is
/// not followed by a space, or is another scheme.
pub(crate) enum Misplaced<'a> {
    /// The text is a key only in a structured format: in a format with few rules, credentials of another scheme look
    /// like keys.
    Structured(&'a str),
    /// The text follows `Bearer` without a space, so it may be a key in any format.
    Any(&'a str),
}

impl<'a> Misplaced<'a> {
    /// Returns the text that may be a misplaced key, if `places` has `Bearer`.
    pub(crate) fn of(places: &[Credential], headers: &'a HeaderMap) -> Option<Self> {
        const BEARER: &str = "bearer";
        if !places.iter().any(Credential::is_bearer) {
            return None;
        }
        let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?.trim();
        match value.split_once(' ') {
            Some((_, rest)) => Some(Self::Structured(rest.trim())),
            None => match value.split_at_checked(BEARER.len()) {
                Some((scheme, rest)) if scheme.eq_ignore_ascii_case(BEARER) => {
                    Some(Self::Any(rest))
                }
                _ => Some(Self::Structured(value)),
            },
        }
    }
}
