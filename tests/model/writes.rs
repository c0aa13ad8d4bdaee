//! What may be written to Redis in a state, and what an earlier state of it may have been.

use crate::database::{Answer, Change, Database, Revisions};
use crate::protocol::World;
use crate::redis::{Entry, Redis, Script};
use crate::setup::{Mechanism, Setup, Writers};

impl Setup {
    /// The answers that may be filled into Redis from now on. A write can be late, come twice or
    /// never, so that once sent it is possible forever.
    pub(crate) fn fills(&self, world: &World, key: usize) -> Vec<Answer> {
        let fills = world.database.history(key, world.now).into_iter();
        let mut fills: Vec<_> = fills.flat_map(|answer| self.entries_of(key, answer)).collect();
        if self.writers == Writers::Nodes {
            fills.retain(|fill| world.sent[key] & bit(fill.content) != 0);
        }
        let of_clone = self.clone_that_shares_names(world);
        fills.extend(of_clone.into_iter().flat_map(|clone| clone.history(key, world.now)));
        fills
    }

    /// The changes whose tombstones may reach Redis from now on.
    pub(crate) fn burials<'a>(&'a self, world: &'a World) -> impl Iterator<Item = Change> + 'a {
        let sent = |change: &Change| {
            self.writers == Writers::Fleet
                || world.nodes.iter().any(|node| node.ever_processed.has_identity(*change))
        };
        let of_clone = self.clone_that_shares_names(world);
        let of_clone = of_clone.into_iter().flat_map(Database::rows);
        world.database.rows_ever().filter(sent).chain(of_clone)
    }

    /// Under names of its own, what the nodes of a clone write is never found.
    fn clone_that_shares_names<'a>(&self, world: &'a World) -> Option<&'a Database> {
        world.clone.as_ref().filter(|_| !self.has(Mechanism::BoundToDatabase))
    }

    pub(crate) fn rejects_a_fill(&self, world: &World, key: usize) -> bool {
        let denied = |fill| world.redis.rejects(key, fill, self.script());
        self.fills(world, key).into_iter().any(denied)
    }

    /// Only a reset looks at the time of a tombstone. Without one it would cost the checker states.
    pub(crate) fn bury(&self, redis: &mut Redis, key: usize, change: Change) {
        let at = if self.breaks.is_none() { 0 } else { change.at };
        redis.bury(key, Change { at, ..change }, self.script());
    }

    pub(crate) fn earlier_entries(&self, world: &World, key: usize) -> Vec<Entry> {
        let mut redis = Redis::default();
        let mut entries = vec![Entry::Empty];
        for change in self.burials(world).filter(|change| change.subject.touches(key)) {
            self.bury(&mut redis, key, change);
            entries.push(redis.entries[key]);
        }
        entries.extend(self.fills(world, key).into_iter().map(Entry::Data));
        entries
    }

    pub(crate) fn script(&self) -> Script {
        if !self.has(Mechanism::RevisionCompare) {
            Script::Overwrites
        } else if !self.has(Mechanism::RevisionPerSubject) {
            Script::ComparesHighest
        } else {
            Script::Compares
        }
    }
}

/// Each identity is below 4: a clone's answers are not among those that the nodes send.
pub(crate) fn bit(content: Revisions) -> u16 {
    1 << (4 * content.key + content.owner)
}
