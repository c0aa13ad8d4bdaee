//! Redis with sentinels that put a replica in the place of a lost master.

use std::collections::BTreeMap;

use super::{process::wait_for, redis::Redis, redis_cluster::sum_of_counts};

const MASTER: &str = "the-master";

/// A master, two replicas, and three sentinels of which two must agree that the master has gone. They do
/// after half a second, and the failover takes one to three more.
pub struct RedisSentinel {
    nodes: Vec<Redis>,
    sentinels: Vec<Redis>,
    /// The port of the master that was killed or frozen last.
    lost: Option<u16>,
}

impl RedisSentinel {
    pub fn start() -> Self {
        // Replicas get their data at once.
        let at_once = "repl-diskless-sync-delay=0";
        let master = Redis::with_settings(&[at_once]);
        let replica_of = format!("replicaof=127.0.0.1 {}", master.port());
        let replica = || Redis::with_settings(&[at_once, &replica_of]);
        let nodes = vec![replica(), replica(), master];
        wait_for("the replicas to follow the master", || {
            nodes[..2].iter().all(|replica| follows(replica, nodes[2].port()))
        });
        let sentinels = (0..3).map(|_| sentinel(nodes[2].port())).collect();
        let servers = Self { nodes, sentinels, lost: None };
        wait_for("the sentinels to know each other and the replicas", || {
            servers.sentinels.iter().all(knows_everybody)
        });
        servers
    }

    pub fn master_name(&self) -> &'static str {
        MASTER
    }

    /// Of the sentinels, whom a client asks for the master.
    pub fn sentinel_urls(&self) -> Vec<String> {
        self.sentinels.iter().map(Redis::url).collect()
    }

    /// The master, as most sentinels see it.
    pub fn master(&self) -> &Redis {
        &self.nodes[self.index_of_master()]
    }

    fn index_of_master(&self) -> usize {
        let ports: Vec<_> = self.sentinels.iter().filter_map(master_port).collect();
        let votes = |port: u16| ports.iter().filter(|&&other| other == port).count();
        let index = self.nodes.iter().position(|node| votes(node.port()) >= 2);
        index.expect("a master that two sentinels agree on: wait_for_new_master()")
    }

    /// The answer of the current master to one command.
    pub fn command(&self, words: &[&str]) -> String {
        self.master().command(words)
    }

    /// Kills the master and returns its port.
    pub fn kill_master(&mut self) -> u16 {
        let index = self.index_of_master();
        self.nodes[index].kill();
        *self.lost.insert(self.nodes[index].port())
    }

    /// Stops the master in its tracks and returns its port. Once thawed, it takes itself for the master
    /// until the sentinels replace it.
    pub fn freeze_master(&mut self) -> u16 {
        let index = self.index_of_master();
        self.nodes[index].freeze();
        *self.lost.insert(self.nodes[index].port())
    }

    /// Waits until all sentinels name another master than the one that was lost, and the remaining replica
    /// follows it.
    pub fn wait_for_new_master(&self) {
        wait_for("a new master", || {
            let ports: Vec<_> = self.sentinels.iter().map(master_port).collect();
            let Some(new) = ports[0] else { return false };
            self.lost != Some(new)
                && ports.iter().all(|&port| port == Some(new))
                && self.running().all(|node| node.port() == new || follows(node, new))
                && self.running().any(|node| node.port() == new && role(node) == "master")
        });
    }

    /// The node that was the master before it was killed or frozen.
    pub fn lost_master(&self) -> &Redis {
        let lost = self.nodes.iter().find(|node| Some(node.port()) == self.lost);
        lost.expect("a master that was killed or frozen")
    }

    /// Starts or thaws what has been killed or frozen. `wait_for_new_master` waits until it follows its
    /// successor.
    pub fn bring_back_lost_master(&mut self) {
        for node in &mut self.nodes {
            if node.is_running() {
                node.thaw();
            } else {
                node.start_again();
            }
        }
    }

    /// How often the nodes that run have executed each command, together; without the sentinels.
    pub fn command_counts(&self) -> BTreeMap<String, u64> {
        sum_of_counts(self.running())
    }

    /// Master and replicas, also those that are down.
    pub fn nodes(&self) -> &[Redis] {
        &self.nodes
    }

    pub fn sentinels(&self) -> &[Redis] {
        &self.sentinels
    }

    fn running(&self) -> impl Iterator<Item = &Redis> {
        self.nodes.iter().filter(|node| node.answers())
    }
}

fn sentinel(master: u16) -> Redis {
    let sentinel = Redis::with_settings(&[
        &format!("sentinel=monitor {MASTER} 127.0.0.1 {master} 2"),
        &format!("sentinel=down-after-milliseconds {MASTER} 500"),
        &format!("sentinel=failover-timeout {MASTER} 3000"),
        &format!("sentinel=parallel-syncs {MASTER} 2"),
    ]);
    // Sentinels ask no oftener than a master may be silent, so that they take a new one for lost before they
    // have asked it anything: twice as often, therefore. The others shorten what they wait for otherwise, and
    // a busy machine ("tilt") is no reason to rest for half a minute.
    let periods = [
        ["info-period", "500"],
        ["ping-period", "250"],
        ["publish-period", "200"],
        ["ask-period", "200"],
        ["tilt-trigger", "30000"],
        ["tilt-period", "1000"],
    ];
    let words: Vec<_> =
        ["SENTINEL", "DEBUG"].into_iter().chain(periods.into_iter().flatten()).collect();
    assert_eq!(sentinel.command(&words), "OK");
    sentinel
}

fn knows_everybody(sentinel: &Redis) -> bool {
    let Ok(answer) = sentinel.try_command(&["SENTINEL", "MASTER", MASTER]) else { return false };
    let fields: Vec<_> = answer.lines().collect();
    let counts = |name: &str, count: &str| fields.chunks(2).any(|field| field == [name, count]);
    counts("num-slaves", "2") && counts("num-other-sentinels", "2") && counts("flags", "master")
}

fn master_port(sentinel: &Redis) -> Option<u16> {
    let answer = sentinel.try_command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER]).ok()?;
    answer.lines().nth(1)?.parse().ok()
}

fn role(node: &Redis) -> String {
    let answer = node.try_command(&["ROLE"]).unwrap_or_default();
    answer.lines().next().unwrap_or_default().to_owned()
}

fn follows(node: &Redis, master: u16) -> bool {
    let answer = node.try_command(&["INFO", "replication"]).unwrap_or_default();
    answer.contains(&format!("master_port:{master}\r\n"))
        && answer.contains("master_link_status:up")
}
