//! What a flood of forged keys costs everybody else.
//!
//! `cargo bench --bench flood` starts a PostgreSQL of its own and a server with the default key format on the
//! loopback address. In each round come, from one address and from a thousand, each in another /24: forged keys
//! (well-formed, each another one) as fast as they are answered; 4,000 of them a second; and as many requests a
//! second for a path that does not exist. The hot throughput of the last two is compared. In every phase eight
//! clients ask with keys that are cached, 20 times a second another valid key that no request had comes from an
//! address of its own, ten times a second a key is revoked, and ten times a second a budget that was not used
//! before is reserved from. In the end forged keys are presented by requests that are given up at once, as fast
//! as one task can. The last line is JSON.

mod figures;
mod loopback;
#[path = "../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::{
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::pin,
    process::ExitCode,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Waker},
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use figures::{median, percentile};
use http::StatusCode;
use loopback::{Client, ask, connect};
use servers::Postgres;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, KeyManager, NewKey, PostgresStore,
    management::IssuedKey,
    record::{Budget, BudgetPeriod},
};

const ROUNDS: usize = 2;
const PHASE: Duration = Duration::from_secs(4);
const HOT_CLIENTS: u8 = 8;
/// More than the suspect look-ups that may wait, so that most are turned away at once.
const FLOODERS: usize = 256;
const ADDRESSES: usize = 1000;
/// Forged keys and requests of the missing path a second, where hot throughput is compared: a flood that takes
/// all of the cores leaves to others what the scheduler gives them.
const PACE: u64 = 4_000;
/// A valid cold key counts as answered within this time.
const IN_TIME: Duration = Duration::from_secs(1);
const COLD_PAUSE: Duration = Duration::from_millis(50);
const WRITE_PAUSE: Duration = Duration::from_millis(100);
/// Nothing that is waited for takes longer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Enough for all phases.
const COLD_KEYS: usize = 5000;
const WRITTEN_KEYS: usize = 2500;

#[derive(Clone, Copy, PartialEq)]
enum Traffic {
    Calm,
    /// As fast as they are answered, or this many in all.
    Forged {
        is_from_many: bool,
        requests: Option<u64>,
    },
    /// This many requests in all, from as many addresses as the flood before.
    NotFound {
        requests: u64,
        is_from_many: bool,
    },
    GivenUp,
}

/// What came of one phase.
#[derive(Default)]
struct Counts {
    hot: AtomicU64,
    flood: AtomicU64,
    unknown: AtomicU64,
    turned_away: AtomicU64,
    cold_ok: AtomicU64,
    cold: AtomicU64,
    reserved: AtomicU64,
    reservations: AtomicU64,
    /// Milliseconds from the call until this node refuses the key.
    revoke_ms: Mutex<Vec<f64>>,
    memory: AtomicU64,
}

struct World {
    server: SocketAddr,
    node: Authenticator,
    manager: KeyManager<PostgresStore>,
    hot: Vec<IssuedKey>,
    cold: Mutex<Vec<IssuedKey>>,
    revocable: Mutex<Vec<IssuedKey>>,
    budgets: Mutex<Vec<IssuedKey>>,
    /// Connections from one address, and from a thousand.
    from_one: Mutex<Vec<Client>>,
    from_many: Mutex<Vec<Client>>,
    guesses: AtomicU64,
}

