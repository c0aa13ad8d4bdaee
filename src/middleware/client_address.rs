//! Finds the client's address of a request: [`ClientAddr`], the connection, or a header field of a trusted proxy.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::credential::RequestHead;
use crate::record::{AllowedNetwork, NetworkError, canonical};

/// Request extension with the address of the peer, the other end of the connection.
///
/// The code that accepts connections inserts it. axum's `ConnectInfo<SocketAddr>` is used as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientAddr(pub IpAddr);

impl From<SocketAddr> for ClientAddr {
    fn from(peer: SocketAddr) -> Self {
        Self(peer.ip())
    }
}

/// Trusted proxies in front of the service, and the header field in which they write the client's address.
///
/// There is only one such field, because a proxy passes on the other one as the client sent it. The client's address is
/// the right-most address that is not a trusted proxy's. If the peer is not a trusted proxy, the field is ignored. If
/// the field can't be parsed from the right up to that address, the address is unknown, and keys with address rules are
/// denied.
///
/// ```
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore, middleware::TrustedProxies};
///
/// let layer = ApiKeyAuthLayer::new(MemoryStore::new())
///     .trusted_proxies(TrustedProxies::x_forwarded_for(["10.0.0.0/8", "fd00::/8"])?);
/// # Ok::<(), tower_api_key::record::NetworkError>(())
/// ```
#[derive(Debug, Clone)]
pub struct TrustedProxies {
    networks: Arc<[AllowedNetwork]>,
    header: ProxyHeader,
}

#[derive(Debug, Clone, Copy)]
enum ProxyHeader {
    Forwarded,
    XForwardedFor,
}

impl TrustedProxies {
    /// Trusts proxies in these networks, which write `Forwarded` (RFC 7239).
    ///
    /// # Errors
    ///
    /// Returns an error if a network is neither an address nor a CIDR network.
    pub fn forwarded<'a>(
        networks: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, NetworkError> {
        Self::new(networks, ProxyHeader::Forwarded)
    }

    /// Trusts proxies in these networks, which write `X-Forwarded-For`.
    ///
    /// # Errors
    ///
    /// Returns an error if a network is neither an address nor a CIDR network.
    pub fn x_forwarded_for<'a>(
        networks: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, NetworkError> {
        Self::new(networks, ProxyHeader::XForwardedFor)
    }

    fn new<'a>(
        networks: impl IntoIterator<Item = &'a str>,
        header: ProxyHeader,
    ) -> Result<Self, NetworkError> {
        let networks = networks.into_iter().map(str::parse).collect::<Result<_, _>>()?;
        Ok(Self { networks, header })
    }

    fn is_trusted(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(address))
    }

    fn client(&self, peer: IpAddr, headers: &HeaderMap) -> Option<IpAddr> {
        if !self.is_trusted(peer) {
            return Some(peer);
        }
        let mut client = peer;
        // Several fields form one list (RFC 9110 §5.3). The right end of the list is in the last field.
        let fields: Vec<&HeaderValue> = headers.get_all(self.header.name()).iter().collect();
        for field in fields.into_iter().rev() {
            for hop in self.header.hops(field.to_str().ok()?)?.into_iter().rev() {
                client = hop?;
                if !self.is_trusted(client) {
                    return Some(client);
                }
            }
        }
        Some(client)
    }
}

/// Address that a proxy writes for a hop; `None` if it can't be parsed.
type Hop = Option<IpAddr>;

impl ProxyHeader {
    fn name(self) -> HeaderName {
        match self {
            Self::Forwarded => header::FORWARDED,
            Self::XForwardedFor => HeaderName::from_static("x-forwarded-for"),
        }
    }

    /// Returns the hops that a field lists, the client first; `None` if the field can't be parsed.
    fn hops(self, list: &str) -> Option<Vec<Hop>> {
        match self {
            Self::Forwarded => forwarded_hops(list),
            Self::XForwardedFor => Some(x_forwarded_for_hops(list)),
        }
    }
}

