//! Finds the key in a request: [`Credential`], which reads a [`RequestHead`].

mod authorization;

use std::{borrow::Cow, fmt, sync::Arc};

use http::{Extensions, HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version, header};

pub(crate) use self::authorization::Misplaced;
use self::authorization::{authorization, is_b64token, user_name};
use crate::{
    denial::{Denial, MalformedCredential},
    key::token,
};

/// Head of a request, as closures get it: everything but the body.
///
/// `Debug` shows only method and path, because a header field or the query may contain a key.
#[derive(Clone, Copy)]
pub struct RequestHead<'a> {
    method: &'a Method,
    uri: &'a Uri,
    version: Version,
    headers: &'a HeaderMap,
    extensions: &'a Extensions,
}

impl<'a> RequestHead<'a> {
    /// Returns the head of `request`.
    pub fn of<B>(request: &'a Request<B>) -> Self {
        Self {
            method: request.method(),
            uri: request.uri(),
            version: request.version(),
            headers: request.headers(),
            extensions: request.extensions(),
        }
    }

    /// Returns the method.
    pub fn method(&self) -> &'a Method {
        self.method
    }

    /// Returns the URI, as the outer service passed it on.
    pub fn uri(&self) -> &'a Uri {
        self.uri
    }

    /// Returns the path that endpoint rules are matched against. It is the path of axum's `OriginalUri` if the
    /// request has one, because `nest` strips the path.
    pub fn endpoint(&self) -> &'a str {
        #[cfg(feature = "axum")]
        if let Some(original) = self.extensions.get::<axum::extract::OriginalUri>() {
            return original.0.path();
        }
        self.uri.path()
    }

    /// Returns the HTTP version.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Returns the header fields.
    pub fn headers(&self) -> &'a HeaderMap {
        self.headers
    }

    /// Returns the extensions.
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

/// Place in a request where a key may be.
///
/// The default is `Authorization: Bearer KEY`, then `x-api-key: KEY`:
///
/// ```
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore, middleware::Credential};
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
    Closure(Arc<ExtractKey>),
}

type ExtractKey = dyn for<'a> Fn(&RequestHead<'a>) -> Option<Cow<'a, str>> + Send + Sync;
type Token<'a> = Cow<'a, str>;

impl Credential {
    /// Reads `Authorization: Bearer KEY` (RFC 6750 §2.1). The scheme is case-insensitive.
    pub fn bearer() -> Self {
        Self(Place::Bearer)
    }

    /// Reads `Authorization: Basic …` with the key as user name (RFC 7617). The password is ignored. `curl -u KEY:`
    /// sends this form.
    pub fn basic() -> Self {
        Self(Place::Basic)
    }

    /// Reads the whole value of another header field.
    pub fn header(name: HeaderName) -> Self {
        Self(Place::Header(name))
    }

    /// Reads the key with a closure. The layer then removes nothing from the request.
    ///
    /// Use this for a key in the query string. There is no built-in way, because URLs end up in the logs of proxies,
    /// in browser histories and in `Referer` fields. For clients that can't send a header field:
    ///
    /// ```
    /// use tower_api_key::middleware::Credential;
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

    /// Returns the header field that may hold the key.
    pub(crate) fn header_name(&self) -> Option<&HeaderName> {
        match &self.0 {
            Place::Bearer | Place::Basic => Some(&header::AUTHORIZATION),
            Place::Header(name) => Some(name),
            Place::Closure(_) => None,
        }
    }

    /// Returns the credential in `value` if it has the most common form; `None` if the value has to be parsed by the
    /// grammar.
    fn common_form<'a>(&self, value: &'a HeaderValue) -> Option<&'a [u8]> {
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
                    require_same(first, token(other)?)?;
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

/// Credential of a request.
pub(crate) struct FoundCredential<'a> {
    pub(crate) token: Cow<'a, str>,
    /// Bit set of the places that contain the credential.
    pub(crate) places: u64,
}

impl FoundCredential<'_> {
    /// Returns whether the key follows `Bearer` and breaks the grammar of RFC 6750 §2.1.
    pub(crate) fn breaks_bearer_grammar(&self, places: &[Credential]) -> bool {
        let is_found = |at: usize| self.places & (1 << at) != 0;
        let is_bearer = places.iter().enumerate().any(|(at, it)| it.is_bearer() && is_found(at));
        is_bearer && !is_b64token(self.token.as_bytes())
    }
}

/// Maximum number of places: the places are a bit set in a `u64`.
pub(crate) const MAX_PLACES: usize = 64;

/// Returns the bytes of the credential and the bit of its place, for the most common form of requests: one place has
/// a credential and no field is repeated. The grammar is not checked. This is sufficient for a look-up in the local
/// cache, because cached keys are well-formed.
pub(crate) fn common_form<'a>(
    places: &[Credential],
    headers: &'a HeaderMap,
) -> Option<(&'a [u8], u64)> {
    if headers.len() > headers.keys_len() {
        return None;
    }
    let mut only = None;
    for (at, place) in places.iter().enumerate() {
        if let Some(value) = headers.get(place.header_name()?)
            && only.replace((place.common_form(value)?, 1 << at)).is_some()
        {
            return None;
        }
    }
    only
}

/// Returns the text after `Bearer` and one space, the most common form.
fn after_bearer(value: &HeaderValue) -> Option<&[u8]> {
    const BEARER: &[u8] = b"Bearer ";
    let (scheme, rest) = value.as_bytes().split_at_checked(BEARER.len())?;
    (scheme == BEARER || scheme.eq_ignore_ascii_case(BEARER)).then_some(rest)
}

/// Returns the credential that the request carries in any of the places. The same credential may be in two places.
pub(crate) fn find<'a>(
    places: &[Credential],
    head: &RequestHead<'a>,
) -> Result<Option<FoundCredential<'a>>, Denial> {
    let mut found: Option<FoundCredential<'a>> = None;
    for (at, place) in places.iter().enumerate() {
        if let Some(token) = place.find(head)? {
            match &mut found {
                Some(first) => {
                    require_same(&first.token, &token)?;
                    first.places |= 1 << at;
                }
                None => found = Some(FoundCredential { token, places: 1 << at }),
            }
        }
    }
    Ok(found)
}

fn require_same(first: &str, second: &str) -> Result<(), MalformedCredential> {
    // The caller sent both, so the comparison need not be in constant time.
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

/// Action for the header fields that held the key, before the inner service gets the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeyHeader {
    Remove,
    MarkSensitive,
}

impl KeyHeader {
    /// Applies the action to the fields in which a key was found. `Authorization` fields of another scheme are not
    /// changed.
    pub(crate) fn apply(self, places: &[Credential], found: u64, headers: &mut HeaderMap) {
        let with_key = places.iter().enumerate().filter(|(at, _)| found & (1 << at) != 0);
        for name in with_key.filter_map(|(_, place)| place.header_name()) {
            match self {
                // Removes all values of the field.
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
