//! bcrypt under load: few checks at once, a bounded queue.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::task::JoinSet;
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, KeyManager, NewKey,
    key::{KeyHash, KeySchemeBuilder},
    record::KeyRecord,
    store::{Attribution, KeyRepository, StoredKey},
};

use crate::support::{self, alone::is_alone, checks::Checks, old_and_new_keys, send, store_of};

const TEST: &str = "bcrypt_pool::checks_are_few_at_once_and_one_for_each_record";

/// Runs `test` and returns how many checks ran at the same time at most.
async fn most_at_once(checks: &Checks, test: impl Future<Output = ()>) -> usize {
    checks.take_most();
    test.await;
    checks.take_most()
}

/// Resident memory of this process, in bytes.
fn memory() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_are_few_at_once_and_one_for_each_record() {
    // Other tests of the process check bcrypt hashes and use memory as well.
    if !is_alone(TEST) {
        return;
    }
    let checks = Checks::alone().await;
    let cores = std::thread::available_parallelism().unwrap().get();

    let most = most_at_once(&checks, a_thousand_cold_keys_at_once(old_and_new_keys())).await;
    assert!((1..=(cores / 2).max(1)).contains(&most), "{most} checks at once");

    let four = old_and_new_keys().bcrypt_queue(16).bcrypt_slots(4);
    let most = most_at_once(&checks, a_thousand_cold_keys_at_once(four)).await;
    assert!((1..=4).contains(&most), "{most} checks at once");

    let most = most_at_once(&checks, one_key_many_times_at_once()).await;
    assert_eq!(most, 1, "checks at once for one record, where 16 were allowed to others");
}

/// Few of them are checked, the rest is answered with `Retry-After`, and fast keys are answered meanwhile.
async fn a_thousand_cold_keys_at_once(scheme: KeySchemeBuilder) {
    let prefix = |n: usize| format!("key-{n:04}");
    let store = store_of((SLOWEST..1000).map(prefix), 4).await;
    let user = store.find_key(&2.into()).await.unwrap().unwrap().into_record().user;
    // The first to come are the ones that get a place in the queue.
    for n in 0..SLOWEST {
        let hash = KeyHash::bcrypt(&format!("{}-of-mine", prefix(n)), 10).unwrap();
        let key = StoredKey::new(KeyRecord::new(0, prefix(n), user.clone()), hash);
        store.insert_key(&key, &Attribution::default()).await.unwrap();
    }
    let manager = KeyManager::new(store.clone());
    let fast = manager.issue(NewKey::new(user.id, "fast")).await.unwrap();
    // With no memory of answers, so that the fast key is looked up each time.
    let authenticator = Authenticator::builder(store).scheme(scheme.build().unwrap());
    let layer = ApiKeyAuthLayer::from(authenticator.cache_capacity(0).build());
    let before = memory();
    let (mut slow, checked) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    for n in 0..1000 {
        let (layer, checked) = (layer.clone(), Arc::clone(&checked));
        slow.spawn(async move {
            let answer = send(&layer, support::bearer(&format!("{}-of-mine", prefix(n)))).await;
            match answer.status() {
                200 => {
                    checked.fetch_add(1, Ordering::SeqCst);
                }
                503 => assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1),
                other => panic!("{other}"),
            }
            answer.status()
        });
    }
    // While they are at it, a key that needs no bcrypt is answered every time.
    let mut meanwhile = 0;
    while checked.load(Ordering::SeqCst) < SLOWEST / 2 {
        let answer = send(&layer, support::bearer(fast.expose_secret())).await;
        assert_eq!(answer.status(), 200);
        meanwhile += 1;
        tokio::task::yield_now().await;
    }
    // Behind the checks there would be none. How many there are depends on who else uses the cores.
    assert!(meanwhile > 1, "{meanwhile} answers while {} keys were checked", SLOWEST / 2);
    let statuses = slow.join_all().await;
    let count = |status| statuses.iter().filter(|&&found| found == status).count();
    assert!(count(200) >= 17 && count(503) > 0, "{} answered, {} shed", count(200), count(503));
    let grown = memory().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
}

/// So many keys take 55 ms to check, the others 1 ms.
const SLOWEST: usize = 32;

async fn one_key_many_times_at_once() {
    let store = store_of(["key-0001".to_owned()], 6).await;
    let scheme = old_and_new_keys().bcrypt_slots(16).bcrypt_queue(100).build().unwrap();
    let mut callers = JoinSet::new();
    for _ in 0..30 {
        // Callers of one authenticator would share one look-up. These share the pool alone.
        let authenticator = Authenticator::builder(store.clone()).scheme(scheme.clone()).build();
        callers.spawn(async move { authenticator.authenticate("key-0001-of-mine").await.is_ok() });
    }
    assert!(callers.join_all().await.into_iter().all(|ok| ok));
}
