//! The task that loads the keys and follows the change feed: [`follow`].

use std::{
    collections::VecDeque,
    future::{Future, pending, poll_fn},
    pin::{Pin, pin},
    sync::{Arc, Weak},
    task::Poll,
    time::Duration,
};

use futures_core::Stream;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::{
    Core,
    content::{ABSENT_LIFETIME, Tick},
    pending::{BATCH, Batch, Pending},
};
use crate::{
    coherence::MINIMUM_REVISION_LIFETIME,
    error::{StoreError, StoreErrorKind},
    record::KeyId,
    runtime::{Moment, within},
    store::{Change, ChangeStream, KeySelection, KeyStore, KeysRead, ReadOwner, ReplicaState},
    telemetry,
};

/// Number of keys that are loaded at once.
const PAGE: u32 = 1_000;
/// Deadline of one read.
const DEADLINE: Duration = Duration::from_secs(30);
/// Minimum and maximum pause after a read that failed.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(10)];
/// Pause before something is read once more, because the read did not include the last change: a standby lags behind.
const LAG_PAUSE: Duration = Duration::from_millis(100);
/// Pause before a feed that has ended is read again.
const FEED_PAUSE: Duration = Duration::from_secs(1);

/// Follows the feed of the store, and keeps the keys in memory, until the replica is dropped.
pub(super) async fn follow<S: KeyStore>(replica: Weak<Core<S>>) {
    if let Some(core) = replica.upgrade() {
        core.begin_anew();
    }
    while let Some(core) = replica.upgrade() {
        let since = core.clock.read().minus(MINIMUM_REVISION_LIFETIME).wall();
        let changes = core.store.changes(since);
        let is_off = *core.content.state().borrow() == ReplicaState::TooManyKeys;
        drop(core);
        let follower = Follower {
            replica: Weak::clone(&replica),
            changes,
            stage: if is_off { Stage::Off } else { Stage::Waiting },
            read: None,
            single: 0,
            was_batch: false,
            pause: Duration::ZERO,
            paused_until: None,
            lagging: Vec::new(),
            lagging_until: None,
            absent: VecDeque::new(),
        };
        if follower.run().await.is_none() {
            return;
        }
        telemetry::feed_ended();
        sleep(FEED_PAUSE).await;
    }
}

/// State of the task while it reads one stream.
struct Follower<S> {
    replica: Weak<Core<S>>,
    changes: ChangeStream,
    stage: Stage,
    /// The read under way. There is one at a time, so that the result of an earlier one never replaces that of a later
    /// one.
    read: Option<Pin<Box<dyn Future<Output = Option<Done>> + Send>>>,
    /// Number of the next batches that have one subject each, to find the one that the store can't read.
    single: usize,
    /// Whether the last read was of what has changed. During a load, a page comes next.
    was_batch: bool,
    /// The pause after the last read; zero after a read that succeeded.
    pause: Duration,
    paused_until: Option<Instant>,
    /// What has to be read once more, and when.
    lagging: Vec<Pending>,
    lagging_until: Option<Instant>,
    /// The lookup ids under which no key was found after a change, and when they were read.
    absent: VecDeque<(Moment, Box<str>)>,
}

enum Stage {
    /// The position in the feed is not known yet.
    Waiting,
    /// The keys up to this one are read.
    Loading(Option<KeyId>, Instant),
    Loaded,
    /// There are too many keys, or the store can't read them.
    Off,
}

/// A read that has ended.
enum Done {
    Page(Result<KeysRead, StoreError>),
    Keys(Batch, Tick, Result<KeysRead, StoreError>),
    Owners(Batch, Tick, Result<Vec<ReadOwner>, StoreError>),
}

enum Event {
    Change(Option<Change>),
    Done(Option<Done>),
    /// A read is queued, or a pause has ended.
    Wake,
}

impl<S: KeyStore> Follower<S> {
    /// Follows the stream to its end. Returns `None` if the replica was dropped.
    async fn run(mut self) -> Option<()> {
        loop {
            self.begin_read()?;
            match self.next().await? {
                Event::Change(Some(change)) => self.apply(change)?,
                Event::Change(None) => {
                    // Until the next stream begins, changes may be missed.
                    return self.apply(Change::Reset);
                }
                Event::Done(done) => self.finish(done?)?,
                Event::Wake => {}
            }
        }
    }

