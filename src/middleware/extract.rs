//! [`AuthContext`] as an axum extractor.

use axum::{
    extract::{FromRequestParts, OptionalFromRequestParts},
    http::request::Parts,
};

use crate::{context::AuthContext, denial::Denial};

/// Refuses with 401 behind a layer that let the request through without a key, and with 500 where no
/// layer is around the handler at all; the log line then names the one to add.
impl<S: Send + Sync> FromRequestParts<S> for AuthContext {
    type Rejection = Denial;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Denial> {
        from_extensions(parts)?.ok_or(Denial::MissingCredential)
    }
}

/// `None` behind a layer that let the request through without a key.
impl<S: Send + Sync> OptionalFromRequestParts<S> for AuthContext {
    type Rejection = Denial;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Denial> {
        from_extensions(parts)
    }
}

fn from_extensions(parts: &Parts) -> Result<Option<AuthContext>, Denial> {
    AuthContext::of(&parts.extensions).map(Option::<&_>::cloned).inspect_err(Denial::log)
}
