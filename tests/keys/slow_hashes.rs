//! bcrypt under attack: failed checks are limited.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, Denial, MemoryStore,
    clock::ManualClock,
    denial::InvalidKey,
    error::StoreErrorKind,
    store::{KeyRepository, ListKeys},
};

use crate::support::{
    self, counted::Counted, edit_key, eventually::eventually, fixture, old_and_new_keys, send,
    store_of,
};

fn is_overloaded(denial: &Denial) -> bool {
    matches!(denial, Denial::Unavailable(error) if error.kind() == StoreErrorKind::Overloaded)
}

/// Attackers with a manual clock.
struct Siege {
    clock: Arc<ManualClock>,
    store: MemoryStore,
    authenticator: Authenticator,
    guesses: AtomicUsize,
}

impl Siege {
    async fn of(prefixes: impl IntoIterator<Item = String>, cost: u32) -> Self {
        let clock = Arc::new(ManualClock::at(SystemTime::now()));
        let scheme = old_and_new_keys().build().unwrap();
        let store = store_of(prefixes, cost).await;
        let authenticator =
            Authenticator::builder(store.clone()).scheme(scheme).clock(clock.clone()).build();
        Self { clock, store, authenticator, guesses: AtomicUsize::new(0) }
    }

    /// Whether a wrong secret was checked: 401, or 503 without a check. Another one each time: what was
    /// found to be wrong is cached.
    async fn guess(&self, prefix: &str, from: IpAddr) -> bool {
        let number = self.guesses.fetch_add(1, Ordering::Relaxed);
        let wrong = format!("{prefix}-of-yours-{number}");
        match self.authenticator.authenticate_from(&wrong, from).await {
            Err(Denial::InvalidKey(InvalidKey::WrongSecret)) => true,
            Err(denial) if is_overloaded(&denial) => {
                assert!(denial.retry_after().unwrap() <= Duration::from_secs(10));
                false
            }
            other => panic!("{other:?}"),
        }
    }

