//! All parts together, and the steps that the checker takes them through.

use stateright::{Model, Property};

use crate::database::{Answer, Change, Database, KEYS, RowTime, Subject, Tick};
use crate::look_up::{Lane, LookUp, LookUpStep};
use crate::node::{Moment, Node};
use crate::properties;
use crate::redis::{Entry, Redis};
use crate::secrets::Edit;
use crate::setup::{Break, Detail, Mechanism, Setup, Writers};
use crate::writes::bit;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct World {
    pub(crate) now: Tick,
    pub(crate) database: Database,
    /// A copy of the database that has parted from it. Its nodes are not modelled, only what they
    /// may write to Redis.
    pub(crate) clone: Option<Database>,
    pub(crate) redis: Redis,
    pub(crate) nodes: [Node; 2],
    /// For each key, the versions of the truth that the nodes have sent to Redis, as bits.
    pub(crate) sent: [u16; KEYS],
    /// How many faults there have been.
    pub(crate) faults: u8,
    /// Whether the break of this run has been.
    is_broken: bool,
}

/// One step of one part. Parts are independent: any order of steps is explored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Action {
    Tick,
    Commit(Subject),
    /// Changes the row of the key that is rotated.
    Edit(Edit),
    /// Draws a revision that commits later.
    Begin(Subject),
    CommitBegun,
    DropTriggers,
    RestoreTriggers,
    /// To a copy that has the first commits.
    FailOver {
        kept: u8,
    },
    MakeClone,
    CommitInClone(Subject),
    /// A request that the local cache does not answer.
    Ask {
        node: usize,
        key: usize,
    },
    LookUp {
        node: usize,
        key: usize,
        lane: Lane,
        step: LookUpStep,
    },
    /// One message of the feed: the minimum revision goes up.
    Notice {
        node: usize,
        change: Change,
    },
    /// The rest of that: the generation moves.
    FinishChange {
        node: usize,
    },
    /// The change table is read. A node that is cut off from the database just does not.
    Poll {
        node: usize,
    },
    FillRedis {
        key: usize,
        answer: Answer,
    },
    BuryInRedis {
        key: usize,
        change: Change,
    },
    WipeRedis,
    /// Redis restarts from a snapshot, or fails over to a replica that lags: to those who read it
    /// the same. The state it returns to is any that some order of writes can have led to.
    RewindRedis {
        earlier: [Entry; KEYS],
    },
    Crash {
        node: usize,
    },
    /// The clock of a node is corrected, or goes wrong.
    SetClock {
        node: usize,
        ahead: Tick,
    },
}

