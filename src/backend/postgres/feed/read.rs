//! One read of the table of changes.

use std::time::{Duration, SystemTime};

use serde::Deserialize;

use super::{
    listener::Listener,
    position::{BulkRead, Position},
};
use crate::{backend::postgres::schema, error::StoreError};

/// Maximum number of new changes per read. Beyond it, everything is read again.
pub(super) const MAX_CHANGES: usize = 10_000;

/// The result of one read.
#[derive(Deserialize)]
pub(super) struct FeedRead {
    as_of_micros: u64,
    /// The transaction id from which on the next read must return rows; of lower ones, only those in progress.
    pub(super) next_xid: u64,
    pub(super) in_progress: Vec<u64>,
    /// Digest of the tables and triggers at this read.
    pub(super) shape: String,
    /// State of the triggers. It differs from that of the last read if a trigger was altered meanwhile.
    pub(super) triggers: Option<String>,
    /// Whether the triggers send notifications.
    pub(super) is_notified: bool,
    /// Whether all rows of earlier reads still exist.
    pub(super) is_continuous: bool,
    pub(super) last: Option<Row>,
    pub(super) changes: Option<Vec<Row>>,
}

#[derive(Deserialize)]
pub(super) struct Row {
    /// Random id of the row.
    pub(super) id: String,
    pub(super) revision: u64,
    pub(super) xid: u64,
    pub(super) key_prefix: Option<String>,
    pub(super) api_key_id: Option<i64>,
    pub(super) user_id: Option<i64>,
}

impl FeedRead {
    pub(super) fn as_of(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_micros(self.as_of_micros)
    }
}

const ROW: &str =
    "c.id, c.revision, c.xid::text::bigint AS xid, c.key_prefix, c.api_key_id, c.user_id";

impl Listener {
    /// Returns the start position of a node: what became visible in the last `age`.
    pub(super) async fn start(&self, age: Duration) -> Result<Position, StoreError> {
        #[derive(Deserialize)]
        struct Horizon {
            next_xid: u64,
            in_progress: Vec<u64>,
        }
        let sql = format!(
            "SELECT json_build_object('next_xid', next_xid::text::bigint, 'in_progress', ARRAY(
                SELECT x::text::bigint FROM unnest(in_progress) AS x)) FROM api_key_horizon({})",
            age.as_secs() + 1
        );
        let Horizon { next_xid, in_progress } = self.run_json(&sql).await?;
        Ok(Position::new(next_xid, in_progress))
    }

    /// Reads the rows that became visible since `position`, and the data that shows whether they are complete: in one
    /// statement, so that all of it is from one snapshot.
    pub(super) async fn read(&self, position: &Position) -> Result<FeedRead, StoreError> {
        let limit = MAX_CHANGES + 1;
        let recent = join(position.recent().map(|id| format!("\"{id}\"")));
        let in_progress = join(position.in_progress.iter());
        let bulk = position.bulk().map_or("TRUE".to_owned(), is_complete);
        // Transaction ids ahead of this cluster's came with a dump of another one. The rows are ordered by the index
        // with a limit, so that no plan reads the whole table, whatever the statistics are. On a standby the snapshot
        // does not list transactions in progress.
        let sql = format!(
            "WITH s AS MATERIALIZED (
                SELECT pg_current_snapshot() AS now
            ), last AS MATERIALIZED (
                SELECT {ROW} FROM api_key_changes c
                WHERE c.xid < (SELECT pg_snapshot_xmax(now) FROM s) ORDER BY c.xid DESC, c.revision DESC LIMIT 1
            ), next AS MATERIALIZED (
                SELECT least(
                    CASE WHEN pg_is_in_recovery() THEN pg_snapshot_xmin(now) ELSE pg_snapshot_xmax(now) END::text::bigint,
                    (SELECT xid + 1 FROM last)
                ) AS xid FROM s
            )
            SELECT json_build_object(
                'as_of_micros', (extract(epoch FROM statement_timestamp()) * 1000000)::bigint,
                'next_xid', (SELECT xid FROM next),
                'in_progress', ARRAY(
                    SELECT x::text::bigint FROM s, pg_snapshot_xip(now) AS x
                    WHERE x::text::bigint < (SELECT xid FROM next)),
                'shape', {},
                'triggers', {},
                'is_notified', current_setting('max_prepared_transactions') = '0',
                'is_continuous', NOT EXISTS (
                    SELECT FROM unnest('{{{recent}}}'::uuid[]) AS r (id)
                    WHERE NOT EXISTS (SELECT FROM api_key_changes c WHERE c.id = r.id)) AND {bulk},
                'last', (SELECT row_to_json(last) FROM last),
                'changes', (SELECT json_agg(c) FROM (
                    (SELECT {ROW} FROM api_key_changes c
                        WHERE c.xid >= '{}'::xid8 AND c.xid < (SELECT pg_snapshot_xmax(now) FROM s)
                        ORDER BY c.xid, c.revision LIMIT {limit})
                    UNION ALL
                    (SELECT {ROW} FROM api_key_changes c
                        WHERE c.xid = ANY ('{{{in_progress}}}'::xid8[]) LIMIT {limit})
                ) AS c)
            )",
            schema::SHAPE,
            schema::TRIGGER_STATE,
            position.next_xid,
        );
        self.run_json(&sql).await
    }
}

/// Returns an SQL expression: whether all the rows still exist.
fn is_complete(bulk: &BulkRead) -> String {
    let [before, except] = [&bulk.before, &bulk.except].map(|xids| join(xids.iter()));
    let count = |which: String| {
        format!(
            "(SELECT count(*) FROM api_key_changes c WHERE {which} AND c.xid <> ALL ('{{{except}}}'::xid8[]))"
        )
    };
    let range = count(format!("c.xid >= '{}'::xid8 AND c.xid < '{}'::xid8", bulk.from, bulk.to));
    let single = count(format!("c.xid = ANY ('{{{before}}}'::xid8[])"));
    format!("{range} + {single} >= {}", bulk.rows)
}

fn join(items: impl Iterator<Item = impl ToString>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(",")
}
