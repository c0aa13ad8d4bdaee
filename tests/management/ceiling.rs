//! The ceiling, through every operation: no key that a caller makes, changes, rotates, imports or reactivates allows a
//! request that the caller's own key denies.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

use chrono::{DateTime, TimeDelta, Utc};
use http::Method;
use proptest::{
    collection::vec,
    prelude::*,
    sample::{select, subsequence},
};
use tower_api_key::{
    AuthContext, KeyManager, MemoryStore, NewKey,
    key::KeyHash,
    management::{ImportedKey, KeyPatch, Rotation},
    record::{AllowedNetwork, Budget, BudgetPeriod, EndpointRule, KeyId, KeyRecord, RateLimits},
    store::ListKeys,
};

use crate::support::counted::block_on;

const SCOPES: [&str; 5] = ["*", "chat:*", "chat:write", "files", "chat:read:all"];
const WANTED_SCOPES: [&str; 4] = ["chat:write", "chat:read:all", "files", "admin"];
const WORDS: [&str; 3] = ["small", "large", "other"];
const ENDPOINTS: [&str; 6] = ["*", "GET *", "/v1/*", "POST /v1/chat", "/v1/chat", "GET /v1/*"];
const PATHS: [&str; 3] = ["/v1/chat", "/v1/models", "/health"];
const NETWORKS: [&str; 5] = ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3", "2001:db8::/32"];
const ADDRESSES: [&str; 4] = ["10.1.2.3", "10.2.0.1", "192.0.2.1", "2001:db8::1"];

/// The fields that a caller can set.
#[derive(Debug, Clone)]
struct Grant {
    scopes: Vec<&'static str>,
    permissions: Vec<&'static str>,
    models: Vec<&'static str>,
    endpoints: Vec<&'static str>,
    networks: Vec<&'static str>,
    is_unlimited: bool,
    limits: [Option<u64>; 3],
    budget: Option<(u64, BudgetPeriod)>,
    /// In hours from now.
    expires: Option<i64>,
    starts: Option<i64>,
}

#[derive(Debug, Clone)]
enum Step {
    Issue(Grant),
    Import(Grant),
    Update(usize, Grant),
    Rotate(usize),
    Revoke(usize),
    Reactivate(usize),
}

fn grants() -> impl Strategy<Value = Grant> {
    let few = |all: &'static [&'static str]| subsequence(all, 0..=all.len());
    let limit = || prop_oneof![Just(None), (0..4_u64).prop_map(Some)];
    let periods =
        [BudgetPeriod::Total, BudgetPeriod::Daily, BudgetPeriod::Weekly, BudgetPeriod::Monthly];
    let lists = (few(&SCOPES), few(&WORDS), few(&WORDS), few(&ENDPOINTS), few(&NETWORKS));
    let budget = prop_oneof![Just(None), (0..3_u64, select(periods.to_vec())).prop_map(Some)];
    let hours = || prop_oneof![3 => Just(None), 1 => (1..4_i64).prop_map(Some)];
    let rest = (prop::bool::weighted(0.2), [limit(), limit(), limit()], budget, hours(), hours());
    (lists, rest).prop_map(|(lists, rest)| {
        let (scopes, permissions, models, endpoints, networks) = lists;
        let (is_unlimited, limits, budget, expires, starts) = rest;
        // A key that ends before it starts is rejected.
        let starts = starts.filter(|start| expires.is_none_or(|end| end > *start));
        Grant {
            scopes,
            permissions,
            models,
            endpoints,
            networks,
            is_unlimited,
            limits,
            budget,
            expires,
            starts,
        }
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => grants().prop_map(Step::Issue),
        1 => grants().prop_map(Step::Import),
        3 => (0..4_usize, grants()).prop_map(|(at, grant)| Step::Update(at, grant)),
        1 => (0..4_usize).prop_map(Step::Rotate),
        1 => (0..4_usize).prop_map(Step::Revoke),
        1 => (0..4_usize).prop_map(Step::Reactivate),
    ];
    vec(step, 1..8)
}

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp(Utc::now().timestamp(), 0).unwrap()
}

