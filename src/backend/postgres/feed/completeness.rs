//! The check whether the table contains all changes: [`Completeness`].

use serde::Deserialize;

use super::listener::Listener;
use crate::{backend::postgres::schema, error::StoreError};

/// Cached result of the check of the tables and their triggers. It is valid until one of them is altered: a read
/// compares a digest of them, and checks them one by one only if it differs.
#[derive(Default)]
pub(super) struct Completeness {
    known: Option<Checked>,
}

#[derive(Deserialize)]
struct Checked {
    shape: String,
    fault: Option<String>,
}

impl Completeness {
    /// Returns why changes may be missing in a read with this `shape`, if they may. The outer `None` means that the
    /// tables were altered since, so that the completeness of the read is unknown.
    pub(super) async fn fault_of(
        &mut self,
        shape: &str,
        listener: &Listener,
    ) -> Result<Option<Option<String>>, StoreError> {
        if self.known.as_ref().is_none_or(|known| known.shape != shape) {
            let sql = format!(
                "SELECT json_build_object('shape', {}, 'fault', {})",
                schema::SHAPE,
                schema::incompleteness()
            );
            self.known = Some(listener.run_json(&sql).await?);
        }
        let known = self.known.as_ref().filter(|known| known.shape == shape);
        Ok(known.map(|known| known.fault.clone()))
    }
}
