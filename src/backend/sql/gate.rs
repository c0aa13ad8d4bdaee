//! The queue in front of a store's connections for look-ups: [`LookupGate`].

use std::{
    collections::BTreeMap,
    future::{Future, pending, poll_fn},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::oneshot};

use crate::{
    error::StoreError,
    store::{Lookup, Priority},
};

/// Maximum number of waiting look-ups per connection.
const WAITING_PER_PERMIT: usize = 256;
/// Maximum number of waiting suspect look-ups in all.
const WAITING_SUSPECTS: usize = 64;
/// Pause after a suspect look-up, as a multiple of its duration. One suspect look-up runs at a time. All of them
/// together use less than a tenth of one connection, whatever their number.
const SUSPECT_PAUSE: u32 = 10;
/// Maximum length of this pause, for a store that hangs.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Bounds the running and waiting look-ups of a store, and orders the waiting ones by [`Priority`]. Beyond the bound, a
/// look-up replaces one of lower priority, or is rejected.
#[derive(Debug)]
pub(in crate::backend) struct LookupGate {
    state: Mutex<Waiting>,
    max_waiting: usize,
}

#[derive(Debug)]
struct Waiting {
    free: usize,
    last_ticket: u64,
    /// Waiting look-ups by priority, in the order of arrival.
    queues: [BTreeMap<u64, oneshot::Sender<Pass>>; Priority::ALL.len()],
    is_suspect_running: bool,
    suspects_from: Option<Instant>,
}

type Pass = Result<Permit, StoreError>;

/// A permit of a look-up to use a connection, valid until it is dropped, on any thread.
#[derive(Debug)]
pub(in crate::backend) struct Permit {
    /// `None` after it was returned.
    gate: Option<Arc<LookupGate>>,
    /// For a suspect look-up: its start, and the runtime that times the pause after it.
    suspect: Option<(Instant, Option<Handle>)>,
}

/// A place in the queue, which is freed on drop.
struct Ticket<'a> {
    gate: &'a LookupGate,
    priority: Priority,
    number: u64,
}

impl LookupGate {
    /// Creates a gate in front of `permits` connections.
    pub(in crate::backend) fn new(permits: usize) -> Arc<Self> {
        let state = Waiting {
            free: permits,
            last_ticket: 0,
            queues: std::array::from_fn(|_| BTreeMap::new()),
            is_suspect_running: false,
            suspects_from: None,
        };
        let max_waiting = permits.saturating_mul(WAITING_PER_PERMIT);
        Arc::new(Self { state: Mutex::new(state), max_waiting })
    }

    /// Waits until the look-up may use a connection. Dropping the future frees its place, and the permit if it has one
    /// by then.
    ///
    /// # Errors
    ///
    /// `Overloaded` if too many look-ups wait.
    pub(in crate::backend) async fn acquire(self: &Arc<Self>, priority: Priority) -> Pass {
        let (number, passed) = {
            let mut waiting = self.waiting();
            if waiting.may_run(priority) {
                return Ok(waiting.take(self, priority));
            }
            waiting.make_room(priority, self.max_waiting)?;
            waiting.last_ticket += 1;
            let (number, (pass, passed)) = (waiting.last_ticket, oneshot::channel());
            waiting.queues[priority as usize].insert(number, pass);
            (number, passed)
        };
        let _ticket = Ticket { gate: self, priority, number };
        // The sender stays in the queue while this waits.
        passed.await.map_err(StoreError::unavailable)?
    }

    /// Waits until `lookup` may use a connection. It ends when no request waits for the answer any more, unless a
    /// connection is free: a look-up whose caller was dropped may be the one that detects the recovery of the store.
    ///
    /// # Errors
    ///
    /// `Overloaded` if too many look-ups wait, or no request waits for this one.
    pub(in crate::backend) async fn pass(self: &Arc<Self>, lookup: &Lookup) -> Pass {
        let left = async {
            match lookup.waiting() {
                Some(waiting) => waiting.have_left().await,
                None => pending().await,
            }
        };
        let (mut pass, mut left) = (pin!(self.acquire(lookup.priority())), pin!(left));
        poll_fn(|cx| match pass.as_mut().poll(cx) {
            Poll::Ready(pass) => Poll::Ready(pass),
            Poll::Pending => left.as_mut().poll(cx).map(|()| {
                let message = "no request waits for this look-up any more";
                Err(StoreError::overloaded(message, Duration::from_secs(1)))
            }),
        })
        .await
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.waiting().queues.iter().map(BTreeMap::len).sum()
    }
}

impl Waiting {
    fn may_run(&self, priority: Priority) -> bool {
        // While a connection is free, only suspect look-ups wait.
        self.free > 0 && (priority != Priority::Suspect || self.may_suspect_run())
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
        let _ = evicted.send(Err(overloaded()));
        Ok(())
    }

