//! Where a request comes from: [`ClientAddr`], the connection, or a header of a trusted proxy.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::credential::RequestHead;
use crate::record::{AllowedNetwork, NetworkError, canonical};

/// A request extension: the address of the peer at the other end of the connection.
///
/// Whoever accepts connections puts it there; axum's `ConnectInfo<SocketAddr>` does as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientAddr(pub IpAddr);

impl From<SocketAddr> for ClientAddr {
    fn from(peer: SocketAddr) -> Self {
        Self(peer.ip())
    }
}

/// The proxies in front of the service whose word on the client's address is taken, and the header
/// field that they say it in. It has to be one: a proxy passes on the other one as the client sent it.
///
/// The client is the right-most address that is not a trusted proxy's. If the peer is no trusted
/// proxy, the field is not looked at. If the field can't be read from the right up to there, the
/// address is unknown, and keys with address rules are refused.
///
/// ```
/// use tower_api_key::{ApiKeyAuthLayer, MemoryStore, TrustedProxies};
///
/// let layer = ApiKeyAuthLayer::new(MemoryStore::new())
///     .trusted_proxies(TrustedProxies::x_forwarded_for(["10.0.0.0/8", "fd00::/8"])?);
/// # Ok::<(), tower_api_key::NetworkError>(())
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
    /// Proxies in these networks that write `Forwarded` (RFC 7239).
    ///
    /// # Errors
    ///
    /// If one of them is neither an address nor a CIDR network.
    pub fn forwarded<'a>(
        networks: impl IntoIterator<Item = &'a str>,
    ) -> Result<Self, NetworkError> {
        Self::new(networks, ProxyHeader::Forwarded)
    }

    /// Proxies in these networks that write `X-Forwarded-For`.
    ///
    /// # Errors
    ///
    /// If one of them is neither an address nor a CIDR network.
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

    fn trusts(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(address))
    }

    fn client(&self, peer: IpAddr, headers: &HeaderMap) -> Option<IpAddr> {
        if !self.trusts(peer) {
            return Some(peer);
        }
        let mut client = peer;
        // Several fields are one list (RFC 9110 §5.3); the last field has its right end.
        let fields: Vec<&HeaderValue> = headers.get_all(self.header.name()).iter().collect();
        for field in fields.into_iter().rev() {
            for hop in self.header.hops(field.to_str().ok()?)?.into_iter().rev() {
                client = hop?;
                if !self.trusts(client) {
                    return Some(client);
                }
            }
        }
        Some(client)
    }
}

/// The address that a proxy names, if it names one that can be read.
type Hop = Option<IpAddr>;

impl ProxyHeader {
    fn name(self) -> HeaderName {
        match self {
            Self::Forwarded => header::FORWARDED,
            Self::XForwardedFor => HeaderName::from_static("x-forwarded-for"),
        }
    }

    /// The hops that a field lists, the client first; `None` if it can't be taken apart.
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

/// RFC 7239 §4: elements with commas between them. `None` if the list can't be taken apart.
fn forwarded_hops(list: &str) -> Option<Vec<Hop>> {
    split_unquoted(list, ',')?.into_iter().map(forwarded_hop).collect()
}

/// The `for` of an element: pairs with semicolons between them, each name at most once.
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

/// Splits at separators outside of quoted strings; `None` if a quoted string does not end.
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

/// A token as it is, a quoted string without its quotes. No address needs an escape.
fn unquote(value: &str) -> Option<&str> {
    match value.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"').filter(|inner| !inner.contains(['"', '\\'])),
        None => Some(value),
    }
}

/// An address with or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`,
/// `[2001:db8::1]:80`. Nothing else is one: not `unknown`, not an obfuscated name.
fn node_address(node: &str) -> Hop {
    let bare = node.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(node);
    let address = bare.parse::<IpAddr>().ok();
    address.or_else(|| node.parse::<SocketAddr>().ok().map(|peer| peer.ip())).map(canonical)
}

type FindAddress = dyn Fn(&RequestHead<'_>) -> Option<IpAddr> + Send + Sync;

/// How a layer learns where a request comes from.
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

    /// Whether the other end of the connection is known.
    pub(crate) fn has_peer(&self, head: &RequestHead<'_>) -> bool {
        self.peer(head).is_some()
    }

    fn peer(&self, head: &RequestHead<'_>) -> Option<IpAddr> {
        match &self.closure {
            Some(closure) => closure(head),
            None => connection(head),
        }
    }
}

fn connection(head: &RequestHead<'_>) -> Option<IpAddr> {
    if let Some(ClientAddr(address)) = head.extensions().get() {
        return Some(*address);
    }
    #[cfg(feature = "axum")]
    {
        use axum::extract::connect_info::{ConnectInfo, MockConnectInfo};
        if let Some(ConnectInfo(peer)) = head.extensions().get::<ConnectInfo<SocketAddr>>() {
            return Some(peer.ip());
        }
        // What axum's users put there in tests.
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