    /// Waits for what happens next. A change comes before the result of a read that was sent earlier.
    async fn next(&mut self) -> Option<Event> {
        let core = self.replica.upgrade()?;
        let content = Arc::clone(&core.content);
        drop(core);
        let is_idle = self.read.is_none() && self.is_reading();
        let (paused_until, lagging_until) = (self.paused_until, self.lagging_until);
        let mut woken = pin!(async {
            match (is_idle, paused_until, lagging_until) {
                (false, _, _) => pending().await,
                (true, Some(until), _) => sleep_until(until).await,
                (true, None, None) => content.woken().await,
                (true, None, Some(until)) => {
                    let _ = timeout_at(until, content.woken()).await;
                }
            }
        });
        let (changes, read) = (&mut self.changes, &mut self.read);
        let event = poll_fn(|cx| {
            if let Poll::Ready(change) = Pin::new(&mut *changes).poll_next(cx) {
                return Poll::Ready(Event::Change(change));
            }
            if let Some(read) = read
                && let Poll::Ready(done) = read.as_mut().poll(cx)
            {
                return Poll::Ready(Event::Done(done));
            }
            woken.as_mut().poll(cx).map(|()| Event::Wake)
        })
        .await;
        match &event {
            Event::Done(_) => self.read = None,
            Event::Wake => self.paused_until = None,
            Event::Change(_) => {}
        }
        Some(event)
    }

    fn is_reading(&self) -> bool {
        matches!(self.stage, Stage::Loading(..) | Stage::Loaded)
    }

    /// Sends the next read, if none is under way: of what has changed, or of the next page.
    fn begin_read(&mut self) -> Option<()> {
        if self.read.is_some() || self.paused_until.is_some() || !self.is_reading() {
            return Some(());
        }
        let core = self.replica.upgrade()?;
        let waiting = core.content.pending();
        if self.lagging_until.is_some_and(|until| Instant::now() >= until) {
            self.lagging_until = None;
            self.lagging.drain(..).for_each(|subject| waiting.push(subject));
        }
        let replica = Weak::clone(&self.replica);
        if let Stage::Loading(after, _) = &self.stage
            && (self.was_batch || waiting.is_empty())
        {
            self.was_batch = false;
            let page = KeySelection::Page { after: after.clone(), limit: PAGE };
            self.read = Some(Box::pin(async move {
                let core = replica.upgrade()?;
                Some(Done::Page(in_time(core.store.read_keys(&page)).await))
            }));
        } else if let Some(batch) = waiting.take(if self.single > 0 { 1 } else { BATCH }) {
            self.was_batch = true;
            self.single = self.single.saturating_sub(1);
            // Taken after the batch: a change that is marked later is not included.
            self.read = Some(Box::pin(read_batch(replica, batch, core.content.tick())));
        }
        Some(())
    }

    /// Applies a change, and passes it on.
    fn apply(&mut self, change: Change) -> Option<()> {
        let core = self.replica.upgrade()?;
        let content = &core.content;
        match &change {
            Change::Prefix(..) | Change::Owner(..) => content.mark(&change),
            Change::Reset if matches!(self.stage, Stage::Off) => {}
            Change::Reset => {
                self.read = None;
                self.absent.clear();
                self.lagging.clear();
                self.stage = Stage::Waiting;
                content.clear(ReplicaState::Loading);
            }
            Change::Synced(as_of) => {
                let now = core.clock.read();
                content.synced(*as_of, now);
                if let Stage::Waiting = self.stage {
                    content.begin(*as_of);
                    self.stage = Stage::Loading(None, Instant::now());
                }
                self.expire_absent(&core, now);
                core.report();
            }
            Change::Status(_) => {}
        }
        core.log.append(change);
        Some(())
    }

    fn expire_absent(&mut self, core: &Core<S>, now: Moment) {
        if !matches!(self.stage, Stage::Loaded) {
            return;
        }
        while let Some((read_at, id)) = self.absent.front()
            && now.since(*read_at) > ABSENT_LIFETIME
        {
            core.content.remove_absent(id);
            self.absent.pop_front();
        }
    }

