//! What the layer costs over HTTP.
//!
//! `cargo bench --bench http` serves axum from one process and one thread, on three ports: without a layer; with a hit
//! inlined by hand (SHA-256, quick_cache look-up, extension insert), which is the floor; and with the layer. It loads one of
//! them at a time from another process: 64 connections, each with one request under way, 1,000 keys in rotation. The
//! requests are the same for all ports. Where `taskset` is there and the machine has two cores, each process is pinned to
//! one. CPU time is that of the server's thread, from the kernel. The ports take turns; figures are medians of the rounds.
//! The last line is JSON.

mod figures;

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Read},
    net::{Ipv4Addr, SocketAddr},
    process::{self, Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, extract::Request, routing::get};
use figures::{median, median_ratio, take_turns};
use http::header::AUTHORIZATION;
use quick_cache::sync::Cache;
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    task::{JoinSet, LocalSet},
};
use tower::util::MapRequestLayer;
use tower_api_key::{ApiKeyAuthLayer, AuthContext, Authenticator, KeyManager, MemoryStore, NewKey};

/// Many short rounds, so that other work on the machine hits all parts of most of them alike.
const ROUNDS: usize = 31;
const PHASE: Duration = Duration::from_millis(500);
const WARM_UPS: usize = 2;
const CONNECTIONS: usize = 64;
const KEYS: usize = 1_000;
/// The argument of the server's process.
const SERVE: &str = "--serve";

fn main() {
    if env::args().any(|argument| argument == SERVE) {
        runtime().block_on(serve());
        return;
    }
    let is_pinned = pin_this_process();
    let server = Server::start(is_pinned);
    println!("server and load on a core each: {is_pinned}");
    let load = |port| runtime().block_on(load(&server, port));
    for port in server.ports {
        for _ in 0..WARM_UPS {
            load(port);
        }
    }
    let [mut without, mut by_hand, mut with] = [(); 3].map(|()| Phases::default());
    let [bare, inlined, layered] = server.ports;
    for round in 0..ROUNDS {
        take_turns(
            round,
            [&mut || without.push(load(bare)), &mut || by_hand.push(load(inlined)), &mut || {
                with.push(load(layered));
            }],
        );
    }
    println!("{CONNECTIONS} connections, {KEYS} keys    requests/s   CPU µs a request     added");
    println!("  without a layer    {:>19.0} {:>18.3}", median(&without.rate), median(&without.cpu));
    for (name, phases) in [("hit inlined by hand", &by_hand), ("this layer", &with)] {
        let (rate, cpu, added) =
            (median(&phases.rate), median(&phases.cpu), phases.added(&without));
        println!("  {name:<20} {rate:>17.0} {cpu:>18.3} {added:>9.3}");
    }
    println!(
        "{{\"http_added_us\":{:.3},\"http_ratio\":{:.3},\"by_hand_added_us\":{:.3},\"by_hand_ratio\":{:.3}}}",
        with.added(&without),
        median_ratio(&with.rate, &without.rate),
        by_hand.added(&without),
        median_ratio(&by_hand.rate, &without.rate),
    );
}

/// Figures of the phases with one port.
#[derive(Default)]
struct Phases {
    /// Requests a second.
    rate: Vec<f64>,
    /// Microseconds of CPU time a request.
    cpu: Vec<f64>,
}

impl Phases {
    fn push(&mut self, (rate, cpu): (f64, f64)) {
        self.rate.push(rate);
        self.cpu.push(cpu);
    }

