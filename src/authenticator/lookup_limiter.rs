//! Limits look-ups that find no key: [`LookupLimiter`].
//!
//! Contains only the decision: no tasks, no locks, no clock.

use std::time::Duration;

use crate::{
    policy::{Network, NetworkSteps, STEPS},
    runtime::RecentMap,
    store::Priority,
};

/// Allowance of failures: at most `burst` at once, and then `per_second`.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    burst: f64,
    per_second: f64,
    /// Maximum number of failures that are counted. Failures beyond the burst extend the time in which the allowance
    /// is used up.
    max: f64,
}

/// Allowances by step. A wider network has more clients, but its allowance grows more slowly than its number of
/// hosts.
const NETWORKS: [Allowance; STEPS] = [
    Allowance { burst: 10.0, per_second: 0.5, max: 10.0 },
    Allowance { burst: 40.0, per_second: 2.0, max: 40.0 },
    Allowance { burst: 80.0, per_second: 4.0, max: 80.0 },
    Allowance { burst: 320.0, per_second: 16.0, max: 320.0 },
];
/// Allowance of all networks together, for floods from many networks. The failures of a beginning flood keep it used
/// up for 15 s. Otherwise it would have a gap every 10 ms, in which all concurrent look-ups would be admitted.
const ALL_NETWORKS: Allowance = Allowance { burst: 500.0, per_second: 100.0, max: 2000.0 };
/// Number of failures within [`MEMORY`] from which on a host is suspect while the allowance of all networks is used
/// up.
const SUSPECT_FAILURES: u32 = 2;
/// Time after its last failure for which the failures of a host are counted.
const MEMORY: Duration = Duration::from_secs(60);
/// Maximum number of entries per table: 5 MiB in all.
const MAX_ENTRIES: usize = 16_384;

/// Counts look-ups in the store that found no such key, or another secret, by the client's network.
///
/// A network that exceeds its allowance is suspect, for all keys that this node has not verified. A look-up that
/// finds a valid key subtracts one failure, so that a network of many users with some invalid keys does not become
/// suspect.
#[derive(Debug)]
pub(crate) struct LookupLimiter {
    networks: [RecentMap<Network, Failures>; STEPS],
    all_networks: Level,
}

#[derive(Debug, Clone, Copy, Default)]
struct Failures {
    level: Level,
    recent: u32,
    last: Duration,
}

/// Used part of an allowance.
#[derive(Debug, Clone, Copy, Default)]
struct Level {
    used: f64,
    at: Duration,
}

impl Level {
    fn used(&self, allowance: Allowance, now: Duration) -> f64 {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        (self.used - passed * allowance.per_second).max(0.0)
    }

    fn is_used_up(&self, allowance: Allowance, now: Duration) -> bool {
        self.used(allowance, now) + 1.0 > allowance.burst
    }

    fn add(&mut self, failures: f64, allowance: Allowance, now: Duration) {
        self.used = (self.used(allowance, now) + failures).clamp(0.0, allowance.max);
        self.at = self.at.max(now);
    }
}

impl Failures {
    fn recent(&self, now: Duration) -> u32 {
        if now.saturating_sub(self.last) > MEMORY { 0 } else { self.recent }
    }
}

impl LookupLimiter {
    pub(crate) fn new() -> Self {
        Self {
            networks: std::array::from_fn(|_| RecentMap::new(MAX_ENTRIES)),
            all_networks: Level::default(),
        }
    }

    /// Returns the priority of a look-up of a key that this node has not verified.
    pub(crate) fn priority(&self, source: NetworkSteps, now: Duration) -> Priority {
        let is_flood = self.all_networks.is_used_up(ALL_NETWORKS, now);
        let is_suspect = source.iter().any(|(step, network)| {
            self.networks[step].get(&network).is_some_and(|failures| {
                failures.level.is_used_up(NETWORKS[step], now)
                    || (is_flood && step == 0 && failures.recent(now) >= SUSPECT_FAILURES)
            })
        });
        if is_suspect { Priority::Suspect } else { Priority::Ordinary }
    }

