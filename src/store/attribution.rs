//! Who makes a change, and why: [`Attribution`].

use crate::record::KeyId;

/// Who makes a change, and why. The audit row of the change contains it.
///
/// The default is a change by the process itself, without a reason.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attribution {
    /// The actor, for people: an e-mail address, or `cli:ada`.
    pub actor: Option<String>,
    /// The key with which the actor makes the change.
    pub key: Option<KeyId>,
    /// Why the change is made.
    pub reason: Option<String>,
    /// The id of the request that makes the change, as in the service's logs.
    pub request_id: Option<String>,
}

impl Attribution {
    /// Sets the actor.
    #[must_use]
    pub fn actor(self, actor: impl Into<String>) -> Self {
        Self { actor: Some(actor.into()), ..self }
    }

    /// Sets the key with which the actor makes the change.
    #[must_use]
    pub fn key(self, key: impl Into<KeyId>) -> Self {
        Self { key: Some(key.into()), ..self }
    }

    /// Sets the reason.
    #[must_use]
    pub fn reason(self, reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..self }
    }

    /// Sets the id of the request.
    #[must_use]
    pub fn request_id(self, id: impl Into<String>) -> Self {
        Self { request_id: Some(id.into()), ..self }
    }
}
