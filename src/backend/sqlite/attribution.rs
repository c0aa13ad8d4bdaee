//! Changes with an [`Attribution`], which the triggers write to the audit.

use std::time::Duration;

use diesel::SqliteConnection;
use serde_json::json;

use super::{BULK_DEADLINE, SqliteStore, execute, immediately, select::time_text};
use crate::{
    backend::sql::statement::{Bind, Statement},
    error::StoreError,
    record::KeyId,
    store::Attribution,
};

/// The table has one row, which no other transaction sees. It is empty again when the transaction is committed, so that
/// statements of other programs are not attributed to this change.
const ATTRIBUTE: &str = "
    INSERT INTO api_key_attribution (id, at, actor, actor_key, reason, request_id)
    SELECT 1, $1 ->> 'at', $1 ->> 'actor', $1 ->> 'actor_key', $1 ->> 'reason', $1 ->> 'request_id'";
const END: &str = "DELETE FROM api_key_attribution";

impl SqliteStore {
    /// Runs the statements of a change in one transaction. `work` gets the time of the change as text.
    pub(super) async fn change<T: Send + 'static>(
        &self,
        by: &Attribution,
        work: impl FnOnce(&mut SqliteConnection, &str) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.change_within(self.0.deadline, by, work).await
    }

    /// Runs the statements of a change of many keys.
    pub(super) async fn change_many<T: Send + 'static>(
        &self,
        by: &Attribution,
        work: impl FnOnce(&mut SqliteConnection, &str) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.change_within(self.0.deadline.max(BULK_DEADLINE), by, work).await
    }

    async fn change_within<T: Send + 'static>(
        &self,
        deadline: Duration,
        by: &Attribution,
        work: impl FnOnce(&mut SqliteConnection, &str) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let now = time_text(self.0.clock.now().into());
        let attribution = json!({
            "at": now,
            "actor": by.actor,
            "actor_key": by.key.as_ref().and_then(KeyId::as_i64),
            "reason": by.reason,
            "request_id": by.request_id,
        });
        let attribute = Statement::new(ATTRIBUTE, [Bind::Text(attribution.to_string())]);
        let transaction = move |connection: &mut SqliteConnection| {
            immediately(connection, |connection| {
                execute(connection, &attribute)?;
                let changed = work(connection, &now)?;
                execute(connection, &Statement::new(END, []))?;
                Ok(changed)
            })
        };
        self.changed(self.0.writer.run(deadline, transaction)).await
    }
}
