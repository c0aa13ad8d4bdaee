//! The limit on failed slow hash checks.
//!
//! It holds only the decision: [`FailureLimiter`] does not depend on tasks, semaphores or bcrypt.

use std::{borrow::Borrow, hash::Hash, time::Duration};

use crate::{
    policy::{Network, NetworkSteps, STEPS},
    runtime::RecentMap,
};

/// Time after the last failure for which failures count.
const FAILURE_LIFETIME: Duration = Duration::from_secs(60);
/// Number of failures without a limit. After them, one check per [`PACE`] is admitted.
const FREE_FAILURES: u32 = 5;
const PACE: Duration = Duration::from_secs(1);
/// Number of failures of a network from which on all its checks are suspect, by step. An attacker who has a whole
/// network uses each address of it once, so that the bound of a wider network is only a few times that of a host.
const SUSPECT_FROM: [u32; STEPS] = [FREE_FAILURES, 10, 15, 30];
/// Number of failures of a network at one lookup id from which on it no longer counts as the owner's network, by step.
const NOT_OWNER_FROM: [u32; STEPS] = [1, 3, 5, 10];
/// Fraction of the pool's time for all suspect checks together.
const SUSPECT_SHARE: f64 = 0.25;
/// Maximum unused part of that share, in seconds of the pool's time.
const SAVED_SECONDS: f64 = 1.0;
/// Overdraft of a source without failures, in seconds of the pool's time. With it, the owner of an attacked key gets a
/// check after the attackers have used the share up. The debt is paid back before any other check.
const OVERDRAFT_SECONDS: f64 = 2.0;
/// Maximum number of entries in each table.
const MAX_ENTRIES: usize = 8192;

/// Classification of an admitted check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The source has no relevant failures, or may be the owner of a key under attack.
    Clean,
    /// The source or the lookup id has failed recently: the check gets no place in the queue.
    Suspect,
}

/// The limiter of failed checks: by lookup id and network, and for all suspect checks together.
///
/// A check is suspect if its lookup id has failed in the last minute, from any client, or its network has failed too
/// often, at any lookup id.
///
/// While one network guesses (an IPv6 /48 or an IPv4 /24), at one key or at many, from any of its addresses, an owner
/// on another network who retries gets a check within 64 × t / slots, where t is the time of one check: 16 s for t =
/// 0.25 s and one slot. By then the network has had at most 15 failures for which its hosts count as owners, each of
/// which takes at most t of a share that grows by slots / 4 a second. After that it can't use the overdraft. From an
/// IPv6 /32 the time is twice as long.
#[derive(Debug)]
pub(super) struct FailureLimiter {
    pairs: [Table<(Box<str>, Network)>; STEPS],
    prefixes: Table<Box<str>>,
    sources: [Table<Network>; STEPS],
    /// Seconds of the pool's time that are left for suspect checks; below zero is debt.
    share: f64,
    /// Seconds of the pool's time that suspect checks get per second.
    refill: f64,
    refilled_at: Duration,
}

impl FailureLimiter {
    /// Creates a limiter for a pool that runs `slots` checks at once.
    pub(super) fn new(slots: usize) -> Self {
        let refill = SUSPECT_SHARE * slots as f64;
        Self {
            pairs: Default::default(),
            prefixes: Table::default(),
            sources: Default::default(),
            share: refill * SAVED_SECONDS,
            refill,
            refilled_at: Duration::ZERO,
        }
    }

    /// Returns whether a check may run now.
    ///
    /// # Errors
    ///
    /// The time to wait before a retry.
    pub(super) fn admit(
        &mut self,
        prefix: &str,
        source: NetworkSteps,
        now: Duration,
    ) -> Result<Standing, Duration> {
        self.refill(now);
        let is_suspect = self.is_suspect(source, now);
        if self.prefixes.get(prefix, now).is_none() && !is_suspect {
            return Ok(Standing::Clean);
        }
        let pair = self.pairs[0].get(&(prefix.into(), source.host()), now);
        if let Some(pair) = pair.filter(|pair| pair.failures >= FREE_FAILURES) {
            let next = pair.last + PACE;
            if now < next {
                return Err(next - now);
            }
        }
        let is_clean = !is_suspect && self.may_be_owner(prefix, source, now);
        let floor = if is_clean { self.overdraft() } else { 0.0 };
        if self.share <= floor {
            return Err(Duration::from_secs_f64((floor - self.share) / self.refill));
        }
        Ok(if is_clean { Standing::Clean } else { Standing::Suspect })
    }

    /// Returns how long a check of a key under `prefix` would have to wait, if that is known before the look-up: slow
    /// checks have failed under the prefix, and the source does not count as the owner's.
    pub(super) fn turns_away(
        &mut self,
        prefix: &str,
        source: NetworkSteps,
        now: Duration,
    ) -> Option<Duration> {
        let is_slow = self.prefixes.get(prefix, now).is_some();
        if !is_slow || (!self.is_suspect(source, now) && self.may_be_owner(prefix, source, now)) {
            return None;
        }
        self.admit(prefix, source, now).err()
    }

