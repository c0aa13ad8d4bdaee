//! A network between a client and a server that the test controls: it passes, delays, corrupts, or fails.

use std::{
    io,
    net::{Ipv4Addr, TcpListener as Listener},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering::SeqCst},
        mpsc as std_mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::servers::Port;

/// A TCP proxy on a port of the loopback address. It runs on a thread and a clock of its own, so that a test
/// may block, or stop its clock. Orders hold for open connections and for new ones, and have been carried
/// out when the method returns.
pub struct Proxy {
    port: Port,
    target: u16,
    shared: Arc<Shared>,
    orders: mpsc::UnboundedSender<(Order, std_mpsc::Sender<()>)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Mode {
    #[default]
    Pass,
    Delay(Duration),
    BlackHole,
    Corrupt,
    Refuse,
}

enum Order {
    Change(Mode),
    Reset,
    End,
}

#[derive(Default)]
struct Shared {
    mode: watch::Sender<Mode>,
    /// The port of the server that new connections lead to.
    server: AtomicU16,
    /// The answer to the next request that contains these bytes is lost.
    to_swallow: Mutex<Option<Vec<u8>>>,
    swallowed: AtomicUsize,
    accepted: AtomicUsize,
    open: AtomicUsize,
    bytes_to_server: AtomicU64,
    bytes_to_client: AtomicU64,
}

impl Proxy {
    /// A proxy that passes everything to this port of the loopback address.
    pub fn start(target: u16) -> Self {
        let (port, listener) = listen();
        let shared = Arc::new(Shared { server: AtomicU16::new(target), ..Shared::default() });
        let (orders, received) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let serve = serve(listener, port.number(), Arc::clone(&shared), received);
        let thread = thread::spawn(move || runtime.block_on(serve));
        Self { port, target, shared, orders, thread: Some(thread) }
    }

    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// A URL of the server, such as `redis.url()` or `postgres.tcp_url("")`, that leads through the proxy.
    pub fn url(&self, of_server: &str) -> String {
        let [from, to] = [self.target, self.port()].map(|port| format!(":{port}/"));
        assert!(of_server.contains(&from), "not a URL of the server behind the proxy");
        of_server.replacen(&from, &to, 1)
    }

    /// Heals whatever was wrong. What a black hole held back goes on its way.
    pub fn pass(&self) {
        self.order(Order::Change(Mode::Pass));
    }

    /// Everything arrives this much later, in both directions: a question and its answer take twice as long.
    pub fn delay(&self, by: Duration) {
        self.order(Order::Change(Mode::Delay(by)));
    }

    /// Closes all connections and listens no more: connections are refused at once.
    pub fn refuse(&self) {
        self.order(Order::Change(Mode::Refuse));
    }

    /// Connections stay open and new ones are accepted, and nothing arrives at either end: a lost network.
    pub fn black_hole(&self) {
        self.order(Order::Change(Mode::BlackHole));
    }

    /// Leads new connections to another server, as a failover does; open ones stay.
    pub fn switch_to(&self, server: u16) {
        self.shared.server.store(server, SeqCst);
    }

    /// Inverts every byte that the server sends.
    pub fn corrupt(&self) {
        self.order(Order::Change(Mode::Corrupt));
    }

    /// Drops all connections with a TCP reset, once.
    pub fn reset(&self) {
        self.order(Order::Reset);
    }

    /// The server gets the next request, on whichever connection, and the client never its answer: the
    /// connection closes instead.
    pub fn swallow_next_answer(&self) {
        self.swallow_answer_to("");
    }

    /// The same for the next request with this text in it, when others may come before it.
    pub fn swallow_answer_to(&self, text: &str) {
        *self.shared.to_swallow.lock().unwrap() = Some(text.as_bytes().to_vec());
    }

    /// How many answers it has swallowed.
    pub fn swallowed(&self) -> usize {
        self.shared.swallowed.load(SeqCst)
    }

    /// How many connections it has accepted.
    pub fn connections(&self) -> usize {
        self.shared.accepted.load(SeqCst)
    }

    /// How many connections are open.
    pub fn open_connections(&self) -> usize {
        self.shared.open.load(SeqCst)
    }

    /// How many bytes have been passed to the server.
    pub fn bytes_to_server(&self) -> u64 {
        self.shared.bytes_to_server.load(SeqCst)
    }

    /// How many bytes have been passed to clients.
    pub fn bytes_to_client(&self) -> u64 {
        self.shared.bytes_to_client.load(SeqCst)
    }

