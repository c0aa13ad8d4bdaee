//! What the crate says in logs. Nothing here ever gets a key, a hash or a credential.

use crate::{
    error::{StoreError, StoreErrorKind},
    respond::Denial,
};

/// A row under this lookup prefix could not be decoded; the error says which, where the store knows.
pub(crate) fn bad_row(prefix: &str, error: &StoreError) {
    let cause = std::error::Error::source(error).map(ToString::to_string);
    tracing::error!(key_prefix = prefix, error = %error, cause, "an API key row can't be used");
}

/// A request was refused. Faults of ours are loud, refusals of strangers are not.
pub(crate) fn denied(denial: &Denial) {
    match denial {
        // Logged where the lookup prefix is known.
        Denial::BadRow(_) => {}
        // Under an attack there are thousands of them a second.
        Denial::Unavailable(error) if error.kind() == StoreErrorKind::Overloaded => {
            tracing::debug!(error = %error, "request turned away");
        }
        Denial::Unavailable(error) => {
            let cause = std::error::Error::source(error).map(ToString::to_string);
            tracing::warn!(error = %error, cause, "API keys can't be checked");
        }
        Denial::LayerMissing => tracing::error!(
            "a handler asked for an AuthContext, but no ApiKeyAuthLayer is around it: \
             add .layer(ApiKeyAuthLayer::new(store)) to the router, after the route"
        ),
        _ => tracing::debug!(reason = %denial, "request refused"),
    }
}

/// A fast hash could not be written beside a slow one; the key goes on working.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(crate) fn upgrade_failed(error: &StoreError) {
    tracing::warn!(error = %error, "the fast hash of an API key could not be stored");
}
