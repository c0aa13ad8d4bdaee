//! Pure rules: what a key allows, decided without I/O. Each file holds one rule.

mod ceiling;
mod network_steps;
mod scope;
mod validity;

pub use self::ceiling::CeilingField;
#[cfg(feature = "_sql")]
pub(crate) use self::scope::wildcard;
pub(crate) use self::{
    ceiling::{GrantableOwners, ceiling},
    network_steps::{Network, NetworkSteps, STEPS},
    scope::grants,
    validity::validity,
};

/// Returns whether an allow-list allows a value: `matches` is true for one of its entries, or the list is empty.
pub(crate) fn allowed<T>(list: &[T], matches: impl Fn(&T) -> bool) -> bool {
    list.is_empty() || list.iter().any(matches)
}
