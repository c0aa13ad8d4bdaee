//! Logs denials.

use super::Denial;
use crate::{error::StoreErrorKind, telemetry};

impl Denial {
    /// Logs and counts the denial. Faults of the service are logged at WARN or ERROR, and faults of callers at DEBUG.
    pub(crate) fn log(&self) {
        telemetry::count("api_key_denials_total");
        match self {
            // Logged by the resolver, which has the lookup id.
            Self::BadRow(_) => {}
            // Logged by the code that has the remedy.
            Self::Unsupported(_) => {}
            // An attack can cause thousands of these a second.
            Self::Unavailable(error) if error.kind() == StoreErrorKind::Overloaded => {
                tracing::debug!(error = %error, "request rejected: overloaded");
            }
            Self::Unavailable(error) => {
                tracing::warn!(error = %error, "API keys can't be checked");
            }
            Self::LayerMissing => tracing::error!(
                "a handler requires an AuthContext, but no ApiKeyAuthLayer wraps it: \
                 add .layer(ApiKeyAuthLayer::new(store)) to the router, after the route"
            ),
            _ => tracing::debug!(reason = %self, "request denied"),
        }
    }
}
