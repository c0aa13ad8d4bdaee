//! Where a key sits in a request: [`Credential`], over a [`RequestHead`].

mod authorization;

use std::{borrow::Cow, fmt, sync::Arc};

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, header};

pub(crate) use self::authorization::Misplaced;
use self::authorization::{authorization, is_b64token, user_name};
use crate::{
    denial::{Denial, MalformedCredential},
    key::token,
};

/// What a closure sees of a request: everything but the body.
///
/// `Debug` shows method and path alone: a key may stand in a header field or in the query.
#[derive(Clone, Copy)]
pub struct RequestHead<'a> {
    method: &'a Method,
    uri: &'a Uri,
    version: Version,
    headers: &'a HeaderMap,
    extensions: &'a Extensions,
}

impl<'a> RequestHead<'a> {
    /// The head of `request`.
    pub fn of<B>(request: &'a Request<B>) -> Self {
        Self {
            method: request.method(),
            uri: request.uri(),
            version: request.version(),
            headers: request.headers(),
            extensions: request.extensions(),
        }
    }

    /// The method.
    pub fn method(&self) -> &'a Method {
        self.method
    }

    /// The URI, as the service around this layer passed it on.
    pub fn uri(&self) -> &'a Uri {
        self.uri
    }

    /// The path that endpoint rules are about: of axum's `OriginalUri` where there is one, because
    /// `nest` strips the path.
    pub fn endpoint(&self) -> &'a str {
        #[cfg(feature = "axum")]
        if let Some(original) = self.extensions.get::<axum::extract::OriginalUri>() {
            return original.0.path();
        }
        self.uri.path()
    }

    /// The HTTP version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The header fields.
    pub fn headers(&self) -> &'a HeaderMap {
        self.headers
    }

    /// The extensions.
    pub fn extensions(&self) -> &'a Extensions {
        self.extensions
    }
}

impl fmt::Debug for RequestHead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestHead")
            .field("method", self.method)
            .field("path", &self.uri.path())
            .finish_non_exhaustive()
    }
}

/// A place in a request where a key may be.
///
/// The default is `Authorization: Bearer KEY`, then `x-api-key: KEY`:
///
/// ```
/// use tower_api_key::{ApiKeyAuthLayer, Credential, MemoryStore};
///
/// let layer = ApiKeyAuthLayer::new(MemoryStore::new())
///     .credentials([Credential::bearer(), Credential::basic()]);
/// ```
#[derive(Clone)]
pub struct Credential(Place);

#[derive(Clone)]
enum Place {
    Bearer,
    Basic,
    Header(HeaderName),
    Closure(Arc<Extract>),
}

type Extract = dyn for<'a> Fn(&RequestHead<'a>) -> Option<Cow<'a, str>> + Send + Sync;
type Token<'a> = Cow<'a, str>;

impl Credential {
    /// `Authorization: Bearer KEY` (RFC 6750 §2.1), the scheme in any case.
    pub fn bearer() -> Self {
        Self(Place::Bearer)
    }

    /// `Authorization: Basic …` with the key as user name (RFC 7617); the password is not looked at.
    /// This is what `curl -u KEY:` sends.
    pub fn basic() -> Self {
        Self(Place::Basic)
    }

    /// The whole value of another header field.
    pub fn header(name: HeaderName) -> Self {
        Self(Place::Header(name))
    }

    /// Whatever `extract` finds. Nothing is removed from the request then.
    ///
    /// A key in the query string is left to this, because URLs end up in the logs of every proxy on
    /// the way, in browser histories and in `Referer` fields. Where a client can't do otherwise:
    ///
    /// ```
    /// use tower_api_key::Credential;
    ///
    /// let from_query = Credential::from_fn(|head| {
    ///     let pairs = head.uri().query()?.split('&');
    ///     pairs.filter_map(|pair| pair.strip_prefix("key=")).next().map(Into::into)
    /// });
    /// ```
    pub fn from_fn<F>(extract: F) -> Self
    where
        F: for<'a> Fn(&RequestHead<'a>) -> Option<Cow<'a, str>> + Send + Sync + 'static,
    {
        Self(Place::Closure(Arc::new(extract)))
    }

    pub(crate) fn is_bearer(&self) -> bool {
        matches!(self.0, Place::Bearer)
    }

    pub(crate) fn is_basic(&self) -> bool {
        matches!(self.0, Place::Basic)
    }

    /// The header field that may hold the key.
    pub(crate) fn header_name(&self) -> Option<&HeaderName> {
        match &self.0 {
            Place::Bearer | Place::Basic => Some(&header::AUTHORIZATION),
            Place::Header(name) => Some(name),
            Place::Closure(_) => None,
        }
    }

    /// What this place has in the form in which nearly everybody writes it; `None` where that takes the grammar.
    fn at_a_glance<'a>(&self, value: &'a HeaderValue) -> Option<&'a [u8]> {
        match &self.0 {
            Place::Bearer => after_bearer(value),
            Place::Header(_) => Some(value.as_bytes()),
            Place::Basic | Place::Closure(_) => None,
        }
    }

    fn find<'a>(&self, head: &RequestHead<'a>) -> Result<Option<Token<'a>>, Denial> {
        match &self.0 {
            Place::Bearer => {
                let Some(value) = authorization(head.headers, "bearer")? else { return Ok(None) };
                Ok(Some(Cow::Borrowed(token(value)?)))
            }
            Place::Basic => authorization(head.headers, "basic")?.map(user_name).transpose(),
            Place::Header(name) => {
                let mut values = head.headers.get_all(name).iter().map(HeaderValue::as_bytes);
                let Some(first) = values.next() else { return Ok(None) };
                let first = token(first)?;
                for other in values {
                    if name == header::AUTHORIZATION {
                        return Err(MalformedCredential::Repeated.into());
                    }
                    same(first, token(other)?)?;
                }
                Ok(Some(Cow::Borrowed(first)))
            }
            Place::Closure(extract) => {
                let Some(found) = extract(head) else { return Ok(None) };
                Ok(Some(match found {
                    Cow::Borrowed(found) => Cow::Borrowed(token(found.as_bytes())?),
                    Cow::Owned(found) => Cow::Owned(token(found.as_bytes())?.to_owned()),
                }))
            }
        }
    }
}

