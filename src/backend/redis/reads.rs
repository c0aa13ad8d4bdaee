//! Reads of entries, alone or combined: [`EntryReads`].
//!
//! While few reads are under way, one is sent at once and alone. The others wait, and are then sent many to a command: of
//! 10,000 look-ups at once, each command and each answer on its own would cost more than a look-up in the database.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use deadpool_redis::redis::{Value, cmd};
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
    commands: usize,
    waiting: VecDeque<WaitingRead>,
}

struct WaitingRead {
    names: Vec<String>,
    values: oneshot::Sender<Option<Vec<Value>>>,
}

/// The right to send one command. When it is dropped, the reads that wait are sent.
struct ReadTurn(Arc<EntryReads>);

impl EntryReads {
    pub(super) fn new(link: Arc<Link>) -> Arc<Self> {
        let combines = AtomicBool::new(!link.connector().is_cluster());
        Arc::new(Self { link, queue: Mutex::default(), combines })
    }

    /// Reads the entries with these names, in their order, within the limit of the link. `None` if Redis does not answer,
    /// or not in time.
    pub(super) async fn read(self: &Arc<Self>, names: &Names) -> Option<Vec<Value>> {
        let waiting = {
            let mut queue = self.queue();
            if queue.commands < self.max_commands() {
                queue.commands += 1;
                None
            } else {
                let (values, waiting) = oneshot::channel();
                let names = names.all().map(str::to_owned).collect();
                queue.waiting.push_back(WaitingRead { names, values });
                Some(waiting)
            }
        };
        match waiting {
            None => {
                let _turn = ReadTurn(Arc::clone(self));
                self.run(&names.all().collect::<Vec<_>>()).await.ok()
            }
            Some(values) => within(self.link.limit, values).await?.ok()?,
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

    /// Sends the reads of a batch in one command.
    async fn run_batch(&self, batch: Vec<WaitingRead>) {
        let names: Vec<_> = batch.iter().flat_map(|read| &read.names).map(String::as_str).collect();
        let mut values = match self.run(&names).await {
            Ok(values) => values.into_iter(),
            Err(fault) => {
                if matches!(fault, Fault::Refused(_)) && batch.len() > 1 {
                    self.combines.store(false, Ordering::Relaxed);
                }
                // The store is read instead.
                return;
            }
        };
        for read in batch {
            let own = values.by_ref().take(read.names.len()).collect();
            let _ = read.values.send(Some(own));
        }
    }

    fn queue(&self) -> MutexGuard<'_, ReadQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadQueue {
    /// Takes up to `max` reads that somebody still waits for.
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
        let reads = &self.0;
        let max = if reads.combines.load(Ordering::Relaxed) { MAX_COMBINED } else { 1 };
        let mut queue = reads.queue();
        let runtime = Handle::try_current();
        let batch = match &runtime {
            Ok(_) => queue.take(max),
            // The waiting reads end, and the store is read instead.
            Err(_) => {
                queue.waiting.clear();
                Vec::new()
            }
        };
        match runtime {
            Ok(runtime) if !batch.is_empty() => {
                drop(queue);
                let turn = Self(Arc::clone(reads));
                runtime.spawn(async move { turn.0.run_batch(batch).await });
            }
            _ => queue.commands -= 1,
        }
    }
}
