//! The client of Redis and its circuit breaker: [`Link`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use deadpool_redis::redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value, cmd};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::servers::{Connection, Connector};
use crate::{
    runtime::{Background, within},
    telemetry,
};

/// One multiplexed connection, which is established and re-established in the background, and a circuit breaker: while
/// it is open, Redis costs a request nothing.
pub(crate) struct Link {
    connector: Connector,
    /// Maximum time that a request waits for Redis.
    pub(crate) limit: Duration,
    state: watch::Sender<State>,
    /// Number of consecutive connection faults and timeouts.
    faults: AtomicU32,
    /// Number of connections so far, to distinguish a fault of this connection from one of the last.
    made: AtomicU64,
    connecting: Background,
}

#[derive(Clone)]
enum State {
    /// No request has used it yet.
    Idle,
    /// The first connection is being established. Requests wait for it for a short time.
    Connecting,
    Up {
        connection: Connection,
        number: u64,
        since: Instant,
    },
    /// The circuit breaker is open.
    Down,
}

/// Whether a [`RedisCache`](crate::RedisCache) or a limiter uses Redis at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RedisState {
    /// Redis was not used yet, or the first connection is being established.
    Connecting,
    /// Redis is used.
    Up,
    /// The circuit breaker is open: Redis is not used, and is probed in the background.
    Down,
}

/// The reason why Redis returned no answer.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The circuit breaker is open, so that no command was sent.
    Open,
    /// Redis did not answer in time, or the connection broke.
    Link,
    /// Redis returned an error.
    Refused(RedisError),
}

/// Number of consecutive faults that open the circuit breaker.
const FAULTS: u32 = 5;
/// Minimum and maximum pause between probes. It grows from the one to the other, with jitter, so that the nodes of a
/// fleet do not reconnect at the same time.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(2)];
/// Maximum duration of a probe. It may take longer than a request.
const PROBE_LIMIT: Duration = Duration::from_secs(2);

impl Link {
    pub(crate) fn new(connector: Connector, limit: Duration) -> Arc<Self> {
        Arc::new(Self {
            connector,
            limit,
            state: watch::Sender::new(State::Idle),
            faults: AtomicU32::new(0),
            made: AtomicU64::new(0),
            connecting: Background::default(),
        })
    }

    pub(crate) fn connector(&self) -> &Connector {
        &self.connector
    }

    pub(crate) fn state(&self) -> RedisState {
        match &*self.state.borrow() {
            State::Idle | State::Connecting => RedisState::Connecting,
            State::Up { .. } => RedisState::Up,
            State::Down => RedisState::Down,
        }
    }

    /// Runs a command within the limit.
    pub(crate) async fn run(self: &Arc<Self>, command: &Cmd) -> Result<Value, Fault> {
        let (mut connection, number, left) = match self.connected() {
            Some((connection, number)) => (connection, number, self.limit),
            None => {
                let begin = Instant::now();
                let connection = within(self.limit, self.connection()).await;
                let (connection, number) = connection.unwrap_or(Err(Fault::Open))?;
                (connection, number, self.limit.saturating_sub(begin.elapsed()))
            }
        };
        match within(left, command.query_async(&mut connection)).await {
            Some(Ok(Value::ServerError(error))) => Err(self.rejected(error.into(), number)),
            Some(Ok(value)) => {
                self.faults.store(0, Ordering::Relaxed);
                Ok(value)
            }
            Some(Err(error)) if is_connection_fault(&error) => {
                // A closed connection can't be used any more.
                let faults = if error.is_unrecoverable_error() { FAULTS } else { 1 };
                self.fault(number, faults);
                Err(Fault::Link)
            }
            Some(Err(error)) => Err(self.rejected(error, number)),
            None => {
                self.fault(number, 1);
                Err(Fault::Link)
            }
        }
    }

    /// Waits until Redis is up, or for `limit`.
    pub(crate) async fn wait_until_up(&self, limit: Duration) {
        let mut state = self.state.subscribe();
        let up = state.wait_for(|state| matches!(state, State::Up { .. }));
        // The caller checks the state again in either case.
        let _ = timeout(limit, up).await;
    }

    /// Returns the connection if it is established, which needs neither a timer nor a subscription.
    fn connected(&self) -> Option<(Connection, u64)> {
        match &*self.state.borrow() {
            State::Up { connection, number, .. } => Some((connection.clone(), *number)),
            State::Idle | State::Connecting | State::Down => None,
        }
    }

