//! Pure rules: what a key allows, decided without I/O. One file a rule.

mod endpoint;
mod network;
mod network_steps;
mod scope;
mod validity;

pub use endpoint::{EndpointRule, EndpointRuleError};
pub(crate) use network::canonical;
pub use network::{AllowedNetwork, NetworkError};
pub(crate) use network_steps::{Network, NetworkSteps, STEPS};
pub(crate) use scope::grants;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(crate) use scope::wildcard;
pub(crate) use validity::validity;

/// Whether an allow-list lets through what `matches` says; an empty list allows everything.
pub(crate) fn allowed<T>(list: &[T], matches: impl Fn(&T) -> bool) -> bool {
    list.is_empty() || list.iter().any(matches)
}

/// A rule travels as the text that it was written as.
macro_rules! travels_as_text {
    ($($rule:ident),*) => {$(
        impl serde::Serialize for $rule {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $rule {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

travels_as_text!(EndpointRule, AllowedNetwork);