fn x_forwarded_for_hops(list: &str) -> Vec<Hop> {
    list.split(',').map(|hop| node_address(hop.trim())).collect()
}

/// Parses a list of elements that are separated by commas (RFC 7239 §4). Returns `None` if the list can't be parsed.
fn forwarded_hops(list: &str) -> Option<Vec<Hop>> {
    split_unquoted(list, ',')?.into_iter().map(forwarded_hop).collect()
}

/// Returns the `for` parameter of an element: pairs that are separated by semicolons, each name at most once.
fn forwarded_hop(element: &str) -> Option<Hop> {
    let mut hop = None;
    for pair in split_unquoted(element, ';')?.into_iter().filter(|pair| !pair.trim().is_empty()) {
        let (name, value) = pair.split_once('=')?;
        if name.trim().eq_ignore_ascii_case("for") {
            let address = node_address(unquote(value.trim())?);
            if hop.replace(address).is_some() {
                return None;
            }
        }
    }
    Some(hop.flatten())
}

/// Splits the text at separators outside of quoted strings. Returns `None` if a quoted string is not closed.
fn split_unquoted(text: &str, separator: char) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut is_quoted, mut is_escaped) = (Vec::new(), 0, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' if is_quoted => is_escaped = true,
            '"' => is_quoted = !is_quoted,
            c if c == separator && !is_quoted => {
                parts.push(&text[start..at]);
                start = at + c.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    (!is_quoted).then_some(parts)
}

/// Returns a token unchanged, and a quoted string without its quotes. Addresses need no escapes, so values with
/// escapes are rejected.
fn unquote(value: &str) -> Option<&str> {
    match value.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').filter(|inner| !inner.contains(['"', '\\'])),
        None => Some(value),
    }
}

/// Parses an address with or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`,
/// `[2001:db8::1]:80`. Returns `None` for everything else, such as `unknown` and obfuscated names.
fn node_address(node: &str) -> Hop {
    let bare = node.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(node);
    let address = bare.parse::<IpAddr>().ok();
    address.or_else(|| node.parse::<SocketAddr>().ok().map(|peer| peer.ip())).map(canonical)
}

type FindAddress = dyn Fn(&RequestHead<'_>) -> Option<IpAddr> + Send + Sync;

/// Settings with which a layer finds the client's address.
#[derive(Clone, Default)]
pub(crate) struct ClientAddress {
    pub(crate) closure: Option<Arc<FindAddress>>,
    pub(crate) proxies: Option<TrustedProxies>,
}

impl ClientAddress {
    pub(crate) fn find(&self, head: &RequestHead<'_>) -> Option<IpAddr> {
        let peer = canonical(self.peer(head)?);
        match &self.proxies {
            Some(proxies) => proxies.client(peer, head.headers()),
            None => Some(peer),
        }
    }

    /// Returns whether the address of the peer is known.
    pub(crate) fn has_peer(&self, head: &RequestHead<'_>) -> bool {
        self.peer(head).is_some()
    }

    fn peer(&self, head: &RequestHead<'_>) -> Option<IpAddr> {
        match &self.closure {
            Some(closure) => closure(head),
            None => connection_address(head),
        }
    }
}

fn connection_address(head: &RequestHead<'_>) -> Option<IpAddr> {
    if let Some(ClientAddr(address)) = head.extensions().get() {
        return Some(*address);
    }
    #[cfg(feature = "axum")]
    {
        use axum::extract::connect_info::{ConnectInfo, MockConnectInfo};
        if let Some(ConnectInfo(peer)) = head.extensions().get::<ConnectInfo<SocketAddr>>() {
            return Some(peer.ip());
        }
        // Tests of axum services use this extension.
        if let Some(MockConnectInfo(peer)) = head.extensions().get::<MockConnectInfo<SocketAddr>>()
        {
            return Some(peer.ip());
        }
    }
    None
}

impl fmt::Debug for ClientAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientAddress").field("proxies", &self.proxies).finish_non_exhaustive()
    }
}
