//! Whether clients that guess at bcrypt keys slow down everybody else.
//!
//! `cargo bench --bench under_attack`: the throughput of requests with fast-hash keys over loopback
//! HTTP, in calm, while four clients keep guessing at one bcrypt key (cost 12), and while they guess
//! at 200; in each round all three, in another order, and the median of the rounds' ratios. Each attacker
//! has an address of its own and sends its next guess 5 ms after the answer, as fast as a client across a
//! network can. (Without that pause they are a flood like any other: each refusal costs about as much as
//! an answer, and twelve clients share two cores where there were eight.) Every guess is another one, because
//! a wrong key is cached. The checks are counted where they run, and the program fails if the attacks had
//! none. The last line is JSON.

mod figures;
mod loopback;

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use figures::median;
use http::StatusCode;
use loopback::{ask, connect};
use tokio::task::JoinSet;
use tower_api_key::{
    ApiKeyAuthLayer, KeyManager, KeyScheme, MemoryStore, NewKey,
    key::{KeyFormat, KeyHash},
    record::KeyRecord,
    store::{Attribution, KeyRepository, StoredKey},
};
use tracing_subscriber::{filter::filter_fn, layer, prelude::*, registry::LookupSpan};

const ROUNDS: usize = 8;
const PHASE: Duration = Duration::from_secs(6);
const PACE: Duration = Duration::from_millis(5);
const CLIENTS: u8 = 8;
const ATTACKERS: u8 = 4;

#[derive(Clone, Copy, PartialEq)]
enum Attack {
    None,
    OneKey,
    ManyKeys,
}

impl Attack {
    const ALL: [Self; 3] = [Self::None, Self::OneKey, Self::ManyKeys];
}

/// Checks of bcrypt hashes that ran.
static CHECKS: AtomicU64 = AtomicU64::new(0);
/// Numbers every guess, so that none comes twice.
static GUESSES: AtomicU64 = AtomicU64::new(0);

struct CountChecks;

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> layer::Layer<S> for CountChecks {
    fn on_new_span(
        &self,
        _: &tracing::span::Attributes<'_>,
        _: &tracing::Id,
        _: layer::Context<'_, S>,
    ) {
        CHECKS.fetch_add(1, Ordering::Relaxed);
    }
}

