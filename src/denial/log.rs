//! Denials in the log.

use super::Denial;
use crate::{error::StoreErrorKind, telemetry};

impl Denial {
    /// Logs and counts the denial. Faults of this side are loud, denials of strangers are not.
    pub(crate) fn log(&self) {
        telemetry::count("api_key_denials_total");
        match self {
            // Logged where the lookup prefix is known.
            Self::BadRow(_) => {}
            // Logged where it is known what to do.
            Self::Unsupported(_) => {}
            // Under an attack there are thousands of them a second.
            Self::Unavailable(error) if error.kind() == StoreErrorKind::Overloaded => {
                tracing::debug!(error = %error, "request turned away");
            }
            Self::Unavailable(error) => {
                tracing::warn!(error = %error, "API keys can't be checked");
            }
            Self::LayerMissing => tracing::error!(
                "a handler asked for an AuthContext, but no ApiKeyAuthLayer is around it: \
                 add .layer(ApiKeyAuthLayer::new(store)) to the router, after the route"
            ),
            _ => tracing::debug!(reason = %self, "request refused"),
        }
    }
}
