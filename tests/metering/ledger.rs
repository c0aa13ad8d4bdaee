//! The rule of the ledger is written three times, in Rust, for SQLite and in PostgreSQL's own language: all must
//! say the same, whatever is requested in whatever order, and never grant what is not there.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
    time::SystemTime,
};

use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{Config, TestRunner},
};
use tower_api_key::{
    KeyManager, MemoryStore, NewKey, PostgresStore, SqliteStore,
    record::{Budget, BudgetPeriod},
    store::{KeyRepository, KeyUsage, LeaseRequest, UsageBatch},
};

use crate::support::servers::Postgres;

const LIMIT_CENTS: u64 = 10;
const LIMIT: i64 = LIMIT_CENTS as i64 * 1_000_000;

#[derive(Debug, Clone)]
enum Step {
    /// Holder, amount, what of it is needed; `is_late` is for one that a newer one has overtaken.
    Request { holder: usize, amount: i64, needed: i64, is_late: bool },
    /// Holder, cost, what of it was settled from the lease.
    Charge { holder: usize, cost: i64, settled: i64 },
}

fn step() -> impl Strategy<Value = Step> {
    // Most of them near the limit, or nothing.
    let amount = || prop_oneof![Just(0), 1..LIMIT / 4, 1..LIMIT * 2, Just(i64::MAX)];
    let request = (0..3_usize, amount(), amount(), prop::bool::weighted(0.2)).prop_map(
        |(holder, amount, needed, is_late)| Step::Request { holder, amount, needed, is_late },
    );
    let charge = (0..3_usize, 0..LIMIT / 4, 0..LIMIT / 4)
        .prop_map(|(holder, cost, settled)| Step::Charge { holder, cost, settled });
    prop_oneof![3 => request, 1 => charge]
}

/// What is granted at each step, and what stands in the totals at the end.
async fn carry_out<R: KeyRepository + Clone>(
    store: &R,
    period: BudgetPeriod,
    steps: &[Step],
) -> (Vec<Option<i64>>, i64) {
    let manager = KeyManager::new(store.clone());
    static RUNS: AtomicU64 = AtomicU64::new(0);
    let number = RUNS.fetch_add(1, SeqCst);
    let user = manager.create_user(&format!("{number}@example.com"), "user").await.unwrap();
    let budget = Budget { limit_cents: LIMIT_CENTS, period };
    let key = manager.issue(NewKey::new(user.id, "k").budget(budget)).await.unwrap();
    let id = &key.record().id;
    let mut granted = Vec::new();
    for (sequence, step) in (10..).zip(steps) {
        match *step {
            Step::Request { holder, amount, needed, is_late } => {
                let sequence = if is_late { sequence - 9 } else { sequence };
                let mut request =
                    LeaseRequest::new(id.clone(), holder.to_string(), sequence, amount);
                request.needed_micro_cents = needed;
                granted.push(Some(store.lease(&request).await.unwrap().amount_micro_cents));
            }
            Step::Charge { holder, cost, settled } => {
                let mut usage = KeyUsage::new(id.clone());
                (usage.cost_micro_cents, usage.settled_micro_cents) = (cost, settled);
                // Writers are cached: those of another key are others.
                let mut batch = UsageBatch::new(
                    holder.to_string(),
                    number * 1000 + sequence,
                    SystemTime::now(),
                );
                batch.entries.push(usage);
                store.record_usage(&batch).await.unwrap();
                granted.push(None);
            }
        }
    }
    let spent = store.find_key(id).await.unwrap().unwrap().into_record().usage.cost_micro_cents;
    (granted, spent)
}

/// Whoever is granted more than it had is granted what is there.
fn nothing_is_granted_twice(steps: &[Step], granted: &[Option<i64>]) {
    let (mut leases, mut spent) = (HashMap::new(), 0);
    for (step, granted) in steps.iter().zip(granted) {
        match *step {
            Step::Request { holder, .. } => {
                let granted = granted.unwrap();
                let before = leases.insert(holder, granted).unwrap_or(0);
                let all = leases.values().fold(spent, |sum: i64, lease| sum + lease);
                assert!(granted <= before || all <= LIMIT, "{all} after {step:?}");
            }
            Step::Charge { holder, cost, settled } => {
                spent += cost;
                leases
                    .entry(holder)
                    .and_modify(|lease: &mut i64| *lease = (*lease - settled).max(0));
            }
        }
    }
}

#[test]
fn all_ledgers_say_the_same_and_grant_nothing_twice() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = Postgres::start();
    let (memory, sqlite, postgres) = runtime.block_on(async {
        let sqlite = SqliteStore::in_memory().unwrap();
        sqlite.migrate().await.unwrap();
        let postgres = PostgresStore::new(&server.url()).unwrap();
        postgres.migrate().await.unwrap();
        (MemoryStore::new(), sqlite, postgres)
    });
    let period = prop_oneof![Just(BudgetPeriod::Total), Just(BudgetPeriod::Monthly)];
    let config = Config { cases: 100, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&(period, vec(step(), 1..20)), |(period, steps)| {
        runtime.block_on(async {
            let by_memory = carry_out(&memory, period, &steps).await;
            nothing_is_granted_twice(&steps, &by_memory.0);
            prop_assert_eq!(&carry_out(&sqlite, period, &steps).await, &by_memory);
            prop_assert_eq!(&carry_out(&postgres, period, &steps).await, &by_memory);
            Ok(())
        })
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}