    fn finish(&mut self, done: Done) -> Option<()> {
        let core = self.replica.upgrade()?;
        let content = &core.content;
        match done {
            Done::Page(Ok(read)) => {
                self.pause = Duration::ZERO;
                self.add_page(&core, read);
            }
            Done::Keys(Batch::Ids(ids), tick, Ok(read)) => {
                self.pause = Duration::ZERO;
                log_unreadable(&read);
                let (again, absent) = content.replace(&ids, tick, read);
                let now = core.clock.read();
                self.absent.extend(absent.into_iter().map(|id| (now, id)));
                self.repeat(again);
                self.check_size(&core);
            }
            Done::Owners(Batch::Owners(owners), tick, Ok(read)) => {
                self.pause = Duration::ZERO;
                self.repeat(content.replace_owners(&owners, tick, read));
            }
            Done::Page(Err(error)) => self.retry(&core, None, &error),
            Done::Keys(batch, _, Err(error)) | Done::Owners(batch, _, Err(error)) => {
                self.retry(&core, Some(batch), &error);
            }
            // A batch has the kind that was read.
            Done::Keys(Batch::Owners(_), ..) | Done::Owners(Batch::Ids(_), ..) => {}
        }
        Some(())
    }

    fn add_page(&mut self, core: &Core<S>, read: KeysRead) {
        let Stage::Loading(_, began) = self.stage else { return };
        log_unreadable(&read);
        let is_last = read.rows.len() < PAGE as usize;
        let last = read.rows.last().map(|row| row.id.clone());
        core.content.insert_page(read);
        self.stage = Stage::Loading(last, began);
        if self.check_size(core) && is_last {
            self.stage = Stage::Loaded;
            core.content.loaded();
            core.report();
            let (keys, bytes) = (core.content.keys(), core.content.bytes());
            telemetry::replica_loaded(keys, bytes, began.elapsed());
        }
    }

    /// Reads once more, after a pause, what a read did not include.
    fn repeat(&mut self, again: Vec<Pending>) {
        if !again.is_empty() {
            self.lagging.extend(again);
            // The end of the pause is not moved, because something may be read too early on each read.
            self.lagging_until.get_or_insert_with(|| Instant::now() + LAG_PAUSE);
        }
    }

    /// Retries a read that failed, after a pause. Until then, look-ups of what has changed are passed on to the store.
    fn retry(&mut self, core: &Core<S>, batch: Option<Batch>, error: &StoreError) {
        if error.kind() == StoreErrorKind::Unsupported {
            return self.turn_off(core, &error.to_string());
        }
        if self.pause.is_zero() {
            telemetry::replica_read_failed(error);
        }
        self.pause = (self.pause * 2).clamp(PAUSES[0], PAUSES[1]);
        self.paused_until = Some(Instant::now() + self.pause);
        let subjects = batch.map(Batch::into_pending).unwrap_or_default();
        if !error.is_transient() && !subjects.is_empty() {
            if subjects.len() == 1 {
                // It is not read before it changes again. Its mark stays, so that look-ups are passed on to the store.
                return;
            }
            self.single = subjects.len();
        }
        subjects.into_iter().for_each(|subject| core.content.pending().push(subject));
    }

    /// Turns the replica off if there are too many keys. Returns whether it is still on.
    fn check_size(&mut self, core: &Core<S>) -> bool {
        if core.content.keys() <= core.max_keys {
            return true;
        }
        let reason = format!("the store has more than {} keys", core.max_keys);
        self.turn_off(core, &reason);
        false
    }

    fn turn_off(&mut self, core: &Core<S>, reason: &str) {
        self.stage = Stage::Off;
        self.read = None;
        core.content.clear(ReplicaState::TooManyKeys);
        core.report();
        telemetry::replica_is_off(reason);
    }
}

/// Reads what has changed.
async fn read_batch<S: KeyStore>(replica: Weak<Core<S>>, batch: Batch, tick: Tick) -> Option<Done> {
    let core = replica.upgrade()?;
    Some(match &batch {
        Batch::Ids(ids) => {
            let selection = KeySelection::Under(ids.clone());
            let read = in_time(core.store.read_keys(&selection)).await;
            Done::Keys(batch, tick, read)
        }
        Batch::Owners(owners) => {
            let read = in_time(core.store.read_owners(owners)).await;
            Done::Owners(batch, tick, read)
        }
    })
}

async fn in_time<T>(read: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    within(DEADLINE, read).await.unwrap_or_else(|| Err(StoreError::timeout(DEADLINE)))
}

/// Logs the rows that can't be decoded. Such a key fails; the others are not affected.
fn log_unreadable(read: &KeysRead) {
    for row in &read.rows {
        if let Err(error) = &row.key {
            telemetry::replica_bad_row(error);
        }
    }
}
