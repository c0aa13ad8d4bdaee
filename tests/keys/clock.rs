//! Expiry by the clock of the authenticator.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, MemoryStore, NewKey,
    clock::{Clock, ManualClock, Moment},
    denial::InvalidKey,
};

use crate::support::from_the_past;

const HOUR: Duration = Duration::from_secs(3600);

async fn key_until(store: &MemoryStore, expiry: SystemTime) -> String {
    let manager = from_the_past(&KeyManager::new(store.clone()));
    let since = expiry.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let email = format!("{}@example.com", since.as_nanos());
    let user = manager.create_user(&email, "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id, "k").expires_at(expiry.into())).await.unwrap();
    issued.expose_secret().to_owned()
}

#[tokio::test]
async fn the_clock_of_the_authenticator_decides_expiry_whatever_other_clocks_read() {
    let now = SystemTime::now();
    // The store and the machine read `now`. Two authenticators share a scheme.
    let store = MemoryStore::with_clock(Arc::new(ManualClock::at(now)));
    let scheme = KeyScheme::default();
    let [early, late] = [now - 10 * HOUR, now + 10 * HOUR].map(|wall| {
        let clock = Arc::new(ManualClock::at(wall));
        let builder = Authenticator::builder(store.clone()).scheme(scheme.clone());
        (builder.clock(clock.clone()).build(), clock)
    });
    for expiry in [now - HOUR, now + HOUR] {
        let key = key_until(&store, expiry).await;
        let is_expired = |outcome| matches!(outcome, Err(Denial::InvalidKey(InvalidKey::Expired)));
        // From the store, and from the local cache.
        for _ in 0..2 {
            assert!(early.0.authenticate(&key).await.is_ok());
            assert!(is_expired(late.0.authenticate(&key).await));
        }
        early.1.set_wall(expiry - Duration::from_nanos(1));
        assert!(early.0.authenticate(&key).await.is_ok());
        early.1.set_wall(expiry);
        assert!(is_expired(early.0.authenticate(&key).await));
        early.1.set_wall(now - 10 * HOUR);
    }
}

/// Counts its readings.
#[derive(Debug)]
struct CountingClock(AtomicUsize);

impl Clock for CountingClock {
    fn read(&self) -> Moment {
        let readings = self.0.fetch_add(1, SeqCst);
        Moment::new(SystemTime::UNIX_EPOCH + HOUR, Duration::from_nanos(readings as u64))
    }
}

#[tokio::test]
async fn a_cache_hit_reads_the_clock_once() {
    let clock = Arc::new(CountingClock(AtomicUsize::new(0)));
    let store = MemoryStore::new();
    let key = key_until(&store, SystemTime::UNIX_EPOCH + 2 * HOUR).await;
    // No task of the authenticator reads the clock meanwhile.
    let builder = Authenticator::builder(store).clock(clock.clone()).without_usage();
    let authenticator = builder.build();
    assert!(authenticator.authenticate(&key).await.is_ok());
    authenticator.shutdown().await;
    let before = clock.0.load(SeqCst);
    for _ in 0..100 {
        assert!(authenticator.authenticate(&key).await.is_ok());
    }
    assert_eq!(clock.0.load(SeqCst) - before, 100);
}

#[test]
fn a_moment_has_both_readings_and_clamps_what_it_cannot_hold() {
    let wall = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 7);
    let moment = Moment::new(wall, HOUR);
    assert_eq!((moment.wall(), moment.monotonic()), (wall, HOUR));
    let early = Moment::new(SystemTime::UNIX_EPOCH - HOUR, Duration::MAX);
    assert_eq!(early.wall(), SystemTime::UNIX_EPOCH);
    assert_eq!(early.monotonic(), Duration::from_nanos(u64::MAX));
    let clock = ManualClock::at(wall);
    clock.advance(HOUR);
    clock.set_wall(wall);
    assert_eq!(clock.read(), moment);
    assert_eq!(clock.now(), wall);
}
