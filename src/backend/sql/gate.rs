//! The queue in front of a store's connections for look-ups: [`LookupGate`].

#[cfg(feature = "postgres")]
mod seat;

use std::{
    collections::BTreeMap,
    future::{Future, pending, poll_fn},
    iter,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::oneshot};

#[cfg(feature = "postgres")]
pub(in crate::backend) use self::seat::Seat;
use crate::{
    error::StoreError,
    store::{Lookup, Priority, Waiting},
};

/// Maximum number of waiting suspect look-ups in all.
const WAITING_SUSPECTS: usize = 64;
/// Pause after a suspect look-up, as a multiple of its duration. One suspect look-up runs at a time. All of them
/// together use less than a tenth of one connection, whatever their number.
const SUSPECT_PAUSE: u32 = 10;
/// Maximum length of this pause, for a store that hangs.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Bounds the running and waiting look-ups of a store, and orders the waiting ones by [`Priority`]. Beyond the bound, a
/// look-up replaces one of lower priority, or is rejected.
///
/// A look-up that gets a connection after a wait may run others that still wait in one statement with its own, which
/// then get an answer and no connection.
#[derive(Debug)]
pub(in crate::backend) struct LookupGate {
    state: Mutex<GateState>,
    max_waiting: usize,
}

#[derive(Debug)]
struct GateState {
    free: usize,
    last_ticket: u64,
    /// Waiting look-ups by priority, in the order of arrival.
    queues: [BTreeMap<u64, QueuedLookup>; Priority::ALL.len()],
    is_suspect_running: bool,
    suspects_from: Option<Instant>,
    /// Whether a thread runs `dispatch`. It goes on until no connection is free or no look-up waits.
    is_dispatching: bool,
}

#[derive(Debug)]
struct QueuedLookup {
    /// The lookup id, if another look-up may run this one.
    #[cfg_attr(not(feature = "postgres"), expect(dead_code))]
    batched_id: Option<String>,
    /// The requests that wait for it.
    waiters: Option<Arc<dyn Waiting>>,
    turn: oneshot::Sender<TurnOrError>,
}

/// What a look-up waits for.
#[derive(Debug)]
pub(in crate::backend) enum Turn {
    /// It may use a connection.
    Run(Permit),
    /// Another look-up has run it.
    #[cfg_attr(not(feature = "postgres"), expect(dead_code))]
    Answered(Result<Batched, StoreError>),
}

/// What a batch reads for each of its look-ups. SQLite has no batches.
#[cfg(feature = "postgres")]
type Batched = super::found::Found;
#[cfg(not(feature = "postgres"))]
type Batched = std::convert::Infallible;

type TurnOrError = Result<Turn, StoreError>;

/// A permit of a look-up to use a connection, valid until it is dropped, on any thread.
#[derive(Debug)]
pub(in crate::backend) struct Permit {
    /// `None` after it was returned.
    gate: Option<Arc<LookupGate>>,
    /// For a suspect look-up: its start, and the runtime that times the pause after it.
    suspect: Option<(Instant, Option<Handle>)>,
}

/// A place in the queue, which is freed on drop.
#[derive(Debug)]
struct Ticket<'a> {
    gate: &'a LookupGate,
    priority: Priority,
    number: u64,
    turn: oneshot::Receiver<TurnOrError>,
}

/// The place of a look-up at its arrival.
enum Arrival<'a> {
    Run(Permit),
    Wait(Ticket<'a>),
}

impl LookupGate {
    /// Creates a gate in front of `permits` connections, for at most `waiting` waiting look-ups per connection.
    pub(in crate::backend) fn new(permits: usize, waiting: usize) -> Arc<Self> {
        let state = GateState {
            free: permits,
            last_ticket: 0,
            queues: std::array::from_fn(|_| BTreeMap::new()),
            is_suspect_running: false,
            suspects_from: None,
            is_dispatching: false,
        };
        Arc::new(Self { state: Mutex::new(state), max_waiting: permits.saturating_mul(waiting) })
    }