    /// Counts a look-up that found no such key, or another secret.
    pub(crate) fn failed(&mut self, source: NetworkSteps, now: Duration) {
        self.all_networks.add(1.0, ALL_NETWORKS, now);
        for (step, network) in source.iter() {
            let failures = self.networks[step].entry(network, Failures::default);
            failures.level.add(1.0, NETWORKS[step], now);
            failures.recent = failures.recent(now).saturating_add(1);
            failures.last = failures.last.max(now);
        }
    }

    /// Counts a look-up that found a valid key.
    pub(crate) fn succeeded(&mut self, source: NetworkSteps, now: Duration) {
        for (step, network) in source.iter() {
            // Networks without failures get no entry.
            if self.networks[step].get(&network).is_some() {
                let failures = self.networks[step].entry(network, Failures::default);
                failures.level.add(-1.0, NETWORKS[step], now);
                failures.recent = failures.recent.saturating_sub(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn from(text: &str) -> NetworkSteps {
        NetworkSteps::of(Some(text.parse().unwrap()))
    }

    /// Returns how many of `guesses` concurrent look-ups, each from the next address, are ordinary.
    fn ordinary(
        limiter: &mut LookupLimiter,
        guesses: usize,
        now: Duration,
        address: impl Fn(usize) -> String,
    ) -> usize {
        let mut count = 0;
        for n in 0..guesses {
            let source = from(&address(n));
            if limiter.priority(source, now) == Priority::Ordinary {
                count += 1;
                limiter.failed(source, now);
            }
        }
        count
    }

    #[test]
    fn a_host_has_ten_failures_at_once_and_then_one_in_two_seconds() {
        let mut limiter = LookupLimiter::new();
        let host = |_: usize| "192.0.2.1".to_owned();
        assert_eq!(ordinary(&mut limiter, 100, SECOND, host), 10);
        let later =
            (0..60).map(|n| ordinary(&mut limiter, 100, SECOND * (2 + n), host)).sum::<usize>();
        assert_eq!(later, 30);
        assert_eq!(limiter.priority(from("192.0.2.2"), SECOND * 62), Priority::Ordinary);
        assert_eq!(ordinary(&mut limiter, 100, SECOND * 3600, host), 10);
    }

    #[test]
    fn fresh_addresses_of_one_network_share_the_allowance_of_the_wider_steps() {
        let mut limiter = LookupLimiter::new();
        let slash_24 = |n: usize| format!("192.0.2.{}", n % 256);
        assert_eq!(ordinary(&mut limiter, 1000, SECOND, slash_24), 40);
        let slash_48 = |n: usize| format!("2001:db8:1:{n:x}::1");
        assert_eq!(ordinary(&mut limiter, 1000, SECOND, slash_48), 80);
        let slash_32 = |n: usize| format!("2001:dba:{n:x}::1");
        assert_eq!(ordinary(&mut limiter, 1000, SECOND, slash_32), 320);
        assert_eq!(limiter.priority(from("198.51.100.1"), SECOND), Priority::Ordinary);
    }

    #[test]
    fn a_flood_from_a_thousand_networks_makes_those_with_a_few_failures_suspect_and_no_others() {
        let mut limiter = LookupLimiter::new();
        let address = |n: usize| format!("10.{}.{}.1", n % 1000 / 250, n % 250);
        let admitted = ordinary(&mut limiter, 20_000, SECOND, address);
        assert_eq!(admitted, 2000, "two each");
        assert_eq!(limiter.priority(from("198.51.100.1"), SECOND), Priority::Ordinary);
        assert_eq!(limiter.priority(from("10.0.1.1"), SECOND * 100), Priority::Ordinary);
    }

    #[test]
    fn a_network_with_more_valid_keys_than_bad_ones_is_not_suspect() {
        let mut limiter = LookupLimiter::new();
        for _ in 0..1000 {
            limiter.failed(from("192.0.2.1"), SECOND);
            limiter.succeeded(from("192.0.2.1"), SECOND);
        }
        assert_eq!(limiter.priority(from("192.0.2.1"), SECOND), Priority::Ordinary);
    }

    #[test]
    fn the_tables_stay_bounded() {
        let mut limiter = LookupLimiter::new();
        for n in 0..3 * MAX_ENTRIES {
            let address = format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255);
            limiter.failed(from(&address), SECOND);
        }
        assert!(limiter.networks.iter().all(|table| table.len() <= MAX_ENTRIES));
    }
}