impl Setup {
    pub(crate) fn moment<'a>(&'a self, world: &World) -> Moment<'a> {
        Moment { setup: self, now: world.now }
    }

    fn row_time(&self) -> RowTime {
        if self.has(Mechanism::RowTimeOfCommit) { RowTime::Commit } else { RowTime::Begin }
    }

    fn database_actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.database.locked().is_some() {
            actions.push(Action::CommitBegun);
        }
        if let Some(clone) = world.clone
            && clone.begun < self.changes
        {
            actions.push(Action::CommitInClone(Subject::Key(0)));
        }
        if world.database.begun == self.changes {
            return;
        }
        if let Some(rotation) = self.rotation {
            let edits = rotation.edits(world.database.row(), world.now);
            return actions.extend(edits.map(Action::Edit));
        }
        let keys = self.keys.clone().map(|key| Subject::Key(key as u8));
        let locked = world.database.locked();
        for subject in keys.chain(self.owner_changes.then_some(Subject::Owner)) {
            if locked != Some(subject) {
                actions.push(Action::Commit(subject));
            }
            if self.late_commits && locked.is_none() && !world.database.lacks_triggers {
                actions.push(Action::Begin(subject));
            }
        }
    }

    /// What can happen to the database as a whole.
    fn break_actions(&self, world: &World, actions: &mut Vec<Action>) {
        let database = &world.database;
        let nodes = &world.nodes[..self.nodes];
        let is_seen = nodes.iter().all(|node| node.saw_triggers_missing);
        if database.lacks_triggers && (is_seen || self.breaks_unseen) {
            actions.push(Action::RestoreTriggers);
        }
        if world.is_broken {
            return;
        }
        match self.breaks {
            // The statement that drops them waits for open transactions.
            Some(Break::TriggersMissing) if database.locked().is_none() => {
                actions.push(Action::DropTriggers);
            }
            Some(Break::CommitsLost) => {
                let kept = 0..database.changes().count() as u8;
                let is_read = |change| nodes.iter().all(|node| node.rows_read.has_identity(change));
                let are_read = |kept: &u8| self.breaks_unseen || database.after(*kept).all(is_read);
                actions.extend(kept.filter(are_read).map(|kept| Action::FailOver { kept }));
            }
            Some(Break::Clone) => actions.push(Action::MakeClone),
            Some(Break::TriggersMissing) | None => {}
        }
    }

    fn redis_actions(&self, world: &World, actions: &mut Vec<Action>) {
        for key in self.keys.clone() {
            let fills = self.fills(world, key).into_iter();
            let fills = fills.filter(|fill| !world.redis.rejects(key, *fill, self.script()));
            actions.extend(fills.map(|answer| Action::FillRedis { key, answer }));
            let burials = self.burials(world).filter(|change| change.subject.touches(key));
            actions.extend(burials.map(|change| Action::BuryInRedis { key, change }));
        }
    }

    fn fault_actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.faults == self.faults {
            return;
        }
        actions.push(Action::WipeRedis);
        actions.extend((0..self.nodes).map(|node| Action::Crash { node }));
        let first = self.entries(self.keys.start);
        for entry in self.earlier_entries(world, first.start) {
            let mut earlier = [Entry::Empty; KEYS];
            earlier[first.clone()].fill(entry);
            if first.end == self.keys.end {
                actions.push(Action::RewindRedis { earlier });
                continue;
            }
            for second in self.earlier_entries(world, first.end) {
                earlier[first.end] = second;
                actions.push(Action::RewindRedis { earlier });
            }
        }
    }

    fn node_actions(&self, world: &World, index: usize, actions: &mut Vec<Action>) {
        let node = &world.nodes[index];
        if node.half_processed().is_some() {
            actions.push(Action::FinishChange { node: index });
        } else {
            // A reset comes before the changes that were read with it.
            let is_due = node.has_to_reset(&world.database, self.moment(world));
            let changes =
                world.database.rows().filter(|change| !is_due && !node.has_processed(*change));
            actions.extend(changes.map(|change| Action::Notice { node: index, change }));
            actions.push(Action::Poll { node: index });
        }
        for key in self.keys.clone() {
            let moment = self.moment(world);
            let joins = node.joins(key, moment);
            let is_issued = self.secret(key) <= usize::from(world.database.row().current);
            let has_room = joins || node.left[key].is_none();
            if is_issued && has_room && node.hit(key, moment).is_none() {
                actions.push(Action::Ask { node: index, key });
            }
            for lane in [Lane::Joinable, Lane::Left] {
                let steps =
                    node.look_up(key, lane).map_or(&[][..], |look_up| look_up.stage.steps());
                let act = |&step| Action::LookUp { node: index, key, lane, step };
                actions.extend(steps.iter().map(act));
            }
        }
    }

    /// A clock is not set between the check of an answer and its delivery.
    fn clock_actions(&self, world: &World, actions: &mut Vec<Action>) {
        let are_set = self.rotation.is_some_and(|rotation| rotation.are_clocks_set);
        for node in 0..if are_set { self.nodes } else { 0 } {
            let Node { ahead: old, look_ups, left, .. } = &world.nodes[node];
            let is_checked = look_ups.iter().chain(left).flatten().any(LookUp::is_checked);
            let clocks = (0..=2 * self.skew()).filter(|ahead| !is_checked && ahead != old);
            actions.extend(clocks.map(|ahead| Action::SetClock { node, ahead }));
        }
    }

    /// Time stands still between the check of an answer and its delivery, and does not pass the
    /// time-out of a look-up.
    fn can_tick(&self, world: &World) -> bool {
        let look_ups = world.nodes.iter().flat_map(|node| node.look_ups.iter().chain(&node.left));
        let waits = |look_up: &LookUp| {
            !look_up.is_checked() && world.now - look_up.began < self.ages.look_up_timeout
        };
        world.now < self.ticks && look_ups.flatten().all(waits)
    }

    fn apply(&self, world: &mut World, action: Action) {
        let moment = self.moment(world);
        let World { database, redis, nodes, faults, is_broken, .. } = world;
        match action {
            Action::Tick => {
                world.now += 1;
                let later = Moment { now: world.now, ..moment };
                nodes.iter_mut().for_each(|node| node.evict_old_minimums(database, later));
            }
            Action::Commit(subject) => database.commit(subject, Edit::Other, moment.now),
            Action::Edit(edit) => {
                if let Some(rotation) = self.rotation {
                    let are_both_reported = self.has(Mechanism::BothIdsReported);
                    let subject = rotation.subject(database.row(), edit, are_both_reported);
                    database.commit(subject, edit, moment.now);
                }
            }
            Action::Begin(subject) => database.begin(subject, moment.now),
            Action::CommitBegun => database.commit_begun(moment.now, self.row_time()),
            Action::DropTriggers => {
                database.lacks_triggers = true;
                *is_broken = true;
            }
            Action::RestoreTriggers => database.restore_triggers(),
            Action::FailOver { kept } => {
                database.fail_over(kept, moment.now);
                *is_broken = true;
            }
            Action::MakeClone => {
                world.clone = Some(database.make_clone(moment.now));
                *is_broken = true;
            }
            Action::CommitInClone(subject) => {
                if let Some(clone) = &mut world.clone {
                    clone.commit(subject, Edit::Other, moment.now);
                }
            }
            Action::Ask { node, key } => nodes[node].request(key, moment),
            Action::LookUp { node, key, lane, step } => {
                let fill = nodes[node].step((key, lane), step, (database, redis), moment);
                if let (Some(fill), Writers::Nodes) = (fill, self.writers) {
                    world.sent[key] |= bit(fill.content);
                }
            }
            Action::Notice { node, change } => {
                nodes[node].begin_change(change, moment);
                if self.detail == Detail::Coarse {
                    nodes[node].finish_change(moment);
                }
            }
            Action::FinishChange { node } => nodes[node].finish_change(moment),
            Action::Poll { node } => nodes[node].poll(database, moment),
            Action::FillRedis { key, answer } => {
                self.entries(key).for_each(|entry| redis.fill(entry, answer, self.script()));
            }
            Action::BuryInRedis { key, change } => {
                self.entries(key).for_each(|entry| self.bury(redis, entry, change));
            }
            Action::WipeRedis => {
                redis.become_again([Entry::Empty; KEYS]);
                *faults += 1;
            }
            Action::RewindRedis { earlier } => {
                redis.become_again(earlier);
                *faults += 1;
            }
            Action::Crash { node } => {
                nodes[node].crash(database, moment);
                *faults += 1;
            }
            Action::SetClock { node, ahead } => nodes[node].ahead = ahead,
        }
    }
}

impl Model for Setup {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let world = |nodes| World {
            now: 0,
            database: Database::default(),
            clone: None,
            redis: Redis::default(),
            nodes,
            sent: [0; KEYS],
            faults: 0,
            is_broken: false,
        };
        let clocks = 0..=2 * self.skew();
        let nodes = clocks.clone().map(|ahead| [Node::new(ahead), Node::new(clocks.end() - ahead)]);
        nodes.map(world).collect()
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if self.can_tick(world) {
            actions.push(Action::Tick);
        }
        self.database_actions(world, actions);
        self.break_actions(world, actions);
        (0..self.nodes).for_each(|node| self.node_actions(world, node, actions));
        self.clock_actions(world, actions);
        self.redis_actions(world, actions);
        self.fault_actions(world, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        self.apply(&mut next, action);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all(self)
    }
}
