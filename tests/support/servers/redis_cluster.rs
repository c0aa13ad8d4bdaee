//! A Redis cluster.

use std::collections::BTreeMap;

use super::{process::wait_for, redis::Redis};

const SLOTS: u16 = 16384;
const MASTERS: usize = 3;

/// Three masters, each with a third of the slots, and a replica of each. A replica takes over two to three
/// seconds after its master has gone.
pub struct RedisCluster {
    nodes: Vec<Redis>,
}

/// Slots from the first to the last, and the port of the master that serves them.
type Range = (u16, u16, u16);

impl RedisCluster {
    pub fn start() -> Self {
        Self::with_settings(&[])
    }

    /// A cluster whose nodes have these settings, too.
    pub fn with_settings(settings: &[&str]) -> Self {
        let mut all = vec![
            "cluster-enabled=yes",
            "cluster-node-timeout=1000",
            // A replica takes over however old its data may be, and gets them from its master at once.
            "cluster-replica-validity-factor=0",
            "repl-diskless-sync-delay=0",
        ];
        all.extend(settings);
        let nodes: Vec<_> = (0..2 * MASTERS).map(|_| Redis::with_settings(&all)).collect();
        let cluster = Self { nodes };
        cluster.introduce();
        cluster.wait_until_ok();
        cluster
    }

    fn introduce(&self) {
        let (masters, replicas) = self.nodes.split_at(MASTERS);
        let first_slots = (0..=MASTERS).map(|index| index * usize::from(SLOTS) / MASTERS);
        let first_slots: Vec<_> = first_slots.collect();
        for (index, master) in masters.iter().enumerate() {
            // Distinct from the start: two masters of one epoch would first have to settle who is newer.
            ok(master, &["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()]);
            let [first, last] = [first_slots[index], first_slots[index + 1] - 1];
            ok(master, &["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]);
        }
        // Everybody to everybody: rumours would take seconds.
        for (index, node) in self.nodes.iter().enumerate() {
            for other in &self.nodes[index + 1..] {
                let [port, bus] = [other.port(), other.bus_port()].map(|port| port.to_string());
                ok(node, &["CLUSTER", "MEET", "127.0.0.1", &port, &bus]);
            }
        }
        for (master, replica) in masters.iter().zip(replicas) {
            let id = master.command(&["CLUSTER", "MYID"]);
            wait_for("a replica to know its master", || {
                replica.command(&["CLUSTER", "REPLICATE", &id]) == "OK"
            });
        }
    }

    /// Of every node, also of those that are down.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Redis::url).collect()
    }

    /// Waits until all the nodes that run agree about who serves which slot, each slot has a master that runs,
    /// and their replicas follow them. Also after a node has been killed, frozen or started again.
    pub fn wait_until_ok(&self) {
        wait_for("the cluster to be whole", || self.is_ok());
    }

    fn is_ok(&self) -> bool {
        let views: Option<Vec<_>> = self.running().map(view).collect();
        let Some((first, others)) = views.as_deref().and_then(<[_]>::split_first) else {
            return false;
        };
        let count: u16 = first.iter().map(|(first, last, _)| last - first + 1).sum();
        let serves = |port| self.running().any(|node| node.port() == port);
        count == SLOTS
            && first.iter().all(|&(.., port)| serves(port))
            && others.iter().all(|other| other == first)
    }

    /// The master that serves a key, as the nodes that run have agreed last.
    pub fn master_of(&self, key: &str) -> &Redis {
        &self.nodes[self.index_of_master(key)]
    }

    fn index_of_master(&self, key: &str) -> usize {
        let slot = self.slot_of(key);
        let port = self.running().find_map(|node| {
            let ranges = view(node)?.into_iter();
            let mut of_slot = ranges.filter(|(first, last, _)| (*first..=*last).contains(&slot));
            of_slot.next().map(|(.., port)| port)
        });
        let index = self.nodes.iter().position(|node| Some(node.port()) == port);
        index.expect("a cluster that is whole: wait_until_ok()")
    }

    pub fn slot_of(&self, key: &str) -> u16 {
        self.anyone().command(&["CLUSTER", "KEYSLOT", key]).parse().unwrap()
    }

    /// The answer of the master that serves the key to one command.
    pub fn command(&self, key: &str, words: &[&str]) -> String {
        self.master_of(key).command(words)
    }

    /// Kills the master that serves a key, and returns its port. `wait_until_ok` waits for its replica
    /// to take over.
    pub fn kill_master_of(&mut self, key: &str) -> u16 {
        let index = self.index_of_master(key);
        self.nodes[index].kill();
        self.nodes[index].port()
    }

    /// Starts what has been killed, on the same ports. A master of before comes back as its successor's replica.
    pub fn start_killed_again(&mut self) {
        for node in self.nodes.iter_mut().filter(|node| !node.is_running()) {
            node.start_again();
        }
    }

    /// How often the nodes that run have executed each command, together.
    pub fn command_counts(&self) -> BTreeMap<String, u64> {
        sum_of_counts(self.running())
    }

    /// Of every node, also of those that are down.
    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    fn running(&self) -> impl Iterator<Item = &Redis> {
        self.nodes.iter().filter(|node| node.answers())
    }

    fn anyone(&self) -> &Redis {
        self.running().next().expect("a node that runs")
    }
}

pub(super) fn sum_of_counts<'a>(nodes: impl Iterator<Item = &'a Redis>) -> BTreeMap<String, u64> {
    let mut sum = BTreeMap::new();
    for (name, count) in nodes.flat_map(Redis::command_counts) {
        *sum.entry(name).or_default() += count;
    }
    sum
}

fn ok(node: &Redis, words: &[&str]) {
    assert_eq!(node.command(words), "OK", "{words:?}");
}

/// Who serves what, as one node sees it, in the order of the slots; nothing if the node is not content.
fn view(node: &Redis) -> Option<Vec<Range>> {
    if !node.try_command(&["CLUSTER", "INFO"]).ok()?.contains("cluster_state:ok") {
        return None;
    }
    let replication = node.try_command(&["INFO", "replication"]).ok()?;
    if replication.contains("master_link_status:down") {
        return None;
    }
    let mut ranges = Vec::new();
    for line in node.try_command(&["CLUSTER", "NODES"]).ok()?.lines() {
        // id, address:port@bus, flags, master, ping, pong, epoch, link, and then the slots.
        let fields: Vec<_> = line.split_whitespace().collect();
        if fields.get(2)?.contains("handshake") {
            return None;
        }
        let port = fields.get(1)?.split('@').next()?.rsplit(':').next()?.parse().ok()?;
        for slots in fields.get(8..)? {
            let (first, last) = slots.split_once('-').unwrap_or((slots, slots));
            ranges.push((first.parse().ok()?, last.parse().ok()?, port));
        }
    }
    ranges.sort_unstable();
    Some(ranges)
}