    /// Waits until `lookup` may use a connection.
    ///
    /// # Errors
    ///
    /// As [`pass_or_join`](Self::pass_or_join).
    pub(in crate::backend) async fn pass(
        self: &Arc<Self>,
        lookup: &Lookup,
    ) -> Result<Permit, StoreError> {
        match self.turn(lookup, None).await? {
            Turn::Run(permit) => Ok(permit),
            Turn::Answered(_) => Err(StoreError::unavailable("another look-up has run this one")),
        }
    }

    /// Waits until `lookup` may use a connection or until another look-up has run it, which does not happen to a suspect
    /// one ([`Permit::take_waiting`]). Dropping the future frees its place, and the permit if it has one by then.
    ///
    /// The wait for a connection ends when no request waits for the answer any more. If a connection is free, the
    /// look-up runs nevertheless: it may be the one that detects the recovery of the store.
    ///
    /// # Errors
    ///
    /// `Overloaded` if too many look-ups wait, or no request waits for this one.
    #[cfg(feature = "postgres")]
    pub(in crate::backend) async fn pass_or_join(self: &Arc<Self>, lookup: &Lookup) -> TurnOrError {
        self.turn(lookup, Some(lookup.id())).await
    }

    async fn turn(self: &Arc<Self>, lookup: &Lookup, batched_id: Option<&str>) -> TurnOrError {
        // Before it is in the queue, so that `dispatch` reports the opposite later.
        let _waiting = lookup.hold_nothing();
        match self.arrive(lookup.priority(), batched_id, lookup.waiting())? {
            Arrival::Run(permit) => Ok(Turn::Run(permit)),
            Arrival::Wait(mut ticket) => ticket.turn(lookup).await,
        }
    }

    fn arrive(
        self: &Arc<Self>,
        priority: Priority,
        batched_id: Option<&str>,
        waiters: Option<&Arc<dyn Waiting>>,
    ) -> Result<Arrival<'_>, StoreError> {
        let mut state = self.state();
        if state.may_run(priority) {
            return Ok(Arrival::Run(state.take(self, priority)));
        }
        state.make_room(priority, self.max_waiting)?;
        state.last_ticket += 1;
        let (number, (sender, turn)) = (state.last_ticket, oneshot::channel());
        let (batched_id, waiters) = (batched_id.map(str::to_owned), waiters.cloned());
        let queued = QueuedLookup { batched_id, waiters, turn: sender };
        state.queues[priority as usize].insert(number, queued);
        Ok(Arrival::Wait(Ticket { gate: self, priority, number, turn }))
    }

    /// Passes free connections to waiting look-ups.
    fn dispatch<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, GateState>) {
        if std::mem::replace(&mut state.is_dispatching, true) {
            return;
        }
        loop {
            let passed: Vec<_> = iter::from_fn(|| state.pass_next(self)).collect();
            if passed.is_empty() {
                state.is_dispatching = false;
                return;
            }
            drop(state);
            // Not under the lock: if the runtime of a look-up has shut down, this drops the look-up, and then its permit.
            for waiters in passed.into_iter().flatten() {
                // A panic of that look-up or of its waker must not end the dispatch.
                let _ = catch_unwind(AssertUnwindSafe(move || waiters.set_holding(true)));
            }
            state = self.state();
        }
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.state().queues.iter().map(BTreeMap::len).sum()
    }
}

impl GateState {
    fn may_run(&self, priority: Priority) -> bool {
        // While a connection is free, only suspect look-ups wait, or `dispatch` is about to pass it on.
        let is_promised = self.is_dispatching
            && [Priority::Known, Priority::Ordinary]
                .iter()
                .any(|&waiting| !self.queues[waiting as usize].is_empty());
        self.free > 0 && !is_promised && (priority != Priority::Suspect || self.may_suspect_run())
    }

    fn may_suspect_run(&self) -> bool {
        !self.is_suspect_running && self.suspects_from.is_none_or(|from| Instant::now() >= from)
    }

