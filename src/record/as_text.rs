//! Serde formats of rules.

use super::{AllowedNetwork, EndpointRule};

/// Serializes a rule as the text that it was parsed from.
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