    /// Records that a check ran for `took`, and whether it `failed`.
    pub(super) fn note(
        &mut self,
        prefix: &str,
        source: NetworkSteps,
        now: Duration,
        took: Duration,
        failed: bool,
    ) {
        self.refill(now);
        let took = took.as_secs_f64();
        if self.prefixes.get(prefix, now).is_some() || self.is_suspect(source, now) {
            self.share -= took;
        } else if failed {
            // First failures use up the share as well; otherwise an attack on many lookup ids would be free. But they
            // were admitted without a check of the share, so they must not increase the debt that owners then wait for.
            self.share = (self.share - took).max(self.overdraft().min(self.share));
        }
        if failed {
            self.prefixes.count(prefix.into(), now);
            for (step, network) in source.iter() {
                self.pairs[step].count((prefix.into(), network), now);
                self.sources[step].count(network, now);
            }
        }
    }

    /// Returns whether one of the networks has failed so often that all its checks are suspect.
    fn is_suspect(&self, source: NetworkSteps, now: Duration) -> bool {
        source.iter().any(|(step, network)| {
            let failures = self.sources[step].get(&network, now);
            failures.is_some_and(|network| network.failures >= SUSPECT_FROM[step])
        })
    }

    /// Returns whether the source has not failed at this lookup id, and few other sources on its networks have.
    fn may_be_owner(&self, prefix: &str, source: NetworkSteps, now: Duration) -> bool {
        source.iter().all(|(step, network)| {
            let failures = self.pairs[step].get(&(prefix.into(), network), now);
            failures.is_none_or(|pair| pair.failures < NOT_OWNER_FROM[step])
        })
    }

    /// Returns the debt beyond which a clean source waits as well.
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
    fn is_expired(&self, now: Duration) -> bool {
        now.saturating_sub(self.last) > FAILURE_LIFETIME
    }
}

/// Failures by key. Their number is bounded, and they expire.
#[derive(Debug)]
struct Table<K>(RecentMap<K, Failures>);

impl<K: Hash + Eq> Default for Table<K> {
    fn default() -> Self {
        Self(RecentMap::new(MAX_ENTRIES))
    }
}

