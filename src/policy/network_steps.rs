//! The networks that contain a client address, by prefix length: [`NetworkSteps`].

use std::net::IpAddr;

use ipnet::IpNet;

use crate::record::canonical;

/// Maximum number of steps of an address family.
pub(crate) const STEPS: usize = 4;

/// IPv6 prefix lengths of the steps. One host has all addresses of a /64, a site a /56 or a /48, and a provider at
/// least a /32.
const V6_LENGTHS: [u8; STEPS] = [64, 56, 48, 32];
const V4_LENGTHS: [u8; 2] = [32, 24];

/// A network of one step. All clients with an unknown address share one network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Network(Option<IpNet>);

/// The networks that contain a client address, the narrowest first. A v4-mapped address counts as its v4 address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NetworkSteps(Option<IpAddr>);

impl NetworkSteps {
    pub(crate) fn of(address: Option<IpAddr>) -> Self {
        Self(address.map(canonical))
    }

    /// Returns the network of the host alone.
    pub(crate) fn host(self) -> Network {
        self.at(0).unwrap_or(Network(None))
    }

    /// Returns the number of each step, and its network.
    pub(crate) fn iter(self) -> impl Iterator<Item = (usize, Network)> {
        (0..STEPS).filter_map(move |step| Some((step, self.at(step)?)))
    }

    fn at(self, step: usize) -> Option<Network> {
        let lengths: &[u8] = match self.0 {
            None => return (step == 0).then_some(Network(None)),
            Some(IpAddr::V4(_)) => &V4_LENGTHS,
            Some(IpAddr::V6(_)) => &V6_LENGTHS,
        };
        let network = IpNet::new(self.0?, *lengths.get(step)?).ok()?;
        Some(Network(Some(network.trunc())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(text: &str) -> Vec<Network> {
        NetworkSteps::of(Some(text.parse().unwrap())).iter().map(|(_, network)| network).collect()
    }

    #[test]
    fn a_v6_host_is_its_network_and_a_mapped_address_is_v4() {
        assert_eq!(steps("2001:db8::1"), steps("2001:db8::ffff:2"));
        assert_ne!(steps("2001:db8::1")[0], steps("2001:db8:0:1::1")[0]);
        assert_eq!(steps("::ffff:192.0.2.1"), steps("192.0.2.1"));
    }

    #[test]
    fn wider_networks_are_shared() {
        assert_eq!(steps("192.0.2.1").len(), 2);
        assert_eq!(steps("192.0.2.1")[1], steps("192.0.2.200")[1]);
        assert_ne!(steps("192.0.2.1")[1], steps("192.0.3.1")[1]);
        let (one, other) = (steps("2001:db8:1:200::1"), steps("2001:db8:1:2ff::1"));
        assert_eq!((one.len(), &one[1..]), (STEPS, &other[1..]));
        assert_eq!(steps("2001:db8:1:200::1")[2], steps("2001:db8:1:ff00::1")[2]);
        assert_eq!(steps("2001:db8:1::1")[3], steps("2001:db8:ffff::1")[3]);
    }

    #[test]
    fn clients_without_an_address_are_one_network() {
        let unknown: Vec<_> = NetworkSteps::of(None).iter().collect();
        assert_eq!(unknown, [(0, Network(None))]);
    }
}