    /// The outcome for the owner of `key-0001`.
    async fn owner(&self, from: IpAddr) -> u16 {
        match self.authenticator.authenticate_from("key-0001-of-mine", from).await {
            Ok(_) => 200,
            Err(denial) => denial.status().as_u16(),
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
async fn authenticators_that_share_a_scheme_and_a_clock_share_the_limit_of_failed_checks() {
    let store = store_of(["key-0001".to_owned()], 4).await;
    let clock = Arc::new(ManualClock::at(SystemTime::now()));
    let scheme = old_and_new_keys().build().unwrap();
    let nodes = [(); 2].map(|()| {
        let builder = Authenticator::builder(store.clone()).scheme(scheme.clone());
        builder.clock(clock.clone()).build()
    });
    let mut number = 0;
    let mut is_checked = async |node: usize| {
        number += 1;
        let wrong = format!("key-0001-of-yours-{number}");
        match nodes[node].authenticate_from(&wrong, address(1)).await {
            Err(Denial::InvalidKey(InvalidKey::WrongSecret)) => true,
            Err(denial) if is_overloaded(&denial) => false,
            other => panic!("{other:?}"),
        }
    };
    for node in [0, 1, 0, 1, 0] {
        assert!(is_checked(node).await);
    }
    for node in [0, 1] {
        assert!(!is_checked(node).await);
    }
    clock.advance(Duration::from_secs(61));
    for node in [0, 1] {
        assert!(is_checked(node).await);
    }
}

#[tokio::test]
async fn guesses_that_come_all_at_once_get_no_more_checks_than_one_after_the_other() {
    let siege = Arc::new(Siege::of(["key-0001".to_owned()], 4).await);
    let mut guesses = tokio::task::JoinSet::new();
    for _ in 0..30 {
        let siege = Arc::clone(&siege);
        guesses.spawn(async move { siege.guess("key-0001", address(1)).await });
    }
    let checks = guesses.join_all().await.into_iter().filter(|checked| *checked).count();
    assert_eq!(checks, 5);
}

#[tokio::test]
async fn the_owner_of_a_key_under_attack_is_answered_200_or_503_and_never_401() {
    let siege = Siege::of(["key-0001".to_owned()], 4).await;
    for _ in 0..20 {
        siege.guess("key-0001", address(1)).await;
    }
    for _ in 0..20 {
        assert_eq!(siege.owner(address(1)).await, 503, "from the attacker's address");
    }
    assert_eq!(siege.owner(address(9)).await, 200, "from an address of their own");
}

#[tokio::test]
async fn a_key_that_was_proven_before_the_attack_is_not_limited_even_when_it_is_looked_up_again() {
    let siege = Siege::of(["key-0001".to_owned()], 4).await;
    assert_eq!(siege.owner(address(1)).await, 200);
    for _ in 0..20 {
        siege.guess("key-0001", address(1)).await;
    }
    assert!(!siege.guess("key-0001", address(1)).await, "the ration is used up");
    for _ in 0..20 {
        assert_eq!(siege.owner(address(1)).await, 200, "from the attacker's address");
    }
    // An edit, so that the key is looked up again, but not checked.
    let mut record = siege.store.list_keys(&ListKeys::default()).await.unwrap().keys.remove(0);
    record.name = "edited".into();
    edit_key(&siege.store, &record, None).await.unwrap().unwrap();
    eventually("the edit is seen", async || {
        let owner = siege.authenticator.authenticate_from("key-0001-of-mine", address(1)).await;
        owner.expect("200 all along").key().name == "edited"
    })
    .await;
    assert!(!siege.guess("key-0001", address(1)).await, "the ration is still used up");
}

#[tokio::test]
async fn an_attack_on_many_keys_from_one_address_is_limited_as_a_whole() {
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
    let elsewhere = IpAddr::from([198, 51, 100, 1]);
    let other = siege.authenticator.authenticate_from("key-0099-of-mine", elsewhere).await;
    assert!(other.is_ok(), "{other:?}");
}

#[tokio::test]
async fn a_guess_counts_even_if_whoever_guessed_does_not_wait_for_the_answer() {
    let siege = Siege::of(["key-0001".to_owned()], 4).await;
    for n in 0..5 {
        {
            // The first poll hands the check over; by its end the check may even be done.
            let mut guess = std::pin::pin!(siege.guess("key-0001", address(1)));
            let context = &mut std::task::Context::from_waker(std::task::Waker::noop());
            let _ = guess.as_mut().poll(context);
        }
        // Another check from elsewhere waits for its turn, so the guess has ended when it is done.
        let elsewhere = IpAddr::from([198, 51, n, 1]);
        assert!(siege.guess("key-0001", elsewhere).await);
    }
    assert!(!siege.guess("key-0001", address(1)).await);
}

#[tokio::test]
async fn guesses_that_are_turned_away_cost_no_query() {
    let store = store_of(["key-0001".to_owned()], 4).await;
    let counted = Counted::over(store);
    let scheme = old_and_new_keys().build().unwrap();
    let authenticator = Authenticator::builder(counted.clone()).scheme(scheme).build();
    for n in 0..50 {
        let guess = format!("key-0001-of-yours-{n}");
        let _ = authenticator.authenticate_from(&guess, address(1)).await;
    }
    let asked = counted.take_asked();
    assert!((5..10).contains(&asked), "{asked} look-ups for 5 checks");
    let owner = authenticator.authenticate_from("key-0001-of-mine", [198, 51, 100, 1].into());
    assert!(owner.await.is_ok());
}

#[tokio::test]
async fn the_owner_of_a_key_gets_in_while_one_network_guesses_from_fresh_addresses() {
    // 27 ms a check: a quarter of a slot is 9 a second.
    let store = store_of(["key-0001".to_owned()], 9).await;
    let clock = Arc::new(ManualClock::at(SystemTime::now()));
    let scheme = old_and_new_keys().bcrypt_slots(1).build().unwrap();
    // Without a memory, so that each try of the owner needs a check.
    let authenticator =
        Authenticator::builder(store).scheme(scheme).clock(clock.clone()).cache_capacity(0).build();
    let owner = IpAddr::from([198, 51, 100, 1]);
    let (mut denied, mut checks) = (Vec::new(), 0);
    for second in 0..40_u16 {
        for n in 0..25 {
            let guess = format!("key-0001-of-yours-{second}-{n}");
            let from = format!("2001:db8:1:{:x}::1", 25 * second + n).parse().unwrap();
            let outcome = authenticator.authenticate_from(&guess, from).await;
            checks += usize::from(matches!(outcome, Err(Denial::InvalidKey(_))));
            clock.advance(Duration::from_millis(40));
        }
        if authenticator.authenticate_from("key-0001-of-mine", owner).await.is_err() {
            denied.push(second);
        }
    }
    // About 30; fewer if the machine is busy, because a check then takes longer.
    assert!(checks > 10, "{checks} guesses were checked");
    assert!(denied.iter().all(|second| *second < 16), "{denied:?}");
}

#[tokio::test]
async fn a_fast_hash_is_never_limited() {
    let fixture = fixture().await;
    // Its check is right, so that the hash has to say it.
    let wrong = support::with_wrong_secret(&fixture.key);
    // One limit for all of them, and no memory of what was wrong.
    let authenticator = Authenticator::builder(fixture.store.clone()).cache_capacity(0).build();
    let layer = ApiKeyAuthLayer::from(authenticator);
    for _ in 0..50 {
        assert_eq!(send(&layer, support::bearer(&wrong)).await.status(), 401);
    }
    assert_eq!(send(&layer, support::bearer(&fixture.key)).await.status(), 200);
}