    fn order(&self, order: Order) {
        let (done, is_done) = std_mpsc::channel();
        let _ = self.orders.send((order, done));
        is_done.recv().expect("the proxy runs");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let (done, _) = std_mpsc::channel();
        let _ = self.orders.send((Order::End, done));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen() -> (Port, Listener) {
    for _ in 0..10 {
        let port = Port::claim();
        if let Ok(listener) = Listener::bind((Ipv4Addr::LOCALHOST, port.number())) {
            listener.set_nonblocking(true).unwrap();
            return (port, listener);
        }
    }
    panic!("ten ports were free and then taken");
}

/// Accepts connections and carries out orders, until it gets the order to end.
async fn serve(
    listener: Listener,
    port: u16,
    shared: Arc<Shared>,
    mut orders: mpsc::UnboundedReceiver<(Order, std_mpsc::Sender<()>)>,
) {
    let mut listener = Some(TcpListener::from_std(listener).unwrap());
    let mut connections = JoinSet::new();
    let resets = watch::Sender::new(());
    loop {
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            order = orders.recv() => {
                let Some((order, done)) = order else { return };
                if matches!(order, Order::End) {
                    return;
                }
                if let Order::Change(mode) = order {
                    shared.mode.send_replace(mode);
                    if mode == Mode::Refuse {
                        listener = None;
                    } else if listener.is_none() {
                        listener = Some(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.unwrap());
                    }
                }
                if matches!(order, Order::Reset | Order::Change(Mode::Refuse)) {
                    resets.send_replace(());
                    while connections.join_next().await.is_some() {}
                }
                let _ = done.send(());
            }
            Ok((client, _)) = accepted => {
                let (shared, reset) = (Arc::clone(&shared), resets.subscribe());
                shared.accepted.fetch_add(1, SeqCst);
                connections.spawn(connection(client, shared, reset));
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Counts a connection for as long as it is open.
struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, SeqCst);
    }
}

async fn connection(mut client: TcpStream, shared: Arc<Shared>, mut reset: watch::Receiver<()>) {
    shared.open.fetch_add(1, SeqCst);
    let _open = Open(Arc::clone(&shared));
    let relayed = tokio::select! {
        relayed = relay(&mut client, &shared) => relayed.is_ok(),
        _ = reset.changed() => false,
    };
    if !relayed {
        let _ = client.set_zero_linger();
    }
}

async fn relay(client: &mut TcpStream, shared: &Shared) -> io::Result<()> {
    shared.until_it_passes().await;
    let target = shared.server.load(SeqCst);
    let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, target)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let answer_is_lost = AtomicBool::new(false);
    let request = |bytes: &mut [u8]| {
        let mut wanted = shared.to_swallow.lock().unwrap();
        if wanted.as_ref().is_some_and(|wanted| contains(bytes, wanted)) {
            *wanted = None;
            answer_is_lost.store(true, SeqCst);
        }
        shared.bytes_to_server.fetch_add(bytes.len() as u64, SeqCst);
        Ok(())
    };
    let answer = |bytes: &mut [u8]| {
        if answer_is_lost.load(SeqCst) {
            shared.swallowed.fetch_add(1, SeqCst);
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if *shared.mode.borrow() == Mode::Corrupt {
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
        }
        shared.bytes_to_client.fetch_add(bytes.len() as u64, SeqCst);
        Ok(())
    };
    let requests = pump(from_client, to_server, shared, request);
    tokio::try_join!(requests, pump(from_server, to_client, shared, answer))?;
    Ok(())
}

/// One direction. Reading goes on while bytes wait for their time, so that a delay does not narrow the way.
async fn pump(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    shared: &Shared,
    on_its_way: impl Fn(&mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let (queue, mut queued) = mpsc::channel(64);
    let read = async move {
        loop {
            let mut bytes = vec![0; 16 * 1024];
            let length = from.read(&mut bytes).await?;
            bytes.truncate(length);
            let due = Instant::now() + shared.delay();
            if queue.send((due, bytes)).await.is_err() || length == 0 {
                return io::Result::Ok(());
            }
        }
    };
    let write = async {
        while let Some((due, mut bytes)) = queued.recv().await {
            sleep_until(due).await;
            shared.until_it_passes().await;
            if bytes.is_empty() {
                return to.shutdown().await;
            }
            on_its_way(&mut bytes)?;
            to.write_all(&bytes).await?;
        }
        Ok(())
    };
    tokio::try_join!(read, write)?;
    Ok(())
}

impl Shared {
    fn delay(&self) -> Duration {
        if let Mode::Delay(by) = *self.mode.borrow() { by } else { Duration::ZERO }
    }

    async fn until_it_passes(&self) {
        let mut mode = self.mode.subscribe();
        let _ = mode.wait_for(|mode| *mode != Mode::BlackHole).await;
    }
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    wanted.is_empty() || bytes.windows(wanted.len()).any(|window| window == wanted)
}
