//! Pure rules: what a key allows, decided without I/O. One file a rule.

mod network_steps;
mod scope;
mod validity;

#[cfg(feature = "_sql")]
pub(crate) use self::scope::wildcard;
pub(crate) use self::{
    network_steps::{Network, NetworkSteps, STEPS},
    scope::grants,
    validity::validity,
};

/// Whether an allow-list lets through what `matches` says; an empty list allows everything.
pub(crate) fn allowed<T>(list: &[T], matches: impl Fn(&T) -> bool) -> bool {
    list.is_empty() || list.iter().any(matches)
}
