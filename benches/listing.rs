//! What a page of a list of a million keys costs.
//!
//! `cargo bench --bench listing` fills a PostgreSQL of its own and an SQLite file with a million keys, and reads pages
//! of 100 keys at the start, in the middle and at the end, without a filter and with each filter. A time is the median
//! of the rounds. For PostgreSQL, it prints the index that the plan of each filter uses (`auto_explain`); the plans of
//! SQLite are in the unit tests of `backend::sqlite::select`. The last line is JSON.

mod figures;
#[path = "../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::{path::Path, time::Instant};

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use figures::median;
use serde_json::{Map, Value, json};
use servers::Postgres;
use tower_api_key::{
    PostgresStore, SqliteStore,
    chrono::{TimeDelta, Utc},
    store::{KeyFilter, KeyRepository, ListKeys},
};

const KEYS: i64 = 1_000_000;
const ROUNDS: usize = 11;
const PAGE: u32 = 100;

/// 1,000 users. Of the keys, 1 % are revoked, 10 % expire, 1 % were created with another key, 1 % were not used lately,
/// 0.1 % have the scope `admin`, and 0.01 % a name with `needle`. They were created in a year.
const POSTGRES: &str = "
    INSERT INTO users (email) SELECT 'u' || n FROM generate_series(1, 1000) n;
    ALTER TABLE api_keys DISABLE TRIGGER USER;
    INSERT INTO api_keys (user_id, name, key_prefix, key_hash, is_active, scopes, created_by_key, expires_at,
            last_used_at, created_at)
        SELECT n % 1000 + 1, CASE WHEN n % 10000 = 0 THEN 'needle ' ELSE 'key ' END || n, substr(md5(n::text), 1, 10),
            'sha256$' || md5(n::text) || md5('h' || n), n % 100 <> 1,
            CASE WHEN n % 1000 = 2 THEN '[\"read\", \"admin\"]'::jsonb ELSE '[\"read\"]' END,
            CASE WHEN n % 100 = 3 THEN n % 7919 END, CASE WHEN n % 10 = 4 THEN now() + n % 3650 * INTERVAL '1 h' END,
            now() - CASE WHEN n % 100 = 5 THEN 90 ELSE 1 END * INTERVAL '1 day',
            now() - (1000000 - n) * INTERVAL '31 s'
        FROM generate_series(1, 1000000) n;
    ALTER TABLE api_keys ENABLE TRIGGER USER;
    VACUUM ANALYZE";

const SQLITE: &str = "
    DROP TRIGGER api_key_note_new; DROP TRIGGER api_key_note_replaced;
    WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 1000)
    INSERT INTO users (email) SELECT 'u' || n FROM n;
    WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 1000000)
    INSERT INTO api_keys (user_id, name, key_prefix, key_hash, is_active, scopes, created_by_key, expires_at,
            last_used_at, created_at)
        SELECT n % 1000 + 1, CASE WHEN n % 10000 = 0 THEN 'needle ' ELSE 'key ' END || n, lower(hex(randomblob(5))),
            'sha256$' || lower(hex(randomblob(32))), n % 100 <> 1,
            CASE WHEN n % 1000 = 2 THEN '[\"read\", \"admin\"]' ELSE '[\"read\"]' END,
            CASE WHEN n % 100 = 3 THEN n % 7919 END,
            CASE WHEN n % 10 = 4 THEN datetime('now', (n % 3650) || ' hours') END,
            datetime('now', CASE WHEN n % 100 = 5 THEN '-90 days' ELSE '-1 day' END),
            datetime('now', '-' || ((1000000 - n) * 31) || ' seconds')
        FROM n";

fn filters() -> Vec<(&'static str, KeyFilter)> {
    let (all, now) = (KeyFilter::default, Utc::now());
    vec![
        ("all", all()),
        ("owner", all().owner(7)),
        ("active", all().active()),
        ("revoked", all().revoked()),
        ("expires_before", all().expires_before(now + TimeDelta::hours(20))),
        ("unused_since", all().unused_since(now - TimeDelta::days(30))),
        ("created_before", all().created_before(now - TimeDelta::days(180))),
        ("contains", all().contains("needle")),
        ("scope", all().scope("admin")),
        ("created_by_key", all().created_by_key(103)),
        ("prefix of 2", all().prefix("ab")),
        ("prefix of 5", all().prefix("abcde")),
    ]
}

