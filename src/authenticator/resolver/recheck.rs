//! Rechecks a key that this node has verified, without the key: [`Engine::recheck`].

use std::sync::Arc;

use super::{Cached, Resolver};
use crate::{
    context::{Engine, RecheckFuture},
    denial::Denial,
    metering::Recorder,
    record::KeyRecord,
    store::{LookupKey, VerifiedKey, needs_the_key},
    telemetry,
};

impl Engine for Resolver {
    fn recheck(self: Arc<Self>, key: VerifiedKey) -> RecheckFuture {
        Box::pin(async move {
            let outcome = match self.cached(&key.digest) {
                Cached::Hit(caller) => Ok(caller),
                Cached::Negative(reason) => Err(reason.into()),
                Cached::Miss if key.proof.is_none() => Err(needs_the_key().into()),
                Cached::Miss => self.look_up_key(LookupKey::Verified(Arc::new(key)), None).await,
            };
            if let Err(Denial::Unsupported(error)) = &outcome {
                telemetry::unsupported(error, &self.warned);
            }
            outcome.inspect_err(Denial::log)
        })
    }

    fn note_previous_secret(&self, key: &KeyRecord) {
        let Some(grace) = &key.grace else { return };
        self.previous_secrets.log(key.id.to_string(), &grace.ends_at, self.now().monotonic());
    }

    fn recorder(&self) -> &Arc<Recorder> {
        &self.usage
    }
}