    fn take(&mut self, gate: &Arc<LookupGate>, priority: Priority) -> Permit {
        self.free -= 1;
        let is_suspect = priority == Priority::Suspect;
        self.is_suspect_running |= is_suspect;
        let suspect = is_suspect.then(|| (Instant::now(), Handle::try_current().ok()));
        Permit { gate: Some(Arc::clone(gate)), suspect }
    }

    /// Makes room for one more look-up. If the queue is full, a look-up of lower priority is removed.
    fn make_room(&mut self, priority: Priority, max: usize) -> Result<(), StoreError> {
        let is_suspect = priority == Priority::Suspect;
        if is_suspect && self.queues[Priority::Suspect as usize].len() >= WAITING_SUSPECTS {
            return Err(overloaded());
        }
        if self.queues.iter().map(BTreeMap::len).sum::<usize>() < max {
            return Ok(());
        }
        let lower = &mut self.queues[..priority as usize];
        let evicted = lower.iter_mut().find_map(|queue| queue.pop_last());
        let (_, evicted) = evicted.ok_or_else(overloaded)?;
        let _ = evicted.turn.send(Err(overloaded()));
        Ok(())
    }

    /// Passes a free connection to the next look-up. Returns the requests that wait for it; `None` if there is no free
    /// connection or no look-up.
    fn pass_next(&mut self, gate: &Arc<LookupGate>) -> Option<Option<Arc<dyn Waiting>>> {
        while self.free > 0 {
            let may_suspect_run = self.may_suspect_run();
            let priority = Priority::ALL.into_iter().rev().find(|&priority| {
                !self.queues[priority as usize].is_empty()
                    && (priority != Priority::Suspect || may_suspect_run)
            })?;
            let (_, next) = self.queues[priority as usize].pop_first()?;
            let permit = self.take(gate, priority);
            let Err(Ok(Turn::Run(mut permit))) = next.turn.send(Ok(Turn::Run(permit))) else {
                return Some(next.waiters);
            };
            // The receiver was dropped. The permit must not be dropped here, which would lock this again.
            permit.gate = None;
            self.free += 1;
            self.is_suspect_running &= priority != Priority::Suspect;
        }
        None
    }
}

fn overloaded() -> StoreError {
    StoreError::overloaded("too many look-ups wait for the key store", Duration::from_secs(1))
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(gate) = self.gate.take() else { return };
        let mut state = gate.state();
        state.free += 1;
        if let Some((began, handle)) = self.suspect.take() {
            let pause = began.elapsed().saturating_mul(SUSPECT_PAUSE).min(LONGEST_PAUSE);
            state.is_suspect_running = false;
            state.suspects_from = Some(Instant::now() + pause);
            if let Some(handle) = handle {
                let gate = Arc::clone(&gate);
                // If its runtime ends, the next look-up passes the free connections on.
                handle.spawn(async move {
                    tokio::time::sleep(pause).await;
                    gate.dispatch(gate.state());
                });
            }
        }
        gate.dispatch(state);
    }
}

impl Ticket<'_> {
    /// Waits for the turn, as long as requests wait for the answer.
    async fn turn(&mut self, lookup: &Lookup) -> TurnOrError {
        let left = async {
            match lookup.waiting() {
                Some(waiting) => waiting.have_left().await,
                None => pending().await,
            }
        };
        let mut left = pin!(left);
        let turn_or_left = poll_fn(|cx| match Pin::new(&mut self.turn).poll(cx) {
            Poll::Ready(turn) => Poll::Ready(Some(turn)),
            Poll::Pending => left.as_mut().poll(cx).map(|()| None),
        });
        let turn = match turn_or_left.await {
            Some(turn) => turn,
            None if self.leave() => {
                let message = "no request waits for this look-up any more";
                return Err(StoreError::overloaded(message, Duration::from_secs(1)));
            }
            // It has its turn, or runs with another look-up.
            None => (&mut self.turn).await,
        };
        // The sender stays in the queue while this waits. A batch ends without an answer if its runtime ends.
        turn.map_err(StoreError::unavailable)?
    }

    /// Frees the place. Returns whether it was still in the queue.
    fn leave(&self) -> bool {
        self.gate.state().queues[self.priority as usize].remove(&self.number).is_some()
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests;
