//! Whether changes are sure to be in the table: [`Completeness`].

use serde::Deserialize;

use super::listener::Listener;
use crate::{backend::postgres::schema, error::StoreError};

/// What was found out about the tables and their triggers, for as long as none of them is altered: a read compares a
/// digest of them, and looks at them one by one only if it differs.
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
    /// Returns why changes may be missing in a read that found this `shape`, if they may. The outer `None`: the
    /// tables were altered since, so that nothing is known about that read.
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