/// What came of one phase.
#[derive(Default)]
struct Counts {
    fast: AtomicU64,
    /// Guesses that were found to be wrong: 401.
    wrong: AtomicU64,
    /// Guesses that were turned away: 503.
    turned_away: AtomicU64,
    owner_ok: AtomicU64,
    owner_busy: AtomicU64,
    owner_other: AtomicU64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let only_checks = filter_fn(|metadata| metadata.name() == "bcrypt_check");
    tracing_subscriber::registry().with(CountChecks.with_filter(only_checks)).init();
    let store = MemoryStore::new();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let fast = manager.issue(NewKey::new(user.id.clone(), "fast")).await.unwrap();
    let hash = KeyHash::bcrypt("key-0000-of-the-owner", 12).unwrap();
    for n in 0..200 {
        let record = KeyRecord::new(0, prefix(n), user.clone());
        store
            .insert_key(&StoredKey::new(record, hash.clone()), &Attribution::default())
            .await
            .unwrap();
    }
    let scheme = KeyScheme::builder()
        .format(KeyFormat::structured("tak", "live").unwrap())
        .format(KeyFormat::first_chars(8).unwrap())
        .build()
        .unwrap();
    let layer = ApiKeyAuthLayer::new(store).scheme(scheme);
    let app = Router::new().route("/", get(|| async { "hello" })).layer(layer);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap();
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });

    // The first failures of each attacker are free; here they are long past.
    for attack in Attack::ALL {
        phase(server, fast.expose_secret(), attack).await;
    }
    let (mut one_key, mut many_keys) = (Vec::new(), Vec::new());
    let (mut totals, mut attack_checks) = ([0; 5], [0; 3]);
    println!("round  calm/s  one key/s  checks/s  many keys/s  checks/s");
    for round in 0..ROUNDS {
        let (mut rates, mut checks) = ([0.0; 3], [0.0; 3]);
        for step in 0..3 {
            let at = (round + step) % 3;
            let before = CHECKS.load(Ordering::Relaxed);
            let counts = phase(server, fast.expose_secret(), Attack::ALL[at]).await;
            let checked = CHECKS.load(Ordering::Relaxed) - before;
            attack_checks[at] += checked;
            let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            rates[at] = count(&counts.fast) as f64 / PHASE.as_secs_f64();
            checks[at] = checked as f64 / PHASE.as_secs_f64();
            let Counts { wrong, turned_away, owner_ok, owner_busy, owner_other, .. } = &*counts;
            let counters = [wrong, turned_away, owner_ok, owner_busy, owner_other];
            totals.iter_mut().zip(counters).for_each(|(total, counter)| *total += count(counter));
        }
        let ([calm, one, many], [_, of_one, of_many]) = (rates, checks);
        println!("{round:5}  {calm:6.0}  {one:9.0}  {of_one:8.1}  {many:11.0}  {of_many:8.1}");
        one_key.push(one / calm);
        many_keys.push(many / calm);
    }
    let [wrong, turned_away, owner_ok, owner_busy, owner_other] = totals;
    let [_, of_one, of_many] = attack_checks;
    let attacked = (2 * ROUNDS) as f64 * PHASE.as_secs_f64();
    println!(
        "{{\"one_key_ratio\":{:.3},\"many_keys_ratio\":{:.3},\"checks_per_second\":{:.2},\"wrong_per_second\":{:.2},\
         \"turned_away_per_second\":{:.1},\"owner_ok\":{owner_ok},\"owner_busy\":{owner_busy},\
         \"owner_other\":{owner_other}}}",
        median(&one_key),
        median(&many_keys),
        (of_one + of_many) as f64 / attacked,
        wrong as f64 / attacked,
        turned_away as f64 / attacked,
    );
    if of_one == 0 || of_many == 0 || turned_away == 0 {
        eprintln!(
            "the attacks had {of_one} and {of_many} bcrypt checks, and {turned_away} guesses were turned \
             away: this run measures no attack"
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn prefix(n: usize) -> String {
    format!("key-{n:04}")
}

async fn phase(server: SocketAddr, fast: &str, attack: Attack) -> Arc<Counts> {
    let counts = Arc::new(Counts::default());
    let over = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        let (counts, over, fast) = (Arc::clone(&counts), Arc::clone(&over), fast.to_owned());
        let mut client = connect(server, address(100 + n)).await;
        clients.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                assert_eq!(ask(&mut client, "/", &fast).await, StatusCode::OK);
                counts.fast.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    if attack != Attack::None {
        for n in 0..ATTACKERS {
            let (counts, over) = (Arc::clone(&counts), Arc::clone(&over));
            let mut client = connect(server, address(10 + n)).await;
            clients.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    let number = GUESSES.fetch_add(1, Ordering::Relaxed);
                    let target = if attack == Attack::OneKey { 0 } else { number as usize % 200 };
                    let guess = format!("{}-guess-{number}", prefix(target));
                    let counter = match ask(&mut client, "/", &guess).await {
                        StatusCode::UNAUTHORIZED => &counts.wrong,
                        StatusCode::SERVICE_UNAVAILABLE => &counts.turned_away,
                        other => panic!("a guess was answered {other}"),
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(PACE).await;
                }
            });
        }
        let (counts, over) = (Arc::clone(&counts), Arc::clone(&over));
        let mut owner = connect(server, address(200)).await;
        clients.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let counter = match ask(&mut owner, "/", "key-0000-of-the-owner").await {
                    StatusCode::OK => &counts.owner_ok,
                    StatusCode::SERVICE_UNAVAILABLE => &counts.owner_busy,
                    _ => &counts.owner_other,
                };
                counter.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
    }
    let end = Instant::now() + PHASE;
    tokio::time::sleep_until(end.into()).await;
    over.store(true, Ordering::Relaxed);
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    counts
}

/// Each is in a /24 of its own.
fn address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(127, 0, host, 1)
}
