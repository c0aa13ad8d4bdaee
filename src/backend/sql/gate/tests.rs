//! The bounds and the order of look-ups.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::SystemTime,
};

use super::*;
#[cfg(feature = "postgres")]
use crate::{backend::sql::found::Found, record::Revision};

/// Maximum number of waiting look-ups per connection.
const WAITING: usize = 256;

type Acquiring = Pin<Box<dyn Future<Output = TurnOrError>>>;

fn gate(permits: usize) -> Arc<LookupGate> {
    LookupGate::new(permits, WAITING)
}

fn begin(gate: &Arc<LookupGate>, priority: Priority) -> (Acquiring, Poll<TurnOrError>) {
    begin_with(gate, priority, None)
}

fn begin_with(
    gate: &Arc<LookupGate>,
    priority: Priority,
    batched_id: Option<&'static str>,
) -> (Acquiring, Poll<TurnOrError>) {
    let gate = Arc::clone(gate);
    let mut acquiring: Acquiring = Box::pin(async move {
        match gate.arrive(priority, batched_id, None)? {
            Arrival::Run(permit) => Ok(Turn::Run(permit)),
            Arrival::Wait(mut ticket) => (&mut ticket.turn).await.unwrap(),
        }
    });
    let first = poll(&mut acquiring);
    (acquiring, first)
}

fn poll(acquiring: &mut Acquiring) -> Poll<TurnOrError> {
    acquiring.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

fn granted(turn: Poll<TurnOrError>) -> Permit {
    match turn {
        Poll::Ready(Ok(Turn::Run(permit))) => permit,
        other => panic!("{other:?}"),
    }
}

#[test]
fn known_keys_run_first_and_suspects_last() {
    let gate = gate(1);
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
    let gate = gate(4);
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
    let gate = gate(1);
    let _permit = granted(begin(&gate, Priority::Known).1);
    let mut suspects: Vec<_> =
        (0..WAITING_SUSPECTS).map(|_| begin(&gate, Priority::Suspect).0).collect();
    assert!(matches!(begin(&gate, Priority::Suspect).1, Poll::Ready(Err(_))));
    let mut ordinary = Vec::new();
    while gate.len() < WAITING {
        ordinary.push(begin(&gate, Priority::Ordinary).0);
    }
    let (last, pass) = begin(&gate, Priority::Ordinary);
    assert!(pass.is_pending());
    assert_eq!(gate.len(), WAITING);
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
    let gate = gate(1);
    let permit = granted(begin(&gate, Priority::Ordinary).1);
    let (gone, _) = begin(&gate, Priority::Ordinary);
    drop(gone);
    assert_eq!(gate.len(), 0);
    // This one is dropped while it has the permit.
    let (handed, _) = begin(&gate, Priority::Ordinary);
    drop(permit);
    drop(handed);
    granted(begin(&gate, Priority::Ordinary).1);
    assert_eq!(gate.state().free, 1);
}

#[cfg(feature = "postgres")]
#[test]
fn a_batch_takes_known_keys_first_in_the_order_of_arrival_and_no_suspects() {
    let gate = gate(1);
    let permit = granted(begin(&gate, Priority::Ordinary).1);
    let suspect = begin(&gate, Priority::Suspect).0;
    let alone = begin(&gate, Priority::Ordinary).0;
    let mut batched: Vec<_> = [
        (Priority::Ordinary, "ordinary 1"),
        (Priority::Ordinary, "ordinary 2"),
        (Priority::Known, "known 1"),
        (Priority::Known, "known 2"),
    ]
    .map(|(priority, id)| begin_with(&gate, priority, Some(id)).0)
    .into_iter()
    .collect();
    let ids = |seats: &mut [Seat]| -> Vec<String> { seats.iter_mut().map(Seat::take_id).collect() };
    let mut first = permit.take_waiting(3);
    assert_eq!(ids(&mut first), ["known 1", "known 2", "ordinary 1"]);
    assert_eq!(ids(&mut permit.take_waiting(3)), ["ordinary 2"]);
    assert_eq!(gate.len(), 2, "the suspect, and the one that joins no batch");
    for (answer, seat) in (0..).zip(first) {
        seat.answer(Ok(Found {
            as_of: SystemTime::UNIX_EPOCH,
            latest: Revision(answer),
            rows: Vec::new(),
        }));
    }
    for (waiter, expected) in [(2, 0), (3, 1), (0, 2)] {
        match poll(&mut batched[waiter]) {
            Poll::Ready(Ok(Turn::Answered(Ok(found)))) => assert_eq!(found.latest.0, expected),
            other => panic!("{other:?}"),
        }
    }
    drop((suspect, alone));
}

#[cfg(feature = "postgres")]
#[test]
fn a_suspect_takes_no_others_with_it() {
    let gate = gate(1);
    let permit = granted(begin(&gate, Priority::Suspect).1);
    let _waiting = begin_with(&gate, Priority::Known, Some("known")).0;
    assert!(permit.take_waiting(3).is_empty());
}
