//! Look-ups that leave the queue because another one runs them: [`Seat`].

use tokio::sync::oneshot;

use super::{Batched, Permit, QueuedLookup, Turn, TurnOrError};
use crate::{
    error::StoreError,
    store::{Lookup, Priority},
};

/// The place of a look-up in a batch.
#[derive(Debug)]
pub(in crate::backend) struct Seat {
    id: String,
    turn: oneshot::Sender<TurnOrError>,
}

/// The end of a seat at which its look-up waits.
pub(in crate::backend) type SeatTurn = oneshot::Receiver<TurnOrError>;

impl Seat {
    /// Creates a seat for a look-up that is not in the queue.
    pub(in crate::backend) fn of(lookup: &Lookup) -> (Self, SeatTurn) {
        let (turn, waiting) = oneshot::channel();
        (Self { id: lookup.id().to_owned(), turn }, waiting)
    }

    /// Takes the lookup id out.
    pub(in crate::backend) fn take_id(&mut self) -> String {
        std::mem::take(&mut self.id)
    }

    /// Completes when the look-up was dropped, or its deadline has passed.
    pub(in crate::backend) async fn has_left(&mut self) {
        self.turn.closed().await;
    }

    pub(in crate::backend) fn answer(self, answer: Result<Batched, StoreError>) {
        let _ = self.turn.send(Ok(Turn::Answered(answer)));
    }
}

impl Permit {
    /// Takes up to `max` look-ups out of the queue: those of the highest priority first, in the order of arrival. A suspect
    /// look-up takes none and is not taken, because the pause after it depends on its duration.
    pub(in crate::backend) fn take_waiting(&self, max: usize) -> Vec<Seat> {
        let Some(gate) = self.gate.as_ref().filter(|_| self.suspect.is_none()) else {
            return Vec::new();
        };
        let mut state = gate.state();
        let mut seats = Vec::new();
        for priority in [Priority::Known, Priority::Ordinary] {
            let queue = &mut state.queues[priority as usize];
            let batched = queue.iter().filter(|(_, queued)| queued.batched_id.is_some());
            let numbers: Vec<_> =
                batched.map(|(number, _)| *number).take(max - seats.len()).collect();
            for number in numbers {
                if let Some(QueuedLookup { batched_id: Some(id), turn, .. }) = queue.remove(&number)
                {
                    seats.push(Seat { id, turn });
                }
            }
        }
        seats
    }
}
