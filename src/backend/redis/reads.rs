//! Reads of entries, alone or combined: [`EntryReads`].
//!
//! While few reads are under way, a read is sent at once and alone. Beyond that, reads wait, and are then sent many to a
//! command. With a command for each of 10,000 look-ups at once, Redis took longer than the database, and the last reads
//! exceeded the limit of the link.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use deadpool_redis::redis::{ErrorKind, ServerErrorKind, Value, cmd};
use tokio::sync::oneshot;

use super::names::Names;
use crate::{
    redis::{Fault, Link},
    runtime::within,
};

/// Maximum number of commands under way.
const MAX_COMMANDS: usize = 16;
/// Maximum number of reads in one command.
const MAX_COMBINED: usize = 64;

pub(super) struct EntryReads {
    link: Arc<Link>,
    queue: Mutex<ReadQueue>,
    /// Whether the server reads entries of several look-ups in one command. A cluster does not, and a proxy may not.
    combines: AtomicBool,
}

#[derive(Default)]
struct ReadQueue {
    /// Number and start of the commands under way, in the order of their starts.
    commands: VecDeque<(u64, Instant)>,
    last_number: u64,
    waiting: VecDeque<WaitingRead>,
}

struct WaitingRead {
    names: Vec<String>,
    outcome: oneshot::Sender<ReadOutcome>,
}

/// What a read waits for.
enum ReadOutcome {
    /// It sends a command, for itself and for other reads that wait.
    Send(ReadTurn, Vec<WaitingRead>),
    /// Another read has sent the command.
    Read(Vec<Value>),
}

/// The right to send one command. When it is dropped, a read that waits gets it, with others.
struct ReadTurn {
    /// `None` after the right was passed on.
    reads: Option<Arc<EntryReads>>,
    number: u64,
}

impl EntryReads {
    pub(super) fn new(link: Arc<Link>) -> Arc<Self> {
        let combines = AtomicBool::new(!link.connector().is_cluster());
        Arc::new(Self { link, queue: Mutex::default(), combines })
    }

    /// Reads the entries with these names, in their order. `None` if Redis does not answer. It waits for its turn or for
    /// the answer to another read at most for the limit of the link, and then for its own answer at most as long.
    pub(super) async fn read(self: &Arc<Self>, names: &Names) -> Option<Vec<Value>> {
        let (turn, others) = match self.enter(names) {
            Ok(turn) => (turn, Vec::new()),
            Err(waiting) => match within(self.link.limit, waiting).await?.ok()? {
                ReadOutcome::Send(turn, others) => (turn, others),
                ReadOutcome::Read(values) => return Some(values),
            },
        };
        let own: Vec<_> = names.all().collect();
        let of_others = others.iter().flat_map(|read| &read.names).map(String::as_str);
        let all: Vec<_> = own.iter().copied().chain(of_others).collect();
        let outcome = self.run(&all).await;
        drop(turn);
        let mut values = match outcome {
            Ok(values) => values.into_iter(),
            Err(fault) => {
                if !others.is_empty() && rejects_several(&fault) {
                    self.combines.store(false, Ordering::Relaxed);
                }
                // The others end with their channels.
                return None;
            }
        };
        let values_of_own = values.by_ref().take(own.len()).collect();
        for read in others {
            let values = values.by_ref().take(read.names.len()).collect();
            let _ = read.outcome.send(ReadOutcome::Read(values));
        }
        Some(values_of_own)
    }

    /// Returns the right to send a command, or the end of a channel on which it arrives.
    fn enter(self: &Arc<Self>, names: &Names) -> Result<ReadTurn, oneshot::Receiver<ReadOutcome>> {
        let mut queue = self.queue();
        let now = Instant::now();
        // A command whose runtime is not driven any more does not end.
        let is_lost =
            |began: Instant| now.duration_since(began) > self.link.limit.saturating_mul(4);
        if queue.commands.front().is_some_and(|(_, began)| is_lost(*began)) {
            queue.commands.pop_front();
        }
        if queue.commands.len() < self.max_commands() {
            return Ok(queue.begin(self, now));
        }
        // Those that have left would remain in the queue if no command ended.
        while queue.waiting.front().is_some_and(|read| read.outcome.is_closed()) {
            queue.waiting.pop_front();
        }
        let (outcome, waiting) = oneshot::channel();
        let names = names.all().map(str::to_owned).collect();
        queue.waiting.push_back(WaitingRead { names, outcome });
        Err(waiting)
    }

    /// Passes the right to send a command on to the reads that wait.
    fn pass_on(self: Arc<Self>, number: u64) {
        let max = if self.combines.load(Ordering::Relaxed) { MAX_COMBINED } else { 1 };
        let mut queue = self.queue();
        queue.commands.retain(|(command, _)| *command != number);
        while queue.commands.len() < self.max_commands() {
            let mut batch = queue.take(max).into_iter();
            let Some(first) = batch.next() else { return };
            let turn = queue.begin(&self, Instant::now());
            let Err(ReadOutcome::Send(mut turn, others)) =
                first.outcome.send(ReadOutcome::Send(turn, batch.collect()))
            else {
                return;
            };
            // It has left meanwhile. The turn must not be dropped with the queue locked.
            turn.reads = None;
            queue.commands.pop_back();
            for read in others.into_iter().rev() {
                queue.waiting.push_front(read);
            }
        }
    }

    fn max_commands(&self) -> usize {
        match self.combines.load(Ordering::Relaxed) {
            true => MAX_COMMANDS,
            false => MAX_COMMANDS * MAX_COMBINED,
        }
    }

    async fn run(&self, names: &[&str]) -> Result<Vec<Value>, Fault> {
        let mut command = cmd("MGET");
        command.arg(names);
        match self.link.run(&command).await? {
            Value::Array(values) if values.len() == names.len() => Ok(values),
            _ => Err(Fault::Link),
        }
    }

    fn queue(&self) -> MutexGuard<'_, ReadQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns whether the server reads no entries of several look-ups in one command. Other errors pass.
fn rejects_several(fault: &Fault) -> bool {
    use ServerErrorKind::{Ask, CrossSlot, Moved, ResponseError};
    matches!(fault, Fault::Refused(error)
        if matches!(error.kind(), ErrorKind::Server(CrossSlot | Moved | Ask | ResponseError)))
}

impl ReadQueue {
    fn begin(&mut self, reads: &Arc<EntryReads>, now: Instant) -> ReadTurn {
        self.last_number += 1;
        self.commands.push_back((self.last_number, now));
        ReadTurn { reads: Some(Arc::clone(reads)), number: self.last_number }
    }

    /// Takes up to `max` reads whose look-ups still wait.
    fn take(&mut self, max: usize) -> Vec<WaitingRead> {
        let mut batch = Vec::new();
        while batch.len() < max
            && let Some(read) = self.waiting.pop_front()
        {
            if !read.outcome.is_closed() {
                batch.push(read);
            }
        }
        batch
    }
}

impl Drop for ReadTurn {
    fn drop(&mut self) {
        if let Some(reads) = self.reads.take() {
            reads.pass_on(self.number);
        }
    }
}