impl Grant {
    fn endpoints(&self) -> Vec<EndpointRule> {
        self.endpoints.iter().map(|rule| rule.parse().unwrap()).collect()
    }

    fn networks(&self) -> Vec<AllowedNetwork> {
        self.networks.iter().map(|network| network.parse().unwrap()).collect()
    }

    fn budget(&self) -> Option<Budget> {
        self.budget.map(|(limit_cents, period)| Budget { limit_cents, period })
    }

    fn at(hours: Option<i64>) -> Option<DateTime<Utc>> {
        hours.map(|hours| now() + TimeDelta::hours(hours))
    }

    fn new_key(&self, owner: i64) -> NewKey {
        let mut limits = RateLimits::default();
        [limits.per_minute, limits.per_hour, limits.per_day] = self.limits;
        let mut new = NewKey::new(owner, "k")
            .scopes(self.scopes.iter().copied())
            .permissions(self.permissions.iter().copied())
            .allowed_models(self.models.iter().copied())
            .allowed_endpoints(self.endpoints())
            .allowed_ips(self.networks())
            .rate_limits(limits);
        if self.is_unlimited {
            new = new.unlimited();
        }
        if let Some(budget) = self.budget() {
            new = new.budget(budget);
        }
        if let Some(expiry) = Self::at(self.expires) {
            new = new.expires_at(expiry);
        }
        if let Some(start) = Self::at(self.starts) {
            new = new.not_before(start);
        }
        new
    }

    fn patch(&self) -> KeyPatch {
        KeyPatch::default()
            .scopes(self.scopes.iter().copied())
            .permissions(self.permissions.iter().copied())
            .allowed_models(self.models.iter().copied())
            .allowed_endpoints(self.endpoints())
            .allowed_ips(self.networks())
            .per_minute(self.limits[0])
            .per_hour(self.limits[1])
            .per_day(self.limits[2])
            .unlimited(self.is_unlimited)
            .budget(self.budget())
            .expires_at(Self::at(self.expires))
            .not_before(Self::at(self.starts))
    }
}

/// Returns the first request that the key allows and its maker denies.
fn wider(maker: &KeyRecord, granted: &KeyRecord) -> Option<String> {
    let (held, given) =
        (AuthContext::unverified(maker.clone()), AuthContext::unverified(granted.clone()));
    let differs =
        |what: String, allowed: bool, is_held: bool| (allowed && !is_held).then_some(what);
    for hours in [0, 1, 2, 3, 5] {
        let at = now() + TimeDelta::minutes(60 * hours + 30);
        let found = differs(format!("at {hours} h"), given.is_valid_at(at), held.is_valid_at(at));
        if found.is_some() {
            return found;
        }
    }
    for scope in WANTED_SCOPES {
        let found =
            differs(format!("scope {scope}"), given.has_scope(scope), held.has_scope(scope));
        if found.is_some() {
            return found;
        }
    }
    for word in WORDS {
        let permission = differs(
            format!("permission {word}"),
            given.has_permission(word),
            held.has_permission(word),
        );
        let model = differs(
            format!("model {word}"),
            given.can_access_model(word),
            held.can_access_model(word),
        );
        if let Some(found) = permission.or(model) {
            return Some(found);
        }
    }
    for path in PATHS {
        for method in [Method::GET, Method::POST, Method::HEAD] {
            let found = differs(
                format!("{method} {path}"),
                given.can_access_endpoint(&method, path),
                held.can_access_endpoint(&method, path),
            );
            if found.is_some() {
                return found;
            }
        }
    }
    for address in ADDRESSES {
        let address: IpAddr = address.parse().unwrap();
        let found = differs(
            format!("from {address}"),
            given.can_access_from(address),
            held.can_access_from(address),
        );
        if found.is_some() {
            return found;
        }
    }
    let limit = |record: &KeyRecord, at: usize| {
        let limits = &record.rate_limits;
        let limit = [limits.per_minute, limits.per_hour, limits.per_day][at];
        limit.filter(|_| !record.is_unlimited).unwrap_or(u64::MAX)
    };
    if let Some(at) = (0..3).find(|at| limit(granted, *at) > limit(maker, *at)) {
        return Some(format!("rate limit {at}"));
    }
    let budget = |record: &KeyRecord| record.budget.map_or(u64::MAX, |budget| budget.limit_cents);
    (budget(granted) > budget(maker)).then(|| "budget".to_owned())
}

