//! bcrypt under load and under attack: few checks at once, a bounded queue, rationed failures.

mod support;

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use support::{fixture, send};
use tokio::{runtime, task::JoinSet};
use tower_api_key::*;

/// Keys `PREFIX-of-mine`, one for each prefix of 8 characters, in a store of their own.
async fn store_of(prefixes: impl IntoIterator<Item = String>, cost: u32) -> MemoryStore {
    let store = MemoryStore::new();
    let user = store.insert_user("ada@example.com", "user").await.unwrap();
    for prefix in prefixes {
        let hash = KeyHash::bcrypt(&format!("{prefix}-of-mine"), cost).unwrap();
        let record = KeyRecord::new(0, prefix, user.clone());
        store.insert_key(&StoredKey::new(record, hash)).await.unwrap();
    }
    store
}

fn scheme() -> KeySchemeBuilder {
    KeyScheme::builder()
        .format(KeyFormat::structured("tak", "live").unwrap())
        .format(KeyFormat::first_chars(8).unwrap())
}

fn is_overloaded(denial: &Denial) -> bool {
    matches!(denial, Denial::Unavailable(error) if error.kind() == StoreErrorKind::Overloaded)
}

/// Runs `test` and returns how many threads beside the workers it took: each check that runs at the
/// same time as others needs one. Tokio starts a few more, because a check gives up its slot a moment
/// before its thread is free.
fn blocking_threads(test: impl Future<Output = ()> + Send + 'static) -> usize {
    const WORKERS: usize = 2;
    let started = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&started);
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .on_thread_start(move || {
            count.fetch_add(1, Ordering::Relaxed);
        })
        .build()
        .unwrap();
    runtime.block_on(async { tokio::spawn(test).await.unwrap() });
    started.load(Ordering::Relaxed) - WORKERS
}

/// Resident memory of this process, in bytes.
fn memory() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn a_thousand_cold_bcrypt_keys_at_once_run_few_checks_and_the_rest_is_told_to_come_again() {
    let threads = blocking_threads(async {
        let prefix = |n: usize| format!("key-{n:04}");
        let store = store_of((0..1000).map(prefix), 4).await;
        let user = store.find_key(&2.into()).await.unwrap().unwrap().user.id;
        let manager = KeyManager::new(store.clone());
        let fast = manager.issue(NewKey::new(user, "fast")).await.unwrap();
        let layer = ApiKeyAuthLayer::new(store).scheme(scheme().bcrypt_queue(16).build().unwrap());
        let before = memory();
        let mut slow = JoinSet::new();
        for n in 0..1000 {
            let layer = layer.clone();
            slow.spawn(async move {
                let answer = send(&layer, support::bearer(&format!("{}-of-mine", prefix(n)))).await;
                if answer.status() == 503 {
                    assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
                }
                answer.status()
            });
        }
        // While they are at it, a key that needs no bcrypt is answered every time.
        let mut answered = 0;
        while !slow.is_empty() {
            let answer = send(&layer, support::bearer(fast.expose_secret())).await;
            assert_eq!(answer.status(), 200);
            answered += 1;
            if answered >= 100 {
                break;
            }
        }
        let statuses = slow.join_all().await;
        let count = |status| statuses.iter().filter(|&&found| found == status).count();
        assert_eq!(count(200) + count(503), 1000);
        assert!(count(200) >= 17 && count(503) > 0, "{} answered, {} shed", count(200), count(503));
        let grown = memory().saturating_sub(before);
        assert!(grown < 64 << 20, "{grown} bytes");
        assert_eq!(answered, 100);
    });
    let cores = std::thread::available_parallelism().unwrap().get();
    assert!(threads <= (cores / 2).max(1) + 3, "{threads} threads");
}

#[test]
fn there_is_one_check_at_a_time_for_one_record() {
    let threads = blocking_threads(async {
        let store = store_of(["key-0001".to_owned()], 6).await;
        let scheme = scheme().bcrypt_slots(16).bcrypt_queue(100).build().unwrap();
        let authenticator = Authenticator::builder(store).scheme(scheme).build();
        let mut callers = JoinSet::new();
        for _ in 0..30 {
            let authenticator = authenticator.clone();
            callers
                .spawn(async move { authenticator.authenticate("key-0001-of-mine").await.is_ok() });
        }
        assert!(callers.join_all().await.into_iter().all(|ok| ok));
    });
    assert!(threads <= 4, "{threads} threads, where 16 were allowed to others");
}

/// Attackers with a clock that stands still unless told otherwise.
struct Siege {
    clock: Arc<ManualClock>,
    authenticator: Authenticator,
}

