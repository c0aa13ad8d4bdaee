//! Implements the axum extractor for [`AuthContext`].

use axum::{
    extract::{FromRequestParts, OptionalFromRequestParts},
    http::request::Parts,
};

use crate::{context::AuthContext, denial::Denial};

/// Rejects with 401 behind a layer that let the request through without a key, and with 500 if no auth layer wraps
/// the handler. In the second case the log message names the layer to add.
impl<S: Send + Sync> FromRequestParts<S> for AuthContext {
    type Rejection = Denial;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Denial> {
        from_extensions(parts)?.ok_or(Denial::MissingCredential)
    }
}

/// Returns `None` behind a layer that let the request through without a key.
impl<S: Send + Sync> OptionalFromRequestParts<S> for AuthContext {
    type Rejection = Denial;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Denial> {
        from_extensions(parts)
    }
}

fn from_extensions(parts: &Parts) -> Result<Option<AuthContext>, Denial> {
    AuthContext::of(&parts.extensions).map(Option::<&_>::cloned).inspect_err(Denial::log)
}
