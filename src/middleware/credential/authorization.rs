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

/// What stands behind `scheme` in the `Authorization` field (RFC 9110 §11.4: a scheme, spaces, the
/// rest); `None` for another scheme or no field at all.
pub(super) fn authorization<'a>(
    headers: &'a HeaderMap,
    scheme: &str,
) -> Result<Option<&'a [u8]>, MalformedCredential> {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Ok(None) };
    // Nearly always no field at all is there twice, which takes two numbers to see.
    let has_repeated = headers.len() > headers.keys_len();
    if has_repeated && headers.get_all(header::AUTHORIZATION).iter().nth(1).is_some() {
        return Err(MalformedCredential::Repeated);
    }
    let value = value.as_bytes();
    // What nearly all requests look like, without going through the grammar.
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

/// `tchar` of RFC 9110 §5.6.2.
fn is_token_char(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Base64 of the longest user-pass that is looked at: a key of 512 bytes, a colon and a password.
const MAX_BASIC_BYTES: usize = 2048;

/// The user name of a Basic credential (RFC 7617 §2).
pub(super) fn user_name<'a>(encoded: &[u8]) -> Result<Cow<'a, str>, Denial> {
    let encoded = token(encoded)?;
    if encoded.len() > MAX_BASIC_BYTES {
        return Err(UnrecognizedKey::TooLong.into());
    }
    let user_pass =
        Zeroizing::new(STANDARD.decode(encoded).map_err(|_| MalformedCredential::NotBasic)?);
    let colon = user_pass.iter().position(|&byte| byte == b':');
    let user = &user_pass[..colon.ok_or(MalformedCredential::NotBasic)?];
    // White space is part of a user name, so that it is not taken off here.
    if user
        .first()
        .zip(user.last())
        .is_some_and(|(a, b)| a.is_ascii_whitespace() || b.is_ascii_whitespace())
    {
        return Err(MalformedCredential::ForbiddenBytes.into());
    }
    Ok(Cow::Owned(token(user)?.to_owned()))
}

/// `1*( ALPHA / DIGIT / "-" / "." / "_" / "~" / "+" / "/" ) *"="`.
pub(super) fn is_b64token(token: &[u8]) -> bool {
    let padding = token.iter().rev().take_while(|&&byte| byte == b'=').count();
    let (text, _) = token.split_at(token.len() - padding);
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(byte);
    !text.is_empty() && text.iter().all(is_allowed)
}

/// What may be a key in an `Authorization` field that has no credential for `places`, because the scheme `Bearer`
/// is missing, glued to it, or another one.
pub(crate) enum Misplaced<'a> {
    /// Another scheme may own what looks like a key of a format with few rules.
    Structured(&'a str),
    /// Nothing else begins like this.
    Any(&'a str),
}

impl<'a> Misplaced<'a> {
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
