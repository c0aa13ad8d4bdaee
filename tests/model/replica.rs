//! A replica as a model of its own: two keys in pages of one, a load, a feed and re-reads in every order, and a request.
//!
//! A change of a key raises its *version*. The replica receives changes in their order, marks the key, and passes the
//! change on to its node; a page or a re-read is sent, reads the database, and returns; one of them is under way at a time.
//! The feed may lose a change, and resets then before it reports the next sync. A re-read may come from a standby that
//! lags behind. A node forgets its minimum version when no read from before the change can be under way.
//!
//! An answer has to be that of a version which includes each change that the node has received, or that a sync of the node
//! includes, when the request begins. Mechanisms can be taken out; the tests show what goes wrong without each.

use std::time::Instant;

use stateright::{Checker, Model, Property};

const KEYS: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mechanism {
    /// A change is marked while the keys are loaded, too.
    MarkDuringLoad,
    /// A page never replaces a mark.
    PageKeepsMark,
    /// A re-read that was sent before the mark does not clear it.
    ReadAfterMark,
    /// A re-read below the reported version does not clear the mark.
    VersionOfMark,
    /// A request checks that nothing was removed while it read.
    Epoch,
    /// A reset removes everything and loads again.
    ReloadOnReset,
    /// What is read again is not older than what a mark has replaced.
    NeverOlder,
    /// The replica marks a change before it passes it on.
    MarkBeforeForward,
    /// The node compares what is in memory with its minimum version.
    Minimum,
    /// What a lookup id without an entry is worth: nothing before all keys are loaded.
    OnlyWhenLoaded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Answer {
    Valid,
    Denied,
    Unknown,
}

/// What may happen.
#[derive(Clone, Debug)]
struct Setup {
    /// The answers about each key, version by version.
    histories: [&'static [Answer]; KEYS],
    losses: u8,
    lags: bool,
    without: Vec<Mechanism>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    /// The keys that have changed, in order.
    log: Vec<usize>,
    losses: u8,
    replica: Replica,
    node: Node,
    request: Option<Request>,
    served: Option<Served>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Replica {
    /// Number of changes received or lost.
    position: usize,
    /// A change was lost.
    must_reset: bool,
    stage: Stage,
    epoch: u8,
    ticks: u8,
    slots: [Slot; KEYS],
    pending: [bool; KEYS],
    read: Option<Read>,
    /// A change that was passed on and is not marked yet.
    unmarked: Option<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Stage {
    Waiting,
    Loading(usize),
    Loaded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Slot {
    Empty,
    Read { version: usize },
    Mark { tick: u8, minimum: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Read {
    key: usize,
    is_page: bool,
    tick: u8,
    /// What the database has returned.
    version: Option<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    /// Events on their way.
    events: Vec<Event>,
    minimum: [usize; KEYS],
    /// The versions that the last sync includes.
    synced: Option<[usize; KEYS]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Event {
    Change(usize, usize),
    Reset,
    Sync([usize; KEYS]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Request {
    key: usize,
    /// The version that the answer has to include.
    needed: usize,
    epoch: u8,
    found: Option<(Answer, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Served {
    request: Request,
    answer: Answer,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Change(usize),
    Receive,
    MarkLate,
    Lose,
    Reset,
    Sync,
    Deliver,
    Forget(usize),
    SendPage,
    SendRead(usize),
    /// The database reads this version.
    Execute(usize),
    Return,
    Ask(usize),
    Look,
    Serve,
}

const NOTHING_OLD: &str = "no answer is from before what the node knows";
const IS_SERVED: &str = "a request is answered from memory after a change and a load";
const READ_TWICE: &str = "a re-read is overtaken by a change";
const MARKED_IN_LOAD: &str = "a page finds a mark";

impl Setup {
    fn has(&self, mechanism: Mechanism) -> bool {
        !self.without.contains(&mechanism)
    }

    fn version(world: &World, key: usize, position: usize) -> usize {
        world.log[..position].iter().filter(|changed| **changed == key).count()
    }

    fn current(world: &World, key: usize) -> usize {
        Self::version(world, key, world.log.len())
    }

    fn answer(&self, key: usize, version: usize) -> Answer {
        self.histories[key][version]
    }

    fn mark(&self, world: &mut World, key: usize, version: usize) {
        let replica = &mut world.replica;
        let is_marking = match replica.stage {
            Stage::Waiting => false,
            Stage::Loading(_) => self.has(Mechanism::MarkDuringLoad),
            Stage::Loaded => true,
        };
        if is_marking {
            let before = match replica.slots[key] {
                Slot::Mark { minimum, .. } => minimum,
                Slot::Read { version: known } if self.has(Mechanism::NeverOlder) => known,
                _ => 0,
            };
            replica.ticks += 1;
            replica.slots[key] = Slot::Mark { tick: replica.ticks, minimum: before.max(version) };
            replica.pending[key] = true;
        }
    }

    fn returned(&self, replica: &mut Replica, read: Read, version: usize) {
        let is_absent = self.answer(read.key, version) == Answer::Unknown;
        let slot = &mut replica.slots[read.key];
        if read.is_page {
            let next = read.key + 1;
            replica.stage = if next < KEYS { Stage::Loading(next) } else { Stage::Loaded };
            let keeps = match slot {
                Slot::Mark { .. } => self.has(Mechanism::PageKeepsMark),
                Slot::Read { .. } => true,
                Slot::Empty => is_absent,
            };
            if !keeps {
                *slot = if is_absent { Slot::Empty } else { Slot::Read { version } };
            }
            return;
        }
        if let Slot::Mark { tick, minimum } = *slot
            && (self.has(Mechanism::ReadAfterMark) && tick > read.tick
                || self.has(Mechanism::VersionOfMark) && version < minimum)
        {
            replica.pending[read.key] = true;
            return;
        }
        *slot = Slot::Read { version };
    }

    fn look(&self, world: &World, request: Request) -> Option<(Answer, usize)> {
        let replica = &world.replica;
        match replica.slots[request.key] {
            Slot::Empty => Some((Answer::Unknown, 0)),
            Slot::Read { version } => Some((self.answer(request.key, version), version)),
            Slot::Mark { .. } => None,
        }
    }
}

impl Model for Setup {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let replica = Replica {
            position: 0,
            must_reset: false,
            stage: Stage::Waiting,
            epoch: 0,
            ticks: 0,
            slots: [Slot::Empty; KEYS],
            pending: [false; KEYS],
            read: None,
            unmarked: None,
        };
        let node = Node { events: Vec::new(), minimum: [0; KEYS], synced: None };
        let losses = self.losses;
        vec![World { log: Vec::new(), losses, replica, node, request: None, served: None }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let World { replica, node, .. } = world;
        if world.served.is_some() {
            return;
        }
        let changes =
            (0..KEYS).filter(|key| Self::current(world, *key) + 1 < self.histories[*key].len());
        actions.extend(changes.map(Action::Change));
        let has_more = replica.position < world.log.len();
        if replica.unmarked.is_some() {
            actions.push(Action::MarkLate);
        } else if replica.must_reset {
            actions.push(Action::Reset);
        } else if has_more {
            actions.push(Action::Receive);
            if world.losses > 0 {
                actions.push(Action::Lose);
            }
        } else {
            actions.push(Action::Sync);
        }
        if !node.events.is_empty() {
            actions.push(Action::Deliver);
        }
        // A read has a deadline, and a request too: both are shorter than the life of a minimum.
        if replica.read.is_none() && world.request.is_none() && node.events.is_empty() && !has_more
        {
            let known = (0..KEYS).filter(|key| node.minimum[*key] > 0);
            actions.extend(known.map(Action::Forget));
        }
        match replica.read {
            None => {
                if let Stage::Loading(_) = replica.stage {
                    actions.push(Action::SendPage);
                }
                if replica.stage != Stage::Waiting {
                    let pending = (0..KEYS).filter(|key| replica.pending[*key]);
                    actions.extend(pending.map(Action::SendRead));
                }
            }
            Some(Read { key, is_page, version: None, .. }) => {
                let current = Self::current(world, key);
                let oldest = if self.lags && !is_page { 0 } else { current };
                actions.extend((oldest..=current).map(Action::Execute));
            }
            Some(_) => actions.push(Action::Return),
        }
        match world.request {
            None => {
                let is_loaded =
                    replica.stage == Stage::Loaded || !self.has(Mechanism::OnlyWhenLoaded);
                if is_loaded && node.synced.is_some() {
                    actions.extend((0..KEYS).map(Action::Ask));
                }
            }
            Some(Request { found: None, .. }) => actions.push(Action::Look),
            Some(_) => actions.push(Action::Serve),
        }
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        match action {
            Action::Change(key) => world.log.push(key),
            Action::Receive => {
                let key = world.log[world.replica.position];
                world.replica.position += 1;
                let version = Self::version(&world, key, world.replica.position);
                if self.has(Mechanism::MarkBeforeForward) {
                    self.mark(&mut world, key, version);
                } else {
                    world.replica.unmarked = Some((key, version));
                }
                world.node.events.push(Event::Change(key, version));
            }
            Action::MarkLate => {
                let (key, version) = world.replica.unmarked.take()?;
                self.mark(&mut world, key, version);
            }
            Action::Lose => {
                world.losses -= 1;
                world.replica.position += 1;
                world.replica.must_reset = true;
            }
            Action::Reset => {
                let replica = &mut world.replica;
                replica.must_reset = false;
                if self.has(Mechanism::ReloadOnReset) {
                    replica.epoch += 1;
                    replica.stage = Stage::Waiting;
                    replica.slots = [Slot::Empty; KEYS];
                    replica.pending = [false; KEYS];
                    replica.read = None;
                }
                world.node.events.push(Event::Reset);
            }
            Action::Sync => {
                let position = world.replica.position;
                let versions = std::array::from_fn(|key| Self::version(&world, key, position));
                if world.replica.stage == Stage::Waiting {
                    world.replica.stage = Stage::Loading(0);
                }
                world.node.events.push(Event::Sync(versions));
            }
            Action::Deliver => match world.node.events.remove(0) {
                Event::Change(key, version) => world.node.minimum[key] = version,
                Event::Reset => world.node.minimum = [0; KEYS],
                Event::Sync(versions) => world.node.synced = Some(versions),
            },
            Action::Forget(key) => world.node.minimum[key] = 0,
            Action::SendPage => {
                let key = match world.replica.stage {
                    Stage::Loading(page) => page,
                    _ => 0,
                };
                let tick = world.replica.ticks;
                world.replica.read = Some(Read { key, is_page: true, tick, version: None });
            }
            Action::SendRead(key) => {
                world.replica.pending[key] = false;
                let tick = world.replica.ticks;
                world.replica.read = Some(Read { key, is_page: false, tick, version: None });
            }
            Action::Execute(version) => world.replica.read.as_mut()?.version = Some(version),
            Action::Return => {
                let read = world.replica.read.take()?;
                self.returned(&mut world.replica, read, read.version?);
            }
            Action::Ask(key) => {
                let needed = world.node.minimum[key].max(world.node.synced?[key]);
                let epoch = world.replica.epoch;
                world.request = Some(Request { key, needed, epoch, found: None });
            }
            Action::Look => {
                let mut request = world.request.take()?;
                request.found = self.look(&world, request);
                // Without an entry that may be served, the request goes on to the store.
                world.request = request.found.is_some().then_some(request);
            }
            Action::Serve => {
                let request = world.request.take()?;
                let (answer, version) = request.found?;
                if self.has(Mechanism::Epoch) && request.epoch != world.replica.epoch {
                    return Some(world);
                }
                if self.has(Mechanism::Minimum) && version < world.node.minimum[request.key] {
                    self.mark(&mut world, request.key, 0);
                    return Some(world);
                }
                world.served = Some(Served { request, answer });
            }
        }
        // What changes nothing, or reports the same once more, is no step.
        let is_bounded = world.replica.ticks <= 5 && world.node.events.len() <= 3;
        (world != *before && is_bounded).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(NOTHING_OLD, |setup: &Self, world: &World| {
                world.served.is_none_or(|Served { request, answer }| {
                    let current = Self::current(world, request.key);
                    (request.needed..=current).any(|at| setup.answer(request.key, at) == answer)
                })
            }),
            Property::sometimes(IS_SERVED, |_, world: &World| {
                world.served.is_some_and(|served| served.request.needed > 0)
            }),
            Property::sometimes(READ_TWICE, |_, world: &World| {
                let Some(read) = world.replica.read else { return false };
                let slot = world.replica.slots[read.key];
                !read.is_page && matches!(slot, Slot::Mark { tick, .. } if tick > read.tick)
            }),
            Property::sometimes(MARKED_IN_LOAD, |_, world: &World| {
                let Some(read) = world.replica.read else { return false };
                let slot = world.replica.slots[read.key];
                read.is_page && read.version.is_some() && matches!(slot, Slot::Mark { .. })
            }),
        ]
    }
}

use self::Answer::{Denied, Unknown, Valid};

fn setup(histories: [&'static [Answer]; KEYS]) -> Setup {
    Setup { histories, losses: 0, lags: false, without: Vec::new() }
}

/// Both keys change, one of them twice.
fn revoked() -> Setup {
    setup([&[Valid, Denied, Valid], &[Valid, Denied]])
}

/// A key is deleted, the other one issued.
fn issued() -> Setup {
    setup([&[Valid, Unknown], &[Unknown, Valid]])
}

fn losing(histories: [&'static [Answer]; KEYS]) -> Setup {
    Setup { losses: 1, ..setup(histories) }
}

fn lagging() -> Setup {
    Setup { lags: true, ..setup([&[Valid, Denied], &[Valid]]) }
}

fn holds(setup: Setup, at_least: usize) {
    let began = Instant::now();
    let checker = setup.checker().threads(2).spawn_dfs().join();
    let states = checker.unique_state_count();
    println!("{states} states in {:?}", began.elapsed());
    if let Some(path) = checker.discovery(NOTHING_OLD) {
        panic!("{:#?}", path.into_actions());
    }
    assert!(checker.discovery(IS_SERVED).is_some());
    assert!(states >= at_least, "only {states} states");
}

fn breaks(setup: Setup, without: &[Mechanism]) {
    let setup = Setup { without: without.to_vec(), ..setup };
    let checker = setup.checker().threads(2).spawn_bfs().join();
    let path = checker.discovery(NOTHING_OLD);
    let path = path.unwrap_or_else(|| panic!("nothing is wrong without {without:?}"));
    println!("Without {without:?}, after {:?}", path.into_actions());
}

#[test]
fn a_replica_serves_nothing_old() {
    let checker = revoked().checker().threads(2).spawn_dfs().join();
    assert!([READ_TWICE, MARKED_IN_LOAD].iter().all(|it| checker.discovery(it).is_some()));
    holds(revoked(), 100_000);
    holds(issued(), 10_000);
}

#[test]
fn a_replica_serves_nothing_old_after_a_lost_change() {
    holds(losing([&[Valid, Denied], &[Valid, Denied]]), 10_000);
    holds(losing([&[Valid, Unknown], &[Unknown, Valid]]), 10_000);
}

#[test]
fn a_replica_serves_nothing_old_over_a_standby_that_lags_behind() {
    holds(lagging(), 1_000);
}

#[test]
fn without_marks_during_the_load_a_page_is_served_after_a_change() {
    breaks(revoked(), &[Mechanism::MarkDuringLoad]);
}

#[test]
fn a_page_that_replaces_a_mark_is_served_after_the_change() {
    breaks(revoked(), &[Mechanism::PageKeepsMark]);
}

#[test]
fn a_read_from_before_a_mark_that_clears_it_is_served_after_the_change() {
    // The version finds it too.
    breaks(revoked(), &[Mechanism::ReadAfterMark, Mechanism::VersionOfMark]);
    holds(Setup { without: vec![Mechanism::ReadAfterMark], ..revoked() }, 1);
}

#[test]
fn a_read_of_a_standby_that_clears_a_mark_is_served_after_the_change() {
    breaks(lagging(), &[Mechanism::VersionOfMark]);
}

#[test]
fn a_mark_that_forgets_what_it_replaces_lets_a_standby_bring_it_back() {
    breaks(lagging(), &[Mechanism::NeverOlder]);
}

#[test]
fn without_the_epoch_a_key_is_unknown_while_it_is_loaded_again() {
    breaks(losing([&[Valid, Denied], &[Valid, Denied]]), &[Mechanism::Epoch]);
}

#[test]
fn without_a_reload_a_lost_change_stays_lost() {
    breaks(losing([&[Valid, Denied], &[Valid]]), &[Mechanism::ReloadOnReset]);
}

#[test]
fn a_change_that_is_passed_on_before_its_mark_needs_the_minimum() {
    let late = Mechanism::MarkBeforeForward;
    breaks(revoked(), &[late, Mechanism::Minimum]);
    holds(Setup { without: vec![late], ..setup([&[Valid, Denied], &[Valid]]) }, 1);
}

#[test]
fn before_all_keys_are_loaded_a_key_is_unknown() {
    breaks(revoked(), &[Mechanism::OnlyWhenLoaded]);
}
