//! Values in adopted tables: rows that worked before go on working, and a team sees beforehand which ones fail and
//! which ones change their meaning.

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use tower_api_key::{
    AuthContext, Authenticator, Denial, KeyScheme, PostgresStore, SqliteStore,
    backend::{FindingKind, KeyReview, MigrationReport},
    key::{KeyFormat, KeyHash},
    record::{Budget, BudgetPeriod},
    store::{KeyRepository, LeaseRequest},
};

use crate::support::servers::Postgres;

const TABLES: &str = "
    CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT);
    INSERT INTO users VALUES (1, 'ada@example.com');
    CREATE TABLE api_keys (id INTEGER PRIMARY KEY, user_id INTEGER, name TEXT, key_prefix TEXT, key_hash TEXT,
        is_active BOOLEAN, permissions TEXT, scopes TEXT, rate_limit_per_minute INTEGER, rate_limit_per_day INTEGER,
        allowed_ips TEXT, budget_limit_cents INTEGER, budget_type TEXT);";

/// The assignments that make one key each of a plain one, in the order of their ids.
fn tables_with(keys: &[&str]) -> String {
    let mut sql = format!("BEGIN;{TABLES}");
    for (id, change) in (1..).zip(keys) {
        // Most of them are reviewed alone.
        let hash =
            if id < 10 { KeyHash::bcrypt(&key(id), 4).unwrap() } else { KeyHash::sha256("") };
        let hash = hash.expose_hash();
        let prefix = &key(id)[..8];
        sql += &format!(
            "INSERT INTO api_keys (id, user_id, name, key_prefix, key_hash, is_active)
                VALUES ({id}, 1, 'k', '{prefix}', '{hash}', TRUE);
            UPDATE api_keys SET {change} WHERE id = {id};"
        );
    }
    sql + "COMMIT"
}

fn key(id: i64) -> String {
    format!("sk-{id:05}-secret")
}

async fn authenticate(store: &impl CloneStore, id: i64) -> Result<AuthContext, Denial> {
    let scheme = KeyScheme::builder().format(KeyFormat::first_chars(8).unwrap()).build().unwrap();
    Authenticator::builder(store.clone()).scheme(scheme).build().authenticate(&key(id)).await
}

trait CloneStore: KeyRepository + Clone {}
impl<S: KeyRepository + Clone> CloneStore for S {}

/// Runs the same on both databases: `check` gets the store, which is not migrated, and its reviews.
macro_rules! on_both {
    ($($test:ident: $keys:expr;)*) => {
        mod postgres {
            use super::*;
            $(#[tokio::test] async fn $test() {
                let server = Postgres::start();
                server.client().await.batch_execute(&tables_with(&$keys)).await.unwrap();
                let store = PostgresStore::new(&server.url()).unwrap();
                let reports = [store.migrate().await.unwrap(), store.migrate().await.unwrap()];
                let review = store.review_keys().await.unwrap();
                super::$test(store, reports, review).await;
            })*
        }
        mod sqlite {
            use super::*;
            $(#[tokio::test] async fn $test() {
                let folder = tempfile::tempdir().unwrap();
                let file = folder.path().join("keys.db");
                let mut orm = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
                orm.batch_execute(&tables_with(&$keys)).unwrap();
                let store = SqliteStore::open(&file).unwrap();
                let reports = [store.migrate().await.unwrap(), store.migrate().await.unwrap()];
                let review = store.review_keys().await.unwrap();
                super::$test(store, reports, review).await;
            })*
        }
    };
}

on_both! {
    rows_that_worked_before_go_on_working: WORKING;
    a_review_lists_what_fails_and_what_changes_its_meaning: REVIEWED;
    a_review_of_many_keys_counts_all_and_lists_a_thousand_findings: ["name = 'k'", "rate_limit_per_day = -1"].repeat(1_200);
}

const WORKING: [&str; 8] = [
    "rate_limit_per_minute = -1, rate_limit_per_day = 5",
    "budget_limit_cents = -1, budget_type = 'none'",
    "budget_type = ''",
    "budget_type = 'quarterly'",
    "budget_limit_cents = 15, budget_type = ''",
    "permissions = '{\"chat\": {\"read\": true, \"write\": false}, \"models\": [\"a\"], \"n\": 1}'",
    "rate_limit_per_minute = -2",
    "budget_limit_cents = 15, budget_type = 'none'",
];

