//! Pure rules: what a key allows, decided without I/O. One file a rule.

mod endpoint;
mod network;
mod validity;

pub use endpoint::{EndpointRule, EndpointRuleError};
pub(crate) use network::canonical;
pub use network::{AllowedNetwork, NetworkError};
pub(crate) use validity::validity;

/// Whether an allow-list lets through what `matches` says; an empty list allows everything.
pub(crate) fn allowed<T>(list: &[T], matches: impl Fn(&T) -> bool) -> bool {
    list.is_empty() || list.iter().any(matches)
}