    async fn connection(self: &Arc<Self>) -> Result<(Connection, u64), Fault> {
        let mut state = self.state.subscribe();
        loop {
            match &*state.borrow_and_update() {
                State::Up { connection, number, .. } => return Ok((connection.clone(), *number)),
                State::Down => {
                    // The task that probes may have ended with its runtime.
                    self.ensure_connecting();
                    return Err(Fault::Open);
                }
                State::Idle | State::Connecting => {}
            }
            self.state.send_if_modified(|state| {
                let is_first = matches!(state, State::Idle);
                if is_first {
                    *state = State::Connecting;
                }
                is_first
            });
            self.ensure_connecting();
            state.changed().await.map_err(|_| Fault::Open)?;
        }
    }

    /// Returns the error as a fault. If a server has become a replica, or a part of a cluster, the client connects
    /// again to find the new one. Any other error is not a fault of the connection.
    fn rejected(self: &Arc<Self>, error: RedisError, number: u64) -> Fault {
        use ServerErrorKind::{Ask, ClusterDown, MasterDown, Moved, ReadOnly};
        let has_moved = matches!(
            error.kind(),
            ErrorKind::Server(ReadOnly | Moved | Ask | MasterDown | ClusterDown)
        );
        // After a recent reconnection, the same server would be found again.
        let is_settled = matches!(
            &*self.state.borrow(),
            State::Up { number: current, since, .. } if *current == number && since.elapsed() > PAUSES[1]
        );
        if has_moved && is_settled {
            self.fault(number, FAULTS);
        } else {
            self.faults.store(0, Ordering::Relaxed);
        }
        Fault::Refused(error)
    }

    fn fault(self: &Arc<Self>, number: u64, count: u32) {
        if self.faults.fetch_add(count, Ordering::Relaxed) + count < FAULTS {
            return;
        }
        let has_opened = self.state.send_if_modified(|state| {
            // A newer connection is not at fault.
            let is_it = matches!(state, State::Up { number: current, .. } if *current == number);
            if is_it {
                *state = State::Down;
            }
            is_it
        });
        if has_opened {
            telemetry::redis_is_down();
            self.ensure_connecting();
        }
    }

    fn ensure_connecting(self: &Arc<Self>) {
        self.connecting.ensure(|| connect(Arc::downgrade(self)));
    }

    async fn probe(&self) -> Result<Connection, String> {
        let mut connection = self.connector.connect().await?;
        let pong: Result<Value, _> = cmd("PING").query_async(&mut connection).await;
        pong.map_err(|error| error.to_string())?;
        Ok(connection)
    }
}

/// Retries until there is a connection, or the client was dropped.
async fn connect(link: std::sync::Weak<Link>) {
    let mut pause = PAUSES[0];
    loop {
        let Some(link) = link.upgrade() else { return };
        let outcome = timeout(PROBE_LIMIT, link.probe()).await;
        let outcome = outcome.unwrap_or_else(|_| Err("the probe timed out".to_owned()));
        match outcome {
            Ok(connection) => {
                link.faults.store(0, Ordering::Relaxed);
                let number = link.made.fetch_add(1, Ordering::Relaxed);
                link.state.send_replace(State::Up { connection, number, since: Instant::now() });
                telemetry::redis_is_up();
                return;
            }
            Err(reason) => {
                let is_first = link.state.send_if_modified(|state| {
                    let is_first = !matches!(state, State::Down);
                    *state = State::Down;
                    is_first
                });
                telemetry::redis_is_unreachable(&reason, is_first);
            }
        }
        drop(link);
        sleep(jittered(pause)).await;
        pause = (pause * 2).min(PAUSES[1]);
    }
}

/// Returns a random duration between a half and the whole of `pause`.
fn jittered(pause: Duration) -> Duration {
    let mut random = [0];
    let share = getrandom::fill(&mut random).map_or(0.5, |()| f64::from(random[0]) / 255.0);
    pause.mul_f64(0.5 + 0.5 * share)
}

fn is_connection_fault(error: &RedisError) -> bool {
    error.is_io_error()
        || error.is_timeout()
        || error.is_connection_dropped()
        || error.is_connection_refusal()
        || error.is_unrecoverable_error()
        || matches!(error.kind(), ErrorKind::Parse | ErrorKind::ClusterConnectionNotFound)
}