async fn rows_that_worked_before_go_on_working(
    store: impl CloneStore,
    _: [MigrationReport; 2],
    _: KeyReview,
) {
    let record = async |id| authenticate(&store, id).await.map(|caller| caller.key().clone());
    let limits = record(1).await.unwrap().rate_limits;
    assert_eq!((limits.per_minute, limits.per_day), (None, Some(5)));
    for id in 2..=4 {
        assert_eq!(record(id).await.unwrap().budget, None, "{id}");
        let ask = LeaseRequest::new(id.into(), "node", 1, i64::MAX / 2);
        let lease = store.lease(&ask).await.unwrap();
        assert!(lease.amount_micro_cents > i64::MAX / 8, "{id}: {lease:?}");
        assert_eq!(lease.resets_at, None);
    }
    let total = Budget { limit_cents: 15, period: BudgetPeriod::Total };
    assert_eq!(record(5).await.unwrap().budget, Some(total));
    let mut ask = LeaseRequest::new(5.into(), "node", 1, 20_000_000);
    ask.needed_micro_cents = 15_000_000;
    assert_eq!(store.lease(&ask).await.unwrap().amount_micro_cents, 15_000_000);
    assert_eq!(record(6).await.unwrap().permissions, ["chat:read", "models:a"]);
    for id in 7..=8 {
        assert!(matches!(record(id).await, Err(Denial::BadRow(_))), "{id}");
    }
    assert!(store.lease(&LeaseRequest::new(8.into(), "node", 1, 5)).await.is_err());
}

const REVIEWED: [&str; 9] = [
    "name = 'nothing to find'",
    "rate_limit_per_minute = -1, budget_limit_cents = -1",
    "scopes = '[\"chat:*\", \"read\", \"*\", \"a*\"]'",
    "permissions = '{\"chat\": {\"read\": true}}', scopes = '{\"read\": true}'",
    "budget_limit_cents = 15",
    "allowed_ips = '[\"10.0.0.0/33\"]', rate_limit_per_day = -2, scopes = '[\"*\"]'",
    "key_hash = 'hunter2'",
    "user_id = 4711",
    "key_prefix = NULL",
];

async fn a_review_lists_what_fails_and_what_changes_its_meaning(
    store: impl CloneStore,
    reports: [MigrationReport; 2],
    review: KeyReview,
) {
    use FindingKind::{ChangesMeaning, Fails};
    assert_eq!((review.keys, review.failing_keys, review.changed_keys), (9, 4, 4));
    let mut found: Vec<_> = review
        .findings
        .iter()
        .map(|finding| (finding.key.as_i64().unwrap(), finding.column, finding.kind))
        .collect();
    found.sort_by_key(|(id, column, _)| (*id, *column));
    assert_eq!(
        found,
        [
            (2, "budget_limit_cents", ChangesMeaning),
            (2, "rate_limit_per_minute", ChangesMeaning),
            (3, "scopes", ChangesMeaning),
            (4, "permissions", ChangesMeaning),
            (5, "budget_type", ChangesMeaning),
            (6, "allowed_ips", Fails),
            (6, "rate_limit_per_day", Fails),
            (6, "scopes", ChangesMeaning),
            (7, "key_hash", Fails),
            (8, "user_id", Fails),
            (9, "key_prefix", Fails),
        ]
    );
    let reason = |column| {
        let finding = review.findings.iter().find(|finding| finding.column == column);
        finding.unwrap().reason.as_str()
    };
    assert!(reason("scopes").contains("[\"chat:*\", \"*\"]"), "{}", reason("scopes"));
    assert!(reason("permissions").contains("chat:read"), "{}", reason("permissions"));
    assert!(!format!("{review:?}").contains("hunter2"));
    // It was adopted once, and what is listed as failing fails.
    let [first, second] = reports;
    assert_eq!((first.adopted_keys.as_ref(), second.adopted_keys), (Some(&review), None));
    for id in 1..=9 {
        assert_eq!(authenticate(&store, id).await.is_ok(), id < 6, "{id}");
    }
}

async fn a_review_of_many_keys_counts_all_and_lists_a_thousand_findings(
    _: impl CloneStore,
    _: [MigrationReport; 2],
    review: KeyReview,
) {
    assert_eq!((review.keys, review.failing_keys, review.changed_keys), (2_400, 0, 1_200));
    assert_eq!(review.findings.len(), 1_000);
    assert_eq!(review.findings[999].key, 2_000.into());
}

#[tokio::test]
async fn a_migration_of_a_new_database_adopts_no_keys() {
    let store = SqliteStore::in_memory().unwrap();
    assert_eq!(store.migrate().await.unwrap(), MigrationReport::default());
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    assert_eq!(store.migrate().await.unwrap(), MigrationReport::default());
    assert_eq!(store.review_keys().await.unwrap(), KeyReview::default());
}