impl Siege {
    async fn of(prefixes: impl IntoIterator<Item = String>, cost: u32) -> Self {
        let clock = Arc::new(ManualClock::at(SystemTime::now()));
        let scheme = scheme().clock(clock.clone()).build().unwrap();
        let store = store_of(prefixes, cost).await;
        let authenticator = Authenticator::builder(store).scheme(scheme).build();
        Self { clock, authenticator }
    }

    /// Whether a wrong secret was checked: 401, or 503 without a check.
    async fn guess(&self, prefix: &str, from: IpAddr) -> bool {
        match self.authenticator.authenticate_from(&format!("{prefix}-of-yours"), from).await {
            Err(Denial::InvalidKey(InvalidKey::WrongSecret)) => true,
            Err(denial) if is_overloaded(&denial) => {
                assert!(denial.retry_after().unwrap() <= Duration::from_secs(10));
                false
            }
            other => panic!("{other:?}"),
        }
    }
}

fn address(n: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, n])
}

#[tokio::test]
async fn four_clients_that_guess_at_one_key_get_five_checks_and_then_one_a_second_each() {
    let siege = Siege::of(["key-0001".to_owned()], 4).await;
    let mut checks = [0; 4];
    for _ in 0..50 {
        for client in 0..4_u8 {
            checks[usize::from(client)] +=
                u32::from(siege.guess("key-0001", address(client)).await);
        }
    }
    assert_eq!(checks, [5; 4]);
    for second in 1..=10 {
        siege.clock.advance(Duration::from_secs(1));
        for _ in 0..20 {
            for client in 0..4_u8 {
                checks[usize::from(client)] +=
                    u32::from(siege.guess("key-0001", address(client)).await);
            }
        }
        assert_eq!(checks, [5 + second; 4]);
    }
    siege.clock.advance(Duration::from_secs(61));
    assert!(siege.guess("key-0001", address(0)).await, "after a quiet minute all is forgotten");
}

#[tokio::test]
async fn the_owner_of_a_key_under_attack_is_answered_200_or_503_and_never_401() {
    let siege = Siege::of(["key-0001".to_owned()], 4).await;
    let owner =
        async |from| match siege.authenticator.authenticate_from("key-0001-of-mine", from).await {
            Ok(_) => 200,
            Err(denial) => denial.status().as_u16(),
        };
    for _ in 0..20 {
        siege.guess("key-0001", address(1)).await;
    }
    assert_eq!(owner(address(9)).await, 200, "from an address of their own");
    for _ in 0..20 {
        let status = owner(address(1)).await;
        assert_eq!(status, 503, "from the attacker's address");
    }
}

#[tokio::test]
async fn an_attack_on_many_keys_from_one_address_is_rationed_as_a_whole() {
    let prefix = |n: usize| format!("key-{n:04}");
    // 15 ms a check.
    let siege = Siege::of((0..100).map(prefix), 8).await;
    let mut checks = 0;
    for n in 0..100 {
        checks += u32::from(siege.guess(&prefix(n), address(1)).await);
    }
    // Five are free; then they come out of the share, however fresh the key: a quarter of the slots,
    // saved up for a second.
    assert!((5..60).contains(&checks), "{checks} checks");
    let other = siege.authenticator.authenticate_from("key-0099-of-mine", address(2)).await;
    assert!(other.is_ok(), "{other:?}");
}

#[tokio::test]
async fn a_guess_counts_even_if_whoever_guessed_does_not_wait_for_the_answer() {
    let siege = Siege::of(["key-0001".to_owned()], 4).await;
    for _ in 0..5 {
        {
            // The first poll hands the check over; by its end the check may even be done.
            let mut guess = std::pin::pin!(siege.guess("key-0001", address(1)));
            let context = &mut std::task::Context::from_waker(std::task::Waker::noop());
            let _ = guess.as_mut().poll(context);
        }
        // The owner's check waits for its turn, so the guess has ended when it is done.
        let owner = siege.authenticator.authenticate_from("key-0001-of-mine", address(9)).await;
        assert!(owner.is_ok(), "{owner:?}");
    }
    assert!(!siege.guess("key-0001", address(1)).await);
}

#[tokio::test]
async fn a_fast_hash_is_never_rationed() {
    let fixture = fixture().await;
    let wrong = format!("{}x", &fixture.key[..fixture.key.len() - 1]);
    for _ in 0..50 {
        assert_eq!(send(&fixture.layer(), support::bearer(&wrong)).await.status(), 401);
    }
    assert_eq!(send(&fixture.layer(), support::bearer(&fixture.key)).await.status(), 200);
}