#[tokio::main]
async fn main() -> ExitCode {
    let postgres = Postgres::start();
    let world = Arc::new(world(&postgres).await);
    phase(&world, Traffic::Calm).await;
    let memory_before = memory();
    let (mut one, mut many, mut all) = (Vec::new(), Vec::new(), Vec::new());
    println!("round  traffic       hot/s  flood/s  looked up/s  cold ok  reserved  revoke p99 ms");
    for round in 0..ROUNDS {
        run(&world, round, "calm", Traffic::Calm).await;
        for (name, is_from_many, ratios) in
            [("one", false, &mut one), ("thousand", true, &mut many)]
        {
            let forged = Traffic::Forged { is_from_many, requests: None };
            all.push(run(&world, round, name, forged).await);
            let requests = PACE * PHASE.as_secs();
            let forged = Traffic::Forged { is_from_many, requests: Some(requests) };
            let forged = run(&world, round, "  paced", forged).await;
            let requests = forged.flood.load(Relaxed);
            let plain =
                run(&world, round, "  404", Traffic::NotFound { requests, is_from_many }).await;
            ratios.push(forged.hot.load(Relaxed) as f64 / plain.hot.load(Relaxed) as f64);
            all.push(forged);
        }
    }
    let given_up = run(&world, ROUNDS, "given up", Traffic::GivenUp).await;
    all.push(given_up);
    let most = all.iter().map(|counts| counts.memory.load(Relaxed)).max().unwrap_or(0);
    let sum = |of: fn(&Counts) -> &AtomicU64| {
        all.iter().map(|counts| of(counts).load(Relaxed)).sum::<u64>()
    };
    let revokes: Vec<f64> =
        all.iter().flat_map(|counts| counts.revoke_ms.lock().unwrap().clone()).collect();
    let ratio = median(&one).min(median(&many));
    println!(
        "hot throughput over that beside 404s: {:.3} from one, {:.3} from a thousand addresses",
        median(&one),
        median(&many)
    );
    let (unknown, turned_away) = (sum(|it| &it.unknown), sum(|it| &it.turned_away));
    println!(
        "{{\"flood_memory_mib\":{:.1},\"flood_cold_ok\":{:.4},\"flood_revoke_p99_ms\":{:.1},\
         \"flood_hot_ratio\":{ratio:.3},\"flood_reserve_ok\":{:.4},\"flood_unknown\":{unknown},\
         \"flood_turned_away\":{turned_away}}}",
        most.saturating_sub(memory_before) as f64 / f64::from(1 << 20),
        sum(|it| &it.cold_ok) as f64 / sum(|it| &it.cold) as f64,
        percentile(&revokes, 0.99),
        sum(|it| &it.reserved) as f64 / sum(|it| &it.reservations) as f64,
    );
    if unknown == 0 || turned_away == 0 || sum(|it| &it.cold) == 0 || revokes.is_empty() {
        eprintln!(
            "no forged key was looked up, or none was turned away: this run measures no flood"
        );
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

async fn world(postgres: &Postgres) -> World {
    let store = PostgresStore::new(&postgres.tcp_url("")).unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let mut keys = Vec::new();
    let budget = Budget { limit_cents: 1_000_000, period: BudgetPeriod::Total };
    for _ in 0..usize::from(HOT_CLIENTS) + COLD_KEYS + 2 * WRITTEN_KEYS {
        keys.push(manager.issue(NewKey::new(user.clone(), "k").budget(budget)).await.unwrap());
    }
    let mut take = |count: usize| keys.split_off(keys.len() - count);
    let (hot, cold) = (take(usize::from(HOT_CLIENTS)), take(COLD_KEYS));
    let (revocable, budgets) = (take(WRITTEN_KEYS), take(WRITTEN_KEYS));
    let node = Authenticator::new(store);
    let layer = ApiKeyAuthLayer::from(node.clone());
    // The missing path is answered outside of the layer.
    let app = Router::new().route("/", get(|| async { "hello" })).route_layer(layer);
    let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let app = app.into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    let server = (Ipv4Addr::LOCALHOST, port).into();
    let (mut from_one, mut from_many) = (Vec::new(), Vec::new());
    for _ in 0..FLOODERS {
        from_one.push(connect(server, Ipv4Addr::new(127, 9, 9, 9)).await);
    }
    for n in 0..ADDRESSES {
        let (high, low) = ((n / 250) as u8, (n % 250) as u8);
        from_many.push(connect(server, Ipv4Addr::new(127, 10 + high, low, 1)).await);
    }
    World {
        server,
        node,
        manager,
        hot,
        cold: Mutex::new(cold),
        revocable: Mutex::new(revocable),
        budgets: Mutex::new(budgets),
        from_one: Mutex::new(from_one),
        from_many: Mutex::new(from_many),
        guesses: AtomicU64::new(0),
    }
}

async fn run(world: &Arc<World>, round: usize, name: &str, traffic: Traffic) -> Arc<Counts> {
    let counts = phase(world, traffic).await;
    let seconds = PHASE.as_secs_f64();
    let per_second = |counter: &AtomicU64| counter.load(Relaxed) as f64 / seconds;
    let revokes = percentile(&counts.revoke_ms.lock().unwrap(), 0.99);
    println!(
        "{round:5}  {name:9}  {:8.0} {:8.0} {:12.1}  {:3}/{:3}  {:4}/{:3} {revokes:14.1}",
        per_second(&counts.hot),
        per_second(&counts.flood),
        per_second(&counts.unknown),
        counts.cold_ok.load(Relaxed),
        counts.cold.load(Relaxed),
        counts.reserved.load(Relaxed),
        counts.reservations.load(Relaxed),
    );
    counts
}

async fn phase(world: &Arc<World>, traffic: Traffic) -> Arc<Counts> {
    let (counts, over) = (Arc::new(Counts::default()), Arc::new(AtomicBool::new(false)));
    let mut tasks = JoinSet::new();
    for n in 0..HOT_CLIENTS {
        let (world, counts, over) = (Arc::clone(world), Arc::clone(&counts), Arc::clone(&over));
        tasks.spawn(async move { hot(&world, n, &counts, &over).await });
    }
    let (w, c, o) = (Arc::clone(world), Arc::clone(&counts), Arc::clone(&over));
    tasks.spawn(async move { cold(&w, &c, &o).await });
    let (w, c, o) = (Arc::clone(world), Arc::clone(&counts), Arc::clone(&over));
    tasks.spawn(async move { revoke(&w, &c, &o).await });
    let (w, c, o) = (Arc::clone(world), Arc::clone(&counts), Arc::clone(&over));
    tasks.spawn(async move { reserve(&w, &c, &o).await });
    let pool = match traffic {
        Traffic::Forged { is_from_many: true, .. }
        | Traffic::NotFound { is_from_many: true, .. } => &world.from_many,
        _ => &world.from_one,
    };
    let mut clients = match traffic {
        Traffic::Calm | Traffic::GivenUp => Vec::new(),
        _ => std::mem::take(&mut *pool.lock().unwrap()),
    };
    let begun = Instant::now();
    let mut flooders = JoinSet::new();
    while !clients.is_empty() {
        let share =
            clients.split_off(clients.len() - clients.len().div_ceil(FLOODERS - flooders.len()));
        let (world, counts, over) = (Arc::clone(world), Arc::clone(&counts), Arc::clone(&over));
        flooders.spawn(async move { flood(&world, share, traffic, begun, &counts, &over).await });
    }
    if traffic == Traffic::GivenUp {
        let (world, counts, over) = (Arc::clone(world), Arc::clone(&counts), Arc::clone(&over));
        tasks.spawn(async move { give_up(&world, &counts, &over).await });
    }
    while begun.elapsed() < PHASE {
        sleep(Duration::from_millis(50)).await;
        counts.memory.fetch_max(memory(), Relaxed);
    }
    over.store(true, Relaxed);
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    while let Some(clients) = flooders.join_next().await {
        pool.lock().unwrap().extend(clients.unwrap());
    }
    counts
}

async fn hot(world: &World, n: u8, counts: &Counts, over: &AtomicBool) {
    let mut client = connect(world.server, Ipv4Addr::new(127, 100, n, 1)).await;
    let key = world.hot[usize::from(n)].expose_secret();
    while !over.load(Relaxed) {
        assert_eq!(ask(&mut client, "/", key).await, StatusCode::OK);
        counts.hot.fetch_add(1, Relaxed);
    }
}

async fn cold(world: &World, counts: &Counts, over: &AtomicBool) {
    let mut requests = JoinSet::new();
    while !over.load(Relaxed) {
        let key = world.cold.lock().unwrap().pop().expect("there are enough cold keys");
        let n = counts.cold.fetch_add(1, Relaxed);
        let mut client = connect(world.server, Ipv4Addr::new(127, 101, n as u8, 1)).await;
        requests.spawn(async move {
            let answer = timeout(IN_TIME, ask(&mut client, "/", key.expose_secret())).await;
            answer == Ok(StatusCode::OK)
        });
        sleep(COLD_PAUSE).await;
    }
    let answered = requests.join_all().await.into_iter().filter(|is_ok| *is_ok).count();
    counts.cold_ok.fetch_add(answered as u64, Relaxed);
}

async fn revoke(world: &World, counts: &Counts, over: &AtomicBool) {
    while !over.load(Relaxed) {
        let key = world.revocable.lock().unwrap().pop().expect("there are enough keys");
        let from = IpAddr::from([127, 102, 0, 1]);
        let authenticate = || world.node.authenticate_from(key.expose_secret(), from);
        authenticate().await.expect("it is valid so far");
        let begun = Instant::now();
        world.manager.revoke(&key.record().id).await.expect("it is revoked");
        while authenticate().await.is_ok() {
            assert!(begun.elapsed() < PATIENCE, "a revoked key goes on working");
            sleep(Duration::from_millis(1)).await;
        }
        counts.revoke_ms.lock().unwrap().push(begun.elapsed().as_secs_f64() * 1e3);
        sleep(WRITE_PAUSE).await;
    }
}

async fn reserve(world: &World, counts: &Counts, over: &AtomicBool) {
    while !over.load(Relaxed) {
        let key = world.budgets.lock().unwrap().pop().expect("there are enough keys");
        let from = IpAddr::from([127, 103, 0, 1]);
        let caller = world.node.authenticate_from(key.expose_secret(), from).await;
        let caller = caller.expect("it is valid");
        counts.reservations.fetch_add(1, Relaxed);
        if let Ok(hold) = caller.reserve(1_000_000).await {
            hold.settle(1_000_000);
            counts.reserved.fetch_add(1, Relaxed);
        }
        sleep(WRITE_PAUSE).await;
    }
}

/// Sends requests over these connections in turn, and gives them back.
async fn flood(
    world: &World,
    mut clients: Vec<Client>,
    traffic: Traffic,
    begun: Instant,
    counts: &Counts,
    over: &AtomicBool,
) -> Vec<Client> {
    let mut next = 0;
    while !over.load(Relaxed) {
        next = (next + 1) % clients.len();
        let client = &mut clients[next];
        let requests = match traffic {
            Traffic::Forged { requests, .. } => requests,
            Traffic::NotFound { requests, .. } => Some(requests),
            Traffic::Calm | Traffic::GivenUp => None,
        };
        if let Some(requests) = requests {
            let due = requests as f64 * begun.elapsed().as_secs_f64() / PHASE.as_secs_f64();
            if counts.flood.load(Relaxed) as f64 >= due {
                sleep(Duration::from_millis(1)).await;
                continue;
            }
        }
        let counter = if matches!(traffic, Traffic::NotFound { .. }) {
            assert_eq!(ask(client, "/missing", &forged(world)).await, StatusCode::NOT_FOUND);
            None
        } else {
            match ask(client, "/", &forged(world)).await {
                StatusCode::UNAUTHORIZED => Some(&counts.unknown),
                StatusCode::SERVICE_UNAVAILABLE => Some(&counts.turned_away),
                other => panic!("a forged key was answered {other}"),
            }
        };
        counts.flood.fetch_add(1, Relaxed);
        if let Some(counter) = counter {
            counter.fetch_add(1, Relaxed);
        }
    }
    clients
}

/// Presents forged keys from a thousand addresses, and does not wait for the answers.
async fn give_up(world: &World, counts: &Counts, over: &AtomicBool) {
    let mut n = 0_u16;
    while !over.load(Relaxed) {
        n = (n + 1) % ADDRESSES as u16;
        let [high, low] = [(n / 250) as u8, (n % 250) as u8];
        let key = forged(world);
        let from = IpAddr::from([10, high, low, 1]);
        {
            let request = pin!(world.node.authenticate_from(&key, from));
            let _ = request.poll(&mut Context::from_waker(Waker::noop()));
        }
        if counts.flood.fetch_add(1, Relaxed).is_multiple_of(64) {
            tokio::task::yield_now().await;
        }
    }
}

/// A well-formed key of the default format that was not presented before.
fn forged(world: &World) -> String {
    let number = world.guesses.fetch_add(1, Relaxed);
    let checked = format!("tak_live_{number:010}_{}", "z".repeat(22));
    let check = crc32fast::hash(checked.as_bytes());
    format!("{checked}{}", base62(check))
}

fn base62(mut number: u32) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut digits = ['0'; 6];
    for digit in digits.iter_mut().rev() {
        *digit = char::from(DIGITS[(number % 62) as usize]);
        number /= 62;
    }
    digits.iter().collect()
}

/// Resident memory of this process, in bytes.
fn memory() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