    /// Microseconds of CPU time a request that these phases took more than others.
    fn added(&self, others: &Self) -> f64 {
        median(
            &self.cpu.iter().zip(&others.cpu).map(|(more, less)| more - less).collect::<Vec<_>>(),
        )
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Pins this process to the second core, and returns whether that is possible.
fn pin_this_process() -> bool {
    let has_two = std::thread::available_parallelism().is_ok_and(|cores| cores.get() >= 2);
    let id = process::id().to_string();
    let mut taskset = Command::new("taskset");
    taskset.args(["-p", "-c", "1", &id]).stdout(Stdio::null()).stderr(Stdio::null());
    has_two && taskset.status().is_ok_and(|status| status.success())
}

/// The server's process.
struct Server {
    process: Child,
    /// Without a layer, with a hit by hand, with the layer.
    ports: [SocketAddr; 3],
    requests: Arc<Vec<Vec<u8>>>,
}

impl Server {
    fn start(is_pinned: bool) -> Self {
        let program = env::current_exe().unwrap();
        let mut command = if is_pinned {
            let mut taskset = Command::new("taskset");
            taskset.args(["-c", "0"]).arg(program);
            taskset
        } else {
            Command::new(program)
        };
        let command = command.arg(SERVE).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut address = || lines.next().unwrap().parse().unwrap();
        let ports = [address(), address(), address()];
        let request = |key: String| {
            format!(
                "GET /v1/models HTTP/1.1\r\nhost: api.example.com\r\nuser-agent: example/1.0\r\n\
                 accept: application/json\r\nauthorization: Bearer {key}\r\n\r\n"
            )
        };
        let requests = lines.take(KEYS).map(|key| request(key).into_bytes()).collect();
        Self { process, ports, requests: Arc::new(requests) }
    }

    /// The CPU time of the server's thread.
    fn cpu(&self) -> Duration {
        let path = format!("/proc/{}/schedstat", self.process.id());
        let figures = fs::read_to_string(path).unwrap();
        Duration::from_nanos(figures.split(' ').next().unwrap().parse().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It ends at the end of its input.
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

/// Loads one port. Returns requests a second, and microseconds of CPU time a request.
async fn load(server: &Server, port: SocketAddr) -> (f64, f64) {
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        let stream = TcpStream::connect(port).await.unwrap();
        stream.set_nodelay(true).unwrap();
        connections.push(stream);
    }
    let (start, cpu) = (Instant::now(), server.cpu());
    let end = start + PHASE;
    let mut requests = 0;
    LocalSet::new()
        .run_until(async {
            let mut clients = JoinSet::new();
            for (at, stream) in connections.into_iter().enumerate() {
                let requests = Arc::clone(&server.requests);
                clients.spawn_local(client(stream, requests, at * KEYS / CONNECTIONS, end));
            }
            while let Some(sent) = clients.join_next().await {
                requests += sent.unwrap();
            }
        })
        .await;
    let (time, cpu) = (start.elapsed(), server.cpu() - cpu);
    let requests = requests as f64;
    (requests / time.as_secs_f64(), cpu.as_secs_f64() * 1e6 / requests)
}

/// Sends requests one after the other until `end`, and returns their number.
async fn client(
    mut stream: TcpStream,
    requests: Arc<Vec<Vec<u8>>>,
    first: usize,
    end: Instant,
) -> usize {
    let mut response = [0; 1024];
    let mut sent = 0;
    for request in requests.iter().cycle().skip(first) {
        if sent % 16 == 0 && Instant::now() >= end {
            break;
        }
        stream.write_all(request).await.unwrap();
        // The response is small: the server writes it at once.
        let length = stream.read(&mut response).await.unwrap();
        assert!(response[..length].starts_with(b"HTTP/1.1 200 OK\r\n"), "not 200");
        assert!(response[..length].ends_with(b"ok"), "a part of a response");
        sent += 1;
    }
    sent
}

/// Serves the ports until the end of the input, and prints them and the keys.
async fn serve() {
    let store = MemoryStore::new();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let authenticator = Authenticator::new(store);
    let (mut keys, by_digest) =
        (Vec::new(), Arc::new(Cache::<[u8; 32], AuthContext>::new(2 * KEYS)));
    for _ in 0..KEYS {
        let new = NewKey::new(user.clone(), "laptop").scopes(["chat:write", "models:read"]);
        let key = manager.issue(new).await.unwrap();
        let caller = authenticator.authenticate(key.expose_secret()).await.unwrap();
        by_digest.insert(Sha256::digest(key.expose_secret()).into(), caller);
        keys.push(key);
    }
    let bare = Router::new().route("/v1/models", get(async || "ok"));
    let by_hand = bare.clone().layer(MapRequestLayer::new(move |mut request: Request| {
        let token = request.headers()[AUTHORIZATION].as_bytes().strip_prefix(b"Bearer ").unwrap();
        let digest: [u8; 32] = Sha256::digest(token).into();
        let caller = by_digest.get(&digest).unwrap();
        request.extensions_mut().insert(caller);
        request
    }));
    let with = bare.clone().layer(ApiKeyAuthLayer::from(authenticator));
    for router in [bare, by_hand, with] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        println!("{}", listener.local_addr().unwrap());
        tokio::spawn(async { axum::serve(listener, router).await });
    }
    keys.iter().for_each(|key| println!("{}", key.expose_secret()));
    let input = || io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(input).await.unwrap().unwrap();
}
