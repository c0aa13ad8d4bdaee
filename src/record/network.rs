//! Networks: the addresses from which a key may be used.

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::{IpNet, Ipv4Net};

/// An address or a CIDR network, v4 or v6.
///
/// A v4-mapped v6 network (`::ffff:10.0.0.0/104`) is the same as the v4 network, and a v4-mapped address is matched as
/// v4. Host bits are allowed: `10.1.2.3/8` is `10.0.0.0/8`.
///
/// ```
/// use tower_api_key::record::AllowedNetwork;
///
/// let office: AllowedNetwork = "192.0.2.0/24".parse()?;
/// assert!(office.contains("192.0.2.9".parse().unwrap()));
/// assert!(office.contains("::ffff:192.0.2.9".parse().unwrap()));
/// assert!(!office.contains("198.51.100.1".parse().unwrap()));
/// # Ok::<(), tower_api_key::record::NetworkError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowedNetwork(IpNet);

impl AllowedNetwork {
    /// Returns whether the network contains `address`.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&canonical(address))
    }

    /// Returns whether the network contains every address of `other`. `::/0` does not contain `0.0.0.0/0`: a v4-mapped
    /// address is matched as v4.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        self.0.contains(&other.0)
    }
}

/// Returns the address, with a v4-mapped v6 address converted to v4.
pub(crate) fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Prefix length of `::ffff:0:0/96`, the v6 addresses that map v4.
const MAPPED_BITS: u8 = 96;

impl FromStr for AllowedNetwork {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let error = || NetworkError(text.chars().take(64).collect());
        let (address, length) = text.split_once('/').map_or((text, None), |(a, l)| (a, Some(l)));
        // ipnet is not used: it ignores a leading zero, which other parsers read as octal.
        let address = address.parse::<IpAddr>().map_err(|_| error())?;
        let network = match length {
            None => IpNet::from(address),
            Some(length) if !length.is_empty() && length.bytes().all(|b| b.is_ascii_digit()) => {
                let length = length.parse().map_err(|_| error())?;
                IpNet::new(address, length).map_err(|_| error())?
            }
            Some(_) => return Err(error()),
        };
        let network = match network {
            IpNet::V6(v6) if v6.prefix_len() >= MAPPED_BITS => v6
                .addr()
                .to_ipv4_mapped()
                .and_then(|v4| Ipv4Net::new(v4, v6.prefix_len() - MAPPED_BITS).ok())
                .map_or(network, IpNet::V4),
            _ => network,
        };
        Ok(Self(network.trunc()))
    }
}

impl From<IpAddr> for AllowedNetwork {
    fn from(address: IpAddr) -> Self {
        Self(IpNet::from(canonical(address)))
    }
}

impl fmt::Display for AllowedNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.prefix_len() == self.0.max_prefix_len() {
            self.0.addr().fmt(f)
        } else {
            self.0.fmt(f)
        }
    }
}

/// The error for a text that is neither an address nor a CIDR network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkError(String);

impl fmt::Display for NetworkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is neither an IP address nor a CIDR network such as 10.0.0.0/8", self.0)
    }
}

impl std::error::Error for NetworkError {}
