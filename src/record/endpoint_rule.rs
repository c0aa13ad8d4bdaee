//! Endpoint rules: which endpoints a key may call.

use std::{fmt, str::FromStr};

use http::Method;
use percent_encoding::percent_decode_str;

/// One entry of a key's endpoint allow-list.
///
/// | rule | allows |
/// |---|---|
/// | `/v1/chat` | that path alone, any method |
/// | `/v1/*` | every path below `/v1/`, at any depth, but not `/v1` |
/// | `POST /v1/chat` | that method alone; a `GET` rule allows `HEAD` too (RFC 9110 §9.3.2) |
/// | `/pkg.Service/Method` | a gRPC method |
/// | `*` | every path |
///
/// Paths are compared as they are sent, byte by byte, without the query. A path that servers interpret in different
/// ways never matches any rule: a path with an encoded slash or backslash or a dot segment, each of them encoded once
/// or twice, a doubled slash, a backslash, a control character or a broken escape.
///
/// ```
/// use http::Method;
/// use tower_api_key::record::EndpointRule;
///
/// let rule: EndpointRule = "POST /v1/*".parse()?;
/// assert!(rule.matches(&Method::POST, "/v1/chat"));
/// assert!(!rule.matches(&Method::GET, "/v1/chat"));
/// assert!(!rule.matches(&Method::POST, "/v1/../admin"));
/// # Ok::<(), tower_api_key::record::EndpointRuleError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointRule {
    method: Option<Method>,
    path: Path,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Path {
    Any,
    Exact(Box<str>),
    /// The prefix ends in a slash.
    Below(Box<str>),
}

impl EndpointRule {
    /// Returns whether the rule allows `method` on `path`.
    pub fn matches(&self, method: &Method, path: &str) -> bool {
        if is_ambiguous(path) {
            return false;
        }
        let method_allowed = match &self.method {
            None => true,
            Some(allowed) => {
                allowed == method || (*allowed == Method::GET && *method == Method::HEAD)
            }
        };
        let path_allowed = match &self.path {
            Path::Any => true,
            Path::Exact(exact) => **exact == *path,
            Path::Below(folder) => path.starts_with(&**folder),
        };
        method_allowed && path_allowed
    }

    /// Returns whether the rule allows every request that `other` allows. Ambiguous paths need no care: neither rule
    /// matches them.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let method_covered = match (&self.method, &other.method) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(held), Some(other)) => {
                held == other || (*held == Method::GET && *other == Method::HEAD)
            }
        };
        let path_covered = match (&self.path, &other.path) {
            (Path::Any, _) => true,
            (Path::Exact(held), Path::Exact(other)) => held == other,
            (Path::Below(held), Path::Exact(other) | Path::Below(other)) => {
                other.starts_with(&**held)
            }
            // `*` also matches targets that do not start with a slash: `OPTIONS *` and those of `CONNECT`.
            (Path::Exact(_) | Path::Below(_), Path::Any) | (Path::Exact(_), Path::Below(_)) => {
                false
            }
        };
        method_covered && path_covered
    }
}

/// Returns whether servers may interpret `path` in different ways.
fn is_ambiguous(path: &str) -> bool {
    let escapes = path.bytes().filter(|&byte| byte == b'%').count();
    let decoded = percent_decode_str(path).collect::<Vec<u8>>();
    // Decoding shortens each well-formed escape from three bytes to one.
    if path.len() - decoded.len() != 2 * escapes {
        return true;
    }
    let slashes = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte == b'/').count();
    slashes(&decoded) != slashes(path.as_bytes())
        || decoded.iter().any(|&byte| byte == b'\\' || byte.is_ascii_control())
        || decoded.windows(2).any(|pair| pair == b"//")
        || decoded.windows(3).any(is_escaped_again)
        || decoded.split(|&byte| byte == b'/').any(is_dot_segment)
}

/// Returns whether this is a slash, a backslash or a dot that was escaped twice, for servers that decode twice.
fn is_escaped_again(escape: &[u8]) -> bool {
    [b"%2f", b"%5c", b"%2e"].iter().any(|separator| escape.eq_ignore_ascii_case(*separator))
}

/// Returns whether this is `.` or `..`, also with a path parameter (`..;x`), which some servers remove.
fn is_dot_segment(segment: &[u8]) -> bool {
    let name = segment.split(|&byte| byte == b';').next().unwrap_or(segment);
    name == b"." || name == b".."
}

impl FromStr for EndpointRule {
    type Err = EndpointRuleError;

    fn from_str(rule: &str) -> Result<Self, EndpointRuleError> {
        let error = |reason| EndpointRuleError { rule: rule.chars().take(256).collect(), reason };
        let mut words = rule.split_ascii_whitespace();
        let (method, path) = match (words.next(), words.next(), words.next()) {
            (Some(path), None, _) => (None, path),
            (Some(method), Some(path), None) => (Some(method), path),
            _ => return Err(error("it is neither a path nor a method and a path")),
        };
        let method =
            match method.map(|name| Method::from_bytes(name.to_ascii_uppercase().as_bytes())) {
                None => None,
                Some(Ok(method)) => Some(method),
                Some(Err(_)) => return Err(error("its method is not a token")),
            };
        if path == "*" {
            return Ok(Self { method, path: Path::Any });
        }
        let (folder, below) = match path.strip_suffix("/*") {
            Some(_) => (&path[..path.len() - 1], true),
            None => (path, false),
        };
        if !path.starts_with('/') {
            return Err(error("its path does not start with a slash"));
        }
        if folder.contains('*') {
            return Err(error("a wildcard is allowed only at the end, after a slash"));
        }
        if folder.contains(['?', '#']) || !folder.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(error(
                "its path has bytes that are not allowed in a path: escape them, and leave out the query",
            ));
        }
        if is_ambiguous(folder) {
            return Err(error(
                "its path has a dot segment, a doubled or encoded slash, or a broken escape",
            ));
        }
        let path = if below { Path::Below(folder.into()) } else { Path::Exact(folder.into()) };
        Ok(Self { method, path })
    }
}

impl fmt::Display for EndpointRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(method) = &self.method {
            write!(f, "{method} ")?;
        }
        match &self.path {
            Path::Any => f.write_str("*"),
            Path::Exact(path) => f.write_str(path),
            Path::Below(folder) => write!(f, "{folder}*"),
        }
    }
}

/// The error for a text that is not an [`EndpointRule`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointRuleError {
    rule: String,
    reason: &'static str,
}

impl fmt::Display for EndpointRuleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not an endpoint rule: {}", self.rule, self.reason)
    }
}

impl std::error::Error for EndpointRuleError {}
