//! How many failed slow checks the machine does for strangers.
//!
//! The decision apart from the plumbing: [`Ration`] knows nothing of tasks, semaphores or bcrypt.

use std::{
    collections::HashMap,
    hash::Hash,
    net::{IpAddr, Ipv6Addr},
    time::Duration,
};

/// Failures count for this long after the last one.
const MEMORY: Duration = Duration::from_secs(60);
/// So many failures are free; after them there is one check a [`PACE`].
const FREE_FAILURES: u32 = 5;
const PACE: Duration = Duration::from_secs(1);
/// The part of the pool's time that goes to suspects, all together.
const SUSPECT_SHARE: f64 = 0.25;
/// How much of that share can be saved up, in seconds of the pool's time.
const SAVED_SECONDS: f64 = 1.0;
/// How far a source without failures may overdraw it, so that the owner of an attacked key gets a
/// check when the attackers have used the share up. The debt is paid back before anybody else's turn.
const OVERDRAFT_SECONDS: f64 = 2.0;
/// The most entries in each table; beyond, the one whose failures are longest ago goes.
const MAX_ENTRIES: usize = 4096;

/// Who asks: a v4 address, or a v6 network of 64 bits, because one host has all of it. All callers
/// whose address is not known are one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Source(Option<IpAddr>);

impl Source {
    pub(super) fn new(address: Option<IpAddr>) -> Self {
        Self(address.map(|address| match address.to_canonical() {
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
            v4 => v4,
        }))
    }
}

/// How a check that is admitted stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing speaks against it, or it may be the owner's of a key under attack.
    Clean,
    /// It comes from where failures came from: it gets no place in a queue.
    Suspect,
}

/// The ration of failed checks: by lookup prefix and source, and for all suspects together.
///
/// A check is a suspect's if its prefix has failed in the last minute, whoever asked, or its source
/// has failed five times, whatever it asked for.
#[derive(Debug)]
pub(super) struct Ration {
    pairs: Table<(Box<str>, Source)>,
    prefixes: Table<Box<str>>,
    sources: Table<Source>,
    /// Seconds of the pool's time that suspects may still use; below zero is debt.
    share: f64,
    /// Seconds of the pool's time that suspects get for every second that passes.
    refill: f64,
    refilled_at: Duration,
}

impl Ration {
    /// For a pool that runs `slots` checks at once.
    pub(super) fn new(slots: usize) -> Self {
        let refill = SUSPECT_SHARE * slots as f64;
        Self {
            pairs: Table::default(),
            prefixes: Table::default(),
            sources: Table::default(),
            share: refill * SAVED_SECONDS,
            refill,
            refilled_at: Duration::ZERO,
        }
    }

    /// Whether a check may run now, or how long to wait before asking again.
    pub(super) fn admit(
        &mut self,
        prefix: &str,
        source: Source,
        now: Duration,
    ) -> Result<Standing, Duration> {
        self.refill(now);
        let pair = self.pairs.get(&(prefix.into(), source), now);
        let is_known_source = self.is_known(source, now);
        if self.prefixes.get(prefix, now).is_none() && !is_known_source {
            return Ok(Standing::Clean);
        }
        if let Some(pair) = pair.filter(|pair| pair.failures >= FREE_FAILURES) {
            let next = pair.last + PACE;
            if now < next {
                return Err(next - now);
            }
        }
        let is_clean = pair.is_none() && !is_known_source;
        let floor = if is_clean { self.overdraft() } else { 0.0 };
        if self.share <= floor {
            return Err(Duration::from_secs_f64((floor - self.share) / self.refill));
        }
        Ok(if is_clean { Standing::Clean } else { Standing::Suspect })
    }

    /// Notes that a check ran for `took` and whether it `failed`.
    pub(super) fn note(
        &mut self,
        prefix: &str,
        source: Source,
        now: Duration,
        took: Duration,
        failed: bool,
    ) {
        self.refill(now);
        let took = took.as_secs_f64();
        if self.prefixes.get(prefix, now).is_some() || self.is_known(source, now) {
            self.share -= took;
        } else if failed {
            // First failures are paid for as well, or an attack on many prefixes were free. But they
            // were not asked whether there is anything left, so they may not drive up the debt that
            // owners then wait for.
            self.share = (self.share - took).max(self.overdraft().min(self.share));
        }
        if failed {
            self.pairs.count((prefix.into(), source), now);
            self.prefixes.count(prefix.into(), now);
            self.sources.count(source, now);
        }
    }

    /// Whether the source has failed so often that all it asks for is suspect.
    fn is_known(&self, source: Source, now: Duration) -> bool {
        self.sources.get(&source, now).is_some_and(|source| source.failures >= FREE_FAILURES)
    }

    /// The debt beyond which a clean source waits as well.
    fn overdraft(&self) -> f64 {
        -OVERDRAFT_SECONDS * self.refill
    }

    fn refill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.refilled_at);
        self.refilled_at = self.refilled_at.max(now);
        self.share =
            (self.share + self.refill * passed.as_secs_f64()).min(self.refill * SAVED_SECONDS);
    }
}

#[derive(Debug, Clone, Copy)]
struct Failures {
    failures: u32,
    last: Duration,
}

impl Failures {
    fn is_forgotten(&self, now: Duration) -> bool {
        now.saturating_sub(self.last) > MEMORY
    }
}