/// Returns the median time of a page after a key, in milliseconds, and the number of keys in it.
async fn page(store: &impl KeyRepository, filter: &KeyFilter, after: i64) -> (f64, usize) {
    let page = ListKeys::default().filter(filter.clone()).after(after).limit(PAGE);
    let (mut times, mut keys) = (Vec::new(), 0);
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        keys = store.list_keys(&page).await.unwrap().keys.len();
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    (median(&times), keys)
}

async fn measure(
    store: &impl KeyRepository,
    index_of: impl AsyncFn(&KeyFilter) -> Option<String>,
) -> Value {
    let mut figures = Map::new();
    for (name, filter) in filters() {
        let start = page(store, &filter, 0).await;
        let middle = page(store, &filter, KEYS / 2).await;
        // The last full page of a list without a filter.
        let end = page(store, &filter, KEYS - i64::from(PAGE) - 1).await;
        let index = index_of(&filter).await;
        println!(
            "{name:>15}: start {:8.2} ms ({} keys), middle {:8.2} ms ({}), end {:8.2} ms ({}) {}",
            start.0,
            start.1,
            middle.0,
            middle.1,
            end.0,
            end.1,
            index.as_deref().unwrap_or("")
        );
        let ms = |time: f64| (time * 100.0).round() / 100.0;
        figures.insert(
            name.to_owned(),
            json!({
                "start_ms": ms(start.0), "middle_ms": ms(middle.0), "end_ms": ms(end.0),
                "end_over_start": ms(end.0 / start.0), "index": index,
            }),
        );
    }
    Value::Object(figures)
}

/// Returns the index of `api_keys` in the last plan in the log, or the scan without one.
fn index_in(log: &str) -> Option<String> {
    let plan = log.rsplit("plan:").next()?;
    let scan = plan.lines().find(|line| line.contains("on api_keys k"))?;
    // A bitmap of an index is in a line of its own.
    let line = plan.lines().find(|line| line.contains("Bitmap Index Scan")).unwrap_or(scan);
    let words = line.split("  (").next()?.trim().trim_start_matches("->").trim();
    Some(words.to_owned())
}

async fn postgres() -> Value {
    let server = Postgres::with_settings(&["shared_buffers=512MB", "max_wal_size=4GB"]);
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let admin = server.client().await;
    for statement in POSTGRES.split(";\n") {
        admin.batch_execute(statement).await.unwrap();
    }
    let options =
        "options=-csession_preload_libraries%3Dauto_explain%20-cauto_explain.log_min_duration%3D0";
    let separator = if server.url().contains('?') { '&' } else { '?' };
    let explained = PostgresStore::new(&format!("{}{separator}{options}", server.url())).unwrap();
    measure(&store, async |filter: &KeyFilter| {
        let page = ListKeys::default().filter(filter.clone()).after(KEYS / 2).limit(PAGE);
        explained.list_keys(&page).await.unwrap();
        index_in(&server.log())
    })
    .await
}

async fn sqlite(path: &Path) -> Value {
    let store = SqliteStore::open(path).unwrap();
    store.migrate().await.unwrap();
    let mut file = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
    file.batch_execute("PRAGMA cache_size = -200000; PRAGMA synchronous = OFF").unwrap();
    file.batch_execute(SQLITE).unwrap();
    store.migrate().await.unwrap();
    measure(&store, async |_: &KeyFilter| None).await
}

#[tokio::main]
async fn main() {
    println!("PostgreSQL");
    let postgres = postgres().await;
    println!("SQLite");
    let folder = tempfile::tempdir().unwrap();
    let sqlite = sqlite(&folder.path().join("keys.db")).await;
    println!(
        "{}",
        json!({ "bench": "listing", "keys": KEYS, "postgres": postgres, "sqlite": sqlite })
    );
}