/// A credential that a request carries.
pub(crate) struct Found<'a> {
    pub(crate) token: Cow<'a, str>,
    /// The places that it is in, a bit each.
    pub(crate) places: u64,
}

impl Found<'_> {
    /// Whether the key stands behind `Bearer`, but breaks the grammar that RFC 6750 §2.1 has for it.
    pub(crate) fn breaks_bearer_grammar(&self, places: &[Credential]) -> bool {
        let is_found = |at: usize| self.places & (1 << at) != 0;
        let is_bearer = places.iter().enumerate().any(|(at, it)| it.is_bearer() && is_found(at));
        is_bearer && !is_b64token(self.token.as_bytes())
    }
}

/// So many places are told apart.
pub(crate) const MAX_PLACES: usize = 64;

/// The bytes of the credential, and the bit of its place, where only one place has one and no field is
/// there twice: what nearly all requests look like. Nothing else of the grammar is looked at: it is enough
/// to find out whether a key is remembered, which then is well-formed.
pub(crate) fn at_a_glance<'a>(
    places: &[Credential],
    headers: &'a HeaderMap,
) -> Option<(&'a [u8], u64)> {
    if headers.len() > headers.keys_len() {
        return None;
    }
    let mut sole = None;
    for (at, place) in places.iter().enumerate() {
        if let Some(value) = headers.get(place.header_name()?)
            && sole.replace((place.at_a_glance(value)?, 1 << at)).is_some()
        {
            return None;
        }
    }
    sole
}

/// What stands behind the scheme in the form in which nearly everybody writes it.
fn after_bearer(value: &HeaderValue) -> Option<&[u8]> {
    const BEARER: &[u8] = b"Bearer ";
    let (scheme, rest) = value.as_bytes().split_at_checked(BEARER.len())?;
    (scheme == BEARER || scheme.eq_ignore_ascii_case(BEARER)).then_some(rest)
}

/// Finds the one credential that the request carries in any of the places. The same one in two
/// places is fine.
pub(crate) fn find<'a>(
    places: &[Credential],
    head: &RequestHead<'a>,
) -> Result<Option<Found<'a>>, Denial> {
    let mut found: Option<Found<'a>> = None;
    for (at, place) in places.iter().enumerate() {
        if let Some(token) = place.find(head)? {
            match &mut found {
                Some(first) => {
                    same(&first.token, &token)?;
                    first.places |= 1 << at;
                }
                None => found = Some(Found { token, places: 1 << at }),
            }
        }
    }
    Ok(found)
}

fn same(first: &str, second: &str) -> Result<(), MalformedCredential> {
    // Both come from the caller, so there is nothing to learn from the time that this takes.
    if first == second { Ok(()) } else { Err(MalformedCredential::Conflicting) }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Bearer => f.write_str("Credential(Authorization: Bearer)"),
            Place::Basic => f.write_str("Credential(Authorization: Basic)"),
            Place::Header(name) => write!(f, "Credential({name})"),
            Place::Closure(_) => f.write_str("Credential(closure)"),
        }
    }
}

/// What becomes of the header fields that held the key before the inner service sees the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyHeader {
    Remove,
    MarkSensitive,
}

impl KeyHeader {
    /// Treats the fields in which a key was found. Leaves `Authorization` fields of another scheme alone.
    pub(crate) fn treat(self, places: &[Credential], found: u64, headers: &mut HeaderMap) {
        let with_key = places.iter().enumerate().filter(|(at, _)| found & (1 << at) != 0);
        for name in with_key.filter_map(|(_, place)| place.header_name()) {
            match self {
                // With all its values.
                Self::Remove => drop(headers.remove(name)),
                Self::MarkSensitive => {
                    if let header::Entry::Occupied(mut field) = headers.entry(name) {
                        field.iter_mut().for_each(|value| value.set_sensitive(true));
                    }
                }
            }
        }
    }
}