/// Failures by key, bounded in number and forgotten with time.
#[derive(Debug)]
struct Table<K>(HashMap<K, Failures>);

impl<K> Default for Table<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Hash + Eq + Clone> Table<K> {
    fn get<Q>(&self, key: &Q, now: Duration) -> Option<Failures>
    where
        K: std::borrow::Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.0.get(key).copied().filter(|failures| !failures.is_forgotten(now))
    }

    fn count(&mut self, key: K, now: Duration) {
        if self.0.len() >= MAX_ENTRIES && !self.0.contains_key(&key) {
            self.0.retain(|_, failures| !failures.is_forgotten(now));
            if self.0.len() >= MAX_ENTRIES {
                let oldest = self.0.iter().min_by_key(|(_, f)| f.last).map(|(key, _)| key.clone());
                oldest.and_then(|oldest| self.0.remove(&oldest));
            }
        }
        let entry = self.0.entry(key).or_insert(Failures { failures: 0, last: now });
        if entry.is_forgotten(now) {
            entry.failures = 0;
        }
        entry.failures = entry.failures.saturating_add(1);
        entry.last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const CHECK: Duration = Duration::from_millis(10);

    fn source(last_octet: u8) -> Source {
        Source::new(Some(IpAddr::from([192, 0, 2, last_octet])))
    }

    fn fail(
        ration: &mut Ration,
        prefix: &str,
        source: Source,
        now: Duration,
        took: Duration,
    ) -> bool {
        let admitted = ration.admit(prefix, source, now).is_ok();
        if admitted {
            ration.note(prefix, source, now, took, true);
        }
        admitted
    }

    #[test]
    fn five_failures_a_minute_are_free_and_then_there_is_one_a_second() {
        let mut ration = Ration::new(1);
        let admitted =
            (0..100).filter(|_| fail(&mut ration, "p", source(1), SECOND, CHECK)).count();
        assert_eq!(admitted, 5);
        assert_eq!(ration.admit("p", source(1), SECOND * 3 / 2), Err(SECOND / 2));
        let later =
            (1..=10).filter(|n| fail(&mut ration, "p", source(1), SECOND * (1 + n), CHECK)).count();
        assert_eq!(later, 10);
        assert!(ration.admit("p", source(1), SECOND * 11 + CHECK).is_err());
        assert!(
            ration.admit("p", source(1), SECOND * 72).is_ok(),
            "a minute later all is forgotten"
        );
    }

    #[test]
    fn all_suspects_together_get_a_quarter_of_the_pool() {
        let mut ration = Ration::new(2);
        let took = Duration::from_millis(100);
        let mut spent = Duration::ZERO;
        // A minute of attacks by 50 sources on 50 prefixes, a thousand times a second.
        for step in 0..60_000_u32 {
            let now = Duration::from_millis(u64::from(step));
            let n = u8::try_from(step % 50).unwrap();
            if fail(&mut ration, &format!("p{n}"), source(n), now, took) {
                spent += took;
            }
        }
        let quarter = SECOND * 60 * 2 / 4;
        // The first failure of each prefix, and what a clean source may overdraw, come on top once.
        assert!(
            spent >= quarter * 9 / 10 && spent <= quarter + took * 50,
            "{spent:?} of {quarter:?}"
        );
    }

    #[test]
    fn a_source_that_fails_everywhere_is_rationed_on_fresh_prefixes_too() {
        let mut ration = Ration::new(1);
        let took = Duration::from_millis(200);
        let admitted = (0..1000)
            .filter(|n| fail(&mut ration, &format!("p{n}"), source(1), SECOND, took))
            .count();
        assert!(admitted <= 6, "{admitted}");
        assert!(ration.admit("fresh", source(2), SECOND).is_ok(), "others are not touched");
    }

    #[test]
    fn the_owner_of_an_attacked_key_gets_a_check_when_the_share_is_used_up() {
        let mut ration = Ration::new(1);
        while fail(&mut ration, "p", source(1), SECOND, SECOND / 10) {}
        while fail(&mut ration, "p", source(2), SECOND, SECOND / 10) {}
        assert!(ration.admit("p", source(1), SECOND).is_err());
        assert!(ration.admit("p", source(9), SECOND).is_ok());
    }

    #[test]
    fn first_failures_do_not_drive_up_a_debt_that_an_owner_waits_for() {
        let mut ration = Ration::new(1);
        let took = SECOND * 7;
        for n in 0..200 {
            ration.note(&format!("p{n}"), source(n), SECOND, took, true);
        }
        assert!(ration.admit("p0", source(250), SECOND).unwrap_err() <= SECOND / 100);
        assert_eq!(ration.admit("p0", source(250), SECOND + CHECK), Ok(Standing::Clean));
    }

    #[test]
    fn the_tables_stay_bounded() {
        let mut ration = Ration::new(1);
        for n in 0..2 * MAX_ENTRIES {
            ration.note(&format!("p{n}"), source(1), SECOND, Duration::ZERO, true);
        }
        assert_eq!(ration.prefixes.0.len(), MAX_ENTRIES);
        assert_eq!(ration.pairs.0.len(), MAX_ENTRIES);
    }

    #[test]
    fn a_v6_host_is_its_network_and_a_mapped_address_is_v4() {
        let of = |text: &str| Source::new(Some(text.parse().unwrap()));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:2"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }
}
