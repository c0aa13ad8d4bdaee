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

use deadpool_redis::redis::{Cmd, ErrorKind, ServerErrorKind, Value};
use tokio::{runtime::Handle, sync::oneshot};

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
    values: oneshot::Sender<Vec<Value>>,
}

/// The right to send one command. When it is dropped, the reads that wait are sent.
struct ReadTurn {
    reads: Arc<EntryReads>,
    number: u64,
}

impl EntryReads {
    pub(super) fn new(link: Arc<Link>) -> Arc<Self> {
        let combines = AtomicBool::new(!link.connector().is_cluster());
        Arc::new(Self { link, queue: Mutex::default(), combines })
    }

    /// Reads the entries with these names, in their order. `None` if Redis does not answer within the limit of the link,
    /// or twice that if the read has to wait.
    pub(super) async fn read(self: &Arc<Self>, names: &Names) -> Option<Vec<Value>> {
        match self.enter(names) {
            Ok(_turn) => self.run(names.all()).await.ok(),
            Err(waiting) => within(self.link.limit.saturating_mul(2), waiting).await?.ok(),
        }
    }

    /// Returns the right to send a command, or the end of a channel on which the values arrive.
    fn enter(self: &Arc<Self>, names: &Names) -> Result<ReadTurn, oneshot::Receiver<Vec<Value>>> {
        let mut queue = self.queue();
        let now = Instant::now();
        // A command does not end while its request is not polled, or its runtime is not driven. After twice the limit,
        // others are sent in its place.
        let is_lost =
            |began: Instant| now.duration_since(began) > self.link.limit.saturating_mul(2);
        while queue.commands.front().is_some_and(|(_, began)| is_lost(*began)) {
            queue.commands.pop_front();
        }
        if queue.commands.len() < self.max_commands() {
            let number = queue.begin(now);
            return Ok(ReadTurn { reads: Arc::clone(self), number });
        }
        // Those that have left would remain in the queue if no command ended.
        while queue.waiting.front().is_some_and(|read| read.values.is_closed()) {
            queue.waiting.pop_front();
        }
        let (values, waiting) = oneshot::channel();
        let names = names.all().map(str::to_owned).collect();
        queue.waiting.push_back(WaitingRead { names, values });
        Err(waiting)
    }

    /// Ends a command, and sends reads that wait. A task sends them, because their requests may not be polled at present.
    /// Without a runtime they end without values.
    fn end(self: &Arc<Self>, number: u64) {
        let max = if self.combines.load(Ordering::Relaxed) { MAX_COMBINED } else { 1 };
        let mut queue = self.queue();
        queue.commands.retain(|(command, _)| *command != number);
        let runtime = Handle::try_current();
        while queue.commands.len() < self.max_commands() {
            let batch = queue.take(max);
            if batch.is_empty() {
                return;
            }
            if let Ok(runtime) = &runtime {
                let number = queue.begin(Instant::now());
                runtime.spawn(run_all(Arc::clone(self), number, batch));
            }
        }
    }

    fn max_commands(&self) -> usize {
        match self.combines.load(Ordering::Relaxed) {
            true => MAX_COMMANDS,
            false => MAX_COMMANDS * MAX_COMBINED,
        }
    }

    async fn run<'a>(
        &self,
        names: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Vec<Value>, Fault> {
        const MGET: &str = "MGET";
        let (count, bytes) =
            names.clone().fold((0, MGET.len()), |(n, bytes), name| (n + 1, bytes + name.len()));
        let mut command = Cmd::with_capacity(1 + count, bytes);
        command.arg(MGET);
        for name in names {
            command.arg(name);
        }
        match self.link.run(&command).await? {
            Value::Array(values) if values.len() == count => Ok(values),
            _ => Err(Fault::Link),
        }
    }

    fn queue(&self) -> MutexGuard<'_, ReadQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends one command for all of these reads. If it fails, they end without values.
async fn run_all(reads: Arc<EntryReads>, number: u64, batch: Vec<WaitingRead>) {
    // The turn is created here. If a runtime that shuts down drops this task before its first poll, no turn ends, and no
    // further task is spawned.
    let turn = ReadTurn { reads: Arc::clone(&reads), number };
    let outcome = reads.run(batch.iter().flat_map(|read| &read.names).map(String::as_str)).await;
    if let Err(fault) = &outcome
        && batch.len() > 1
        && rejects_several(fault)
    {
        reads.combines.store(false, Ordering::Relaxed);
    }
    drop(turn);
    let Ok(values) = outcome else { return };
    let mut values = values.into_iter();
    for read in batch {
        let _ = read.values.send(values.by_ref().take(read.names.len()).collect());
    }
}

/// Returns whether the server reads no entries of several look-ups in one command. Other errors pass.
fn rejects_several(fault: &Fault) -> bool {
    use ServerErrorKind::{Ask, CrossSlot, Moved, ResponseError};
    matches!(fault, Fault::Refused(error)
        if matches!(error.kind(), ErrorKind::Server(CrossSlot | Moved | Ask | ResponseError)))
}

impl ReadQueue {
    /// Adds a command, and returns its number.
    fn begin(&mut self, now: Instant) -> u64 {
        self.last_number += 1;
        self.commands.push_back((self.last_number, now));
        self.last_number
    }

    /// Takes up to `max` reads whose look-ups still wait.
    fn take(&mut self, max: usize) -> Vec<WaitingRead> {
        let mut batch = Vec::new();
        while batch.len() < max
            && let Some(read) = self.waiting.pop_front()
        {
            if !read.values.is_closed() {
                batch.push(read);
            }
        }
        batch
    }
}

impl Drop for ReadTurn {
    fn drop(&mut self) {
        self.reads.end(self.number);
    }
}
