//! Judges every answer that a fleet gave by the times at which changes were committed.

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

use tower_api_key::{Authenticator, Denial};

/// What was queried and answered, and what was changed, by one monotonic clock.
pub struct History {
    start: Instant,
    answers: Mutex<Vec<Answered>>,
    revokes: Mutex<Vec<Revoked>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Accepted,
    /// 401.
    Denied,
    /// 503.
    Unavailable,
    /// Anything else.
    Other(String),
}

#[derive(Debug, Clone)]
pub struct Answered {
    pub node: usize,
    pub key: usize,
    pub began: Duration,
    pub ended: Duration,
    pub reply: Reply,
}

/// A change that makes a key useless for good. It was committed between the two moments.
#[derive(Debug, Clone)]
pub struct Revoked {
    pub key: usize,
    pub sent: Duration,
    pub returned: Duration,
}

/// What a history has to obey.
pub struct Rules<'a> {
    /// How long after a commit a node may go on accepting the key.
    pub bound: &'a dyn Fn(usize) -> Duration,
    /// Whether this may be a 503.
    pub may_be_unavailable: &'a dyn Fn(&Answered) -> bool,
    /// From here on every node has the bound of one that is connected.
    pub healed: Duration,
    /// That bound.
    pub connected: Duration,
    /// No answer takes longer.
    pub slowest: Duration,
}

impl History {
    pub fn new() -> Self {
        Self { start: Instant::now(), answers: Mutex::default(), revokes: Mutex::default() }
    }

    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    pub async fn ask(&self, node: usize, with: &Authenticator, key: usize, secret: &str) -> Reply {
        let began = self.now();
        let answer = with.authenticate(secret).await;
        let ended = self.now();
        let reply = match answer {
            Ok(_) => Reply::Accepted,
            Err(Denial::InvalidKey(_)) => Reply::Denied,
            Err(Denial::Unavailable(_)) => Reply::Unavailable,
            Err(other) => Reply::Other(other.to_string()),
        };
        self.answers.lock().unwrap().push(Answered {
            node,
            key,
            began,
            ended,
            reply: reply.clone(),
        });
        reply
    }

    /// Adds an answer, to check this checker.
    pub fn note(&self, answer: Answered) {
        self.answers.lock().unwrap().push(answer);
    }

    pub fn forget_answers(&self) {
        self.answers.lock().unwrap().clear();
    }

    /// Runs a change that revokes `key`.
    pub async fn revoke(&self, key: usize, change: impl Future<Output = ()>) {
        let sent = self.now();
        change.await;
        let returned = self.now();
        self.revokes.lock().unwrap().push(Revoked { key, sent, returned });
    }

    /// The answers that break a rule, each with the rule.
    pub fn violations(&self, rules: &Rules<'_>) -> Vec<String> {
        let revokes = self.revokes.lock().unwrap();
        let answers = self.answers.lock().unwrap();
        let broken = answers.iter().filter_map(|it| {
            let revoke = revokes.iter().find(|revoke| revoke.key == it.key);
            let rule = rule_broken_by(it, revoke, rules)?;
            Some(format!("{rule}: {it:?} {revoke:?}"))
        });
        broken.collect()
    }

    pub fn check(&self, rules: &Rules<'_>) {
        let violations = self.violations(rules);
        let shown = violations.iter().take(10).cloned().collect::<Vec<_>>().join("\n");
        assert!(
            violations.is_empty(),
            "{} violations, healed at {:?}; {}\n{shown}",
            violations.len(),
            rules.healed,
            self.summary()
        );
    }

    /// How many answers of each kind there are that began in this time.
    pub fn count(&self, reply: &Reply, since: Duration, until: Duration) -> usize {
        let answers = self.answers.lock().unwrap();
        let counts = |it: &&Answered| it.reply == *reply && it.began >= since && it.began <= until;
        answers.iter().filter(counts).count()
    }

    /// For each revoke, how long after it a node last accepted the key.
    pub fn summary(&self) -> String {
        let answers = self.answers.lock().unwrap();
        let mut times: Vec<_> = answers.iter().map(|it| it.ended - it.began).collect();
        times.sort();
        let at = |share: f64| {
            let last = times.len().saturating_sub(1);
            times.get((last as f64 * share) as usize).copied().unwrap_or_default()
        };
        let mut late = BTreeMap::<usize, Duration>::new();
        for revoke in &*self.revokes.lock().unwrap() {
            for it in
                answers.iter().filter(|it| it.key == revoke.key && it.reply == Reply::Accepted)
            {
                let after = it.began.saturating_sub(revoke.returned);
                let latest = late.entry(it.node).or_default();
                *latest = after.max(*latest);
            }
        }
        format!(
            "{} answers, p50 {:?}, p99 {:?}, max {:?}; accepted after a revoke, by node: {late:?}",
            times.len(),
            at(0.5),
            at(0.99),
            at(1.0)
        )
    }
}

fn rule_broken_by(
    it: &Answered,
    revoke: Option<&Revoked>,
    rules: &Rules<'_>,
) -> Option<&'static str> {
    if it.ended - it.began > rules.slowest {
        return Some("too slow");
    }
    match &it.reply {
        Reply::Other(_) => Some("neither yes, no nor later"),
        Reply::Unavailable if !(rules.may_be_unavailable)(it) => Some("unavailable without need"),
        Reply::Unavailable => None,
        Reply::Denied => {
            let is_valid = revoke.is_none_or(|revoke| it.ended < revoke.sent);
            is_valid.then_some("a valid key is refused")
        }
        Reply::Accepted => {
            let revoke = revoke?;
            let until = (revoke.returned + (rules.bound)(it.node))
                .min(revoke.returned.max(rules.healed) + rules.connected);
            (it.began > until).then_some("a revoked key is accepted")
        }
    }
}