impl<K: Hash + Eq> Table<K> {
    fn get<Q>(&self, key: &Q, now: Duration) -> Option<Failures>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.0.get(key).copied().filter(|failures| !failures.is_expired(now))
    }

    fn count(&mut self, key: K, now: Duration) {
        let entry = self.0.entry(key, || Failures { failures: 0, last: now });
        if entry.is_expired(now) {
            entry.failures = 0;
        }
        entry.failures = entry.failures.saturating_add(1);
        entry.last = now;
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const CHECK: Duration = Duration::from_millis(10);

    /// Returns a source in a /24 of its own.
    fn source(network: u8) -> NetworkSteps {
        NetworkSteps::of(Some(IpAddr::from([192, 0, network, 1])))
    }

    fn of(text: &str) -> NetworkSteps {
        NetworkSteps::of(Some(text.parse().unwrap()))
    }

    fn fail(
        limiter: &mut FailureLimiter,
        prefix: &str,
        source: NetworkSteps,
        now: Duration,
        took: Duration,
    ) -> bool {
        let admitted = limiter.admit(prefix, source, now).is_ok();
        if admitted {
            limiter.note(prefix, source, now, took, true);
        }
        admitted
    }

    #[test]
    fn five_failures_a_minute_are_free_and_then_there_is_one_a_second() {
        let mut limiter = FailureLimiter::new(1);
        let admitted =
            (0..100).filter(|_| fail(&mut limiter, "p", source(1), SECOND, CHECK)).count();
        assert_eq!(admitted, 5);
        assert_eq!(limiter.admit("p", source(1), SECOND * 3 / 2), Err(SECOND / 2));
        let later = (1..=10)
            .filter(|n| fail(&mut limiter, "p", source(1), SECOND * (1 + n), CHECK))
            .count();
        assert_eq!(later, 10);
        assert!(limiter.admit("p", source(1), SECOND * 11 + CHECK).is_err());
        assert!(
            limiter.admit("p", source(1), SECOND * 72).is_ok(),
            "failures expire after a minute"
        );
    }

    #[test]
    fn all_suspects_together_get_a_quarter_of_the_pool() {
        let mut limiter = FailureLimiter::new(2);
        let took = Duration::from_millis(100);
        let mut spent = Duration::ZERO;
        // A minute of attacks by 50 sources on 50 prefixes, a thousand times a second.
        for step in 0..60_000_u32 {
            let now = Duration::from_millis(u64::from(step));
            let n = u8::try_from(step % 50).unwrap();
            if fail(&mut limiter, &format!("p{n}"), source(n), now, took) {
                spent += took;
            }
        }
        let quarter = SECOND * 60 * 2 / 4;
        // The first failure of each prefix and the overdraft of a clean source are added once.
        assert!(
            spent >= quarter * 9 / 10 && spent <= quarter + took * 50,
            "{spent:?} of {quarter:?}"
        );
    }

    #[test]
    fn a_source_that_fails_everywhere_is_limited_on_fresh_prefixes_too() {
        let mut limiter = FailureLimiter::new(1);
        let took = Duration::from_millis(200);
        let admitted = (0..1000)
            .filter(|n| fail(&mut limiter, &format!("p{n}"), source(1), SECOND, took))
            .count();
        assert!(admitted <= 6, "{admitted}");
        assert!(limiter.admit("fresh", source(2), SECOND).is_ok(), "other sources are not limited");
    }

    #[test]
    fn the_owner_of_an_attacked_key_gets_a_check_when_the_share_is_used_up() {
        let mut limiter = FailureLimiter::new(1);
        while fail(&mut limiter, "p", source(1), SECOND, SECOND / 10) {}
        while fail(&mut limiter, "p", source(2), SECOND, SECOND / 10) {}
        assert!(limiter.admit("p", source(1), SECOND).is_err());
        assert!(limiter.admit("p", source(9), SECOND).is_ok());
    }

    #[test]
    fn first_failures_do_not_drive_up_a_debt_that_an_owner_waits_for() {
        let mut limiter = FailureLimiter::new(1);
        let took = SECOND * 7;
        for n in 0..200 {
            limiter.note(&format!("p{n}"), source(n), SECOND, took, true);
        }
        assert!(limiter.admit("p0", source(250), SECOND).unwrap_err() <= SECOND / 100);
        assert_eq!(limiter.admit("p0", source(250), SECOND + CHECK), Ok(Standing::Clean));
    }

    /// Returns the seconds until the owner on another network gets a check. The owner retries once a second, while
    /// `guesses` come 25 times a second, each from an address that was not used before. There is one slot, and a check
    /// takes a quarter of a second.
    fn lockout(seconds: u64, guess: impl Fn(u32) -> (String, String)) -> u64 {
        let (mut limiter, took) = (FailureLimiter::new(1), SECOND / 4);
        let mut longest = 0;
        let mut waiting_since = 0;
        for step in 0..25 * u32::try_from(seconds).unwrap() {
            let now = SECOND + SECOND * step / 25;
            let (prefix, address) = guess(step);
            fail(&mut limiter, &prefix, of(&address), now, took);
            if step % 25 == 24 {
                let second = u64::from(step / 25 + 1);
                let owner = of("198.51.100.7");
                if limiter.admit("p0", owner, now).is_ok() {
                    limiter.note("p0", owner, now, took, false);
                    waiting_since = second;
                }
                longest = longest.max(second - waiting_since);
            }
        }
        longest
    }

    #[test]
    fn an_owner_elsewhere_is_locked_out_for_at_most_16_seconds_while_one_network_guesses() {
        let one_key = |n: u32| ("p0".to_owned(), format!("2001:db8:1:{n:x}::1"));
        assert!(lockout(600, one_key) <= 16, "{}", lockout(600, one_key));
        let many_keys = |n: u32| (format!("p{}", n % 40), format!("2001:db8:1:{n:x}::1"));
        assert!(lockout(600, many_keys) <= 16, "{}", lockout(600, many_keys));
        let v4 = |n: u32| ("p0".to_owned(), format!("192.0.2.{}", n % 256));
        assert!(lockout(600, v4) <= 16, "{}", lockout(600, v4));
        let provider = |n: u32| ("p0".to_owned(), format!("2001:db8:{n:x}::1"));
        assert!(lockout(600, provider) <= 32, "{}", lockout(600, provider));
    }

    #[test]
    fn a_key_whose_slow_check_would_be_rejected_needs_no_look_up() {
        let mut limiter = FailureLimiter::new(1);
        assert_eq!(limiter.turns_away("p", source(1), SECOND), None);
        while fail(&mut limiter, "p", source(1), SECOND, CHECK) {}
        assert_eq!(limiter.turns_away("p", source(1), SECOND), Some(SECOND));
        // The hash of the key may be a fast one. The second source may be the owner.
        assert_eq!(limiter.turns_away("q", source(1), SECOND), None);
        assert_eq!(limiter.turns_away("p", source(2), SECOND), None);
        assert_eq!(limiter.turns_away("p", source(1), SECOND * 3), None);
    }

    #[test]
    fn the_tables_stay_bounded() {
        let mut limiter = FailureLimiter::new(1);
        for n in 0..2 * MAX_ENTRIES {
            limiter.note(&format!("p{n}"), source(1), SECOND, Duration::ZERO, true);
        }
        assert!(limiter.prefixes.0.len() <= MAX_ENTRIES);
        assert!(limiter.pairs[0].0.len() <= MAX_ENTRIES);
    }
}