static ACCEPTED: AtomicUsize = AtomicUsize::new(0);
static REJECTED: AtomicUsize = AtomicUsize::new(0);

async fn run(maker: Grant, steps: Vec<Step>) -> Result<(), String> {
    let manager = KeyManager::new(MemoryStore::new());
    let owner = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let owner = owner.as_i64().unwrap();
    let own = manager.issue(maker.new_key(owner)).await.unwrap();
    let own = own.record().clone();
    // A key that its maker may not touch, because it grants everything.
    let wide = manager.issue(NewKey::new(owner, "wide")).await.unwrap().record().id.clone();
    let acting = manager.clone().acting_for(&AuthContext::unverified(own.clone()));
    let mut ids: Vec<KeyId> = vec![own.id.clone(), wide.clone()];
    for (number, step) in steps.into_iter().enumerate() {
        let id = |at: usize| ids[at % ids.len()].clone();
        let mut touched = None;
        let is_ok = match step {
            Step::Issue(grant) => match acting.issue(grant.new_key(owner)).await {
                Ok(issued) => {
                    ids.push(issued.record().id.clone());
                    touched = Some(issued.record().clone());
                    true
                }
                Err(_) => false,
            },
            Step::Import(grant) => {
                let hash = KeyHash::sha256(&format!("key {number}"));
                let prefix = format!("imported{number}");
                let key = ImportedKey::new(grant.new_key(owner), &prefix, hash);
                acting.import([key]).await.unwrap();
                let all = manager.list(&ListKeys::default()).await.unwrap().keys;
                touched = all.into_iter().find(|key| key.prefix == prefix);
                touched.is_some()
            }
            Step::Update(at, grant) => {
                touched = acting.update(&id(at), &grant.patch(), None).await.ok();
                touched.is_some()
            }
            Step::Rotate(at) => {
                let how = Rotation::default().end_previous();
                let rotated = acting.rotate(&id(at), how).await.ok();
                touched = rotated.map(|key| key.record().clone());
                touched.is_some()
            }
            Step::Revoke(at) => acting.revoke(&id(at)).await.is_ok(),
            Step::Reactivate(at) => {
                touched = acting.reactivate(&id(at)).await.ok();
                touched.is_some()
            }
        };
        if is_ok { &ACCEPTED } else { &REJECTED }.fetch_add(1, SeqCst);
        // The maker's context is that of its request, whatever became of its own key meanwhile.
        if let Some(found) = touched.and_then(|key| wider(&own, &key)) {
            return Err(format!("step {number}: {found}"));
        }
    }
    Ok(())
}

#[test]
fn no_operation_grants_more_than_the_callers_key_has() {
    // 100,000 cases take minutes without optimization: PROPTEST_CASES=100000.
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    let config = ProptestConfig { cases: cases.unwrap_or(3_000), ..ProptestConfig::default() };
    proptest!(config, |(maker in grants(), steps in steps())| {
        if let Err(found) = block_on(run(maker, steps)) {
            prop_assert!(false, "{found}");
        }
    });
    let (accepted, rejected) = (ACCEPTED.load(SeqCst), REJECTED.load(SeqCst));
    assert!(accepted > 1_000 && rejected > 1_000, "{accepted} accepted, {rejected} rejected");
}