    /// Passes free connections to waiting look-ups.
    fn dispatch(&mut self, gate: &Arc<LookupGate>) {
        while self.free > 0 {
            let may_suspect_run = self.may_suspect_run();
            let next = Priority::ALL.into_iter().rev().find(|&priority| {
                !self.queues[priority as usize].is_empty()
                    && (priority != Priority::Suspect || may_suspect_run)
            });
            let Some(priority) = next else { return };
            let Some((_, pass)) = self.queues[priority as usize].pop_first() else { return };
            let permit = self.take(gate, priority);
            if let Err(Ok(mut permit)) = pass.send(Ok(permit)) {
                // The receiver was dropped. The permit must not be dropped here, which would lock this again.
                permit.gate = None;
                self.free += 1;
                self.is_suspect_running &= priority != Priority::Suspect;
            }
        }
    }
}

fn overloaded() -> StoreError {
    StoreError::overloaded("too many look-ups wait for the key store", Duration::from_secs(1))
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(gate) = self.gate.take() else { return };
        let mut waiting = gate.waiting();
        waiting.free += 1;
        if let Some((began, handle)) = self.suspect.take() {
            let pause = began.elapsed().saturating_mul(SUSPECT_PAUSE).min(LONGEST_PAUSE);
            waiting.is_suspect_running = false;
            waiting.suspects_from = Some(Instant::now() + pause);
            if let Some(handle) = handle {
                let gate = Arc::clone(&gate);
                // If its runtime ends, the next look-up passes the free connections on.
                handle.spawn(async move {
                    tokio::time::sleep(pause).await;
                    gate.waiting().dispatch(&gate);
                });
            }
        }
        waiting.dispatch(&gate);
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.gate.waiting().queues[self.priority as usize].remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::Pin,
        task::{Context, Poll, Waker},
    };

    use super::*;

    type Acquiring = Pin<Box<dyn Future<Output = Pass>>>;

    fn begin(gate: &Arc<LookupGate>, priority: Priority) -> (Acquiring, Poll<Pass>) {
        let gate = Arc::clone(gate);
        let mut acquiring: Acquiring = Box::pin(async move { gate.acquire(priority).await });
        let first = poll(&mut acquiring);
        (acquiring, first)
    }

    fn poll(acquiring: &mut Acquiring) -> Poll<Pass> {
        acquiring.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    fn granted(pass: Poll<Pass>) -> Permit {
        match pass {
            Poll::Ready(Ok(permit)) => permit,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn known_keys_run_first_and_suspects_last() {
        let gate = LookupGate::new(1);
        let first = granted(begin(&gate, Priority::Ordinary).1);
        let mut waiting: Vec<_> =
            Priority::ALL.map(|priority| begin(&gate, priority).0).into_iter().collect();
        let mut permit = first;
        while let Some(mut next) = waiting.pop() {
            assert!(poll(&mut next).is_pending());
            drop(permit);
            permit = granted(poll(&mut next));
        }
        assert_eq!(gate.len(), 0);
    }

    #[test]
    fn one_suspect_runs_at_a_time_and_the_next_one_after_a_pause() {
        let gate = LookupGate::new(4);
        let first = granted(begin(&gate, Priority::Suspect).1);
        let (mut second, pass) = begin(&gate, Priority::Suspect);
        assert!(pass.is_pending(), "three connections are free");
        let _ordinary = granted(begin(&gate, Priority::Ordinary).1);
        std::thread::sleep(Duration::from_millis(20));
        drop(first);
        assert!(poll(&mut second).is_pending(), "the pause lasts 200 ms");
    }

    #[test]
    fn past_the_bound_a_look_up_replaces_one_of_lower_priority() {
        let gate = LookupGate::new(1);
        let _permit = granted(begin(&gate, Priority::Known).1);
        let mut suspects: Vec<_> =
            (0..WAITING_SUSPECTS).map(|_| begin(&gate, Priority::Suspect).0).collect();
        assert!(matches!(begin(&gate, Priority::Suspect).1, Poll::Ready(Err(_))));
        let mut ordinary = Vec::new();
        while gate.len() < WAITING_PER_PERMIT {
            ordinary.push(begin(&gate, Priority::Ordinary).0);
        }
        let (last, pass) = begin(&gate, Priority::Ordinary);
        assert!(pass.is_pending());
        assert_eq!(gate.len(), WAITING_PER_PERMIT);
        assert!(matches!(poll(&mut suspects[WAITING_SUSPECTS - 1]), Poll::Ready(Err(_))));
        for _ in 1..WAITING_SUSPECTS {
            ordinary.push(begin(&gate, Priority::Ordinary).0);
        }
        assert!(matches!(begin(&gate, Priority::Ordinary).1, Poll::Ready(Err(_))));
        assert!(begin(&gate, Priority::Known).1.is_pending(), "it replaces an ordinary look-up");
        drop(last);
    }

    #[test]
    fn a_waiter_that_is_dropped_loses_no_permit() {
        let gate = LookupGate::new(1);
        let permit = granted(begin(&gate, Priority::Ordinary).1);
        let (gone, _) = begin(&gate, Priority::Ordinary);
        drop(gone);
        assert_eq!(gate.len(), 0);
        // This one is dropped while it has the permit.
        let (handed, _) = begin(&gate, Priority::Ordinary);
        drop(permit);
        drop(handed);
        granted(begin(&gate, Priority::Ordinary).1);
        assert_eq!(gate.waiting().free, 1);
    }
}
