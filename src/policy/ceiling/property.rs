//! The property of the ceiling: what is granted allows no request that the maker is denied.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    net::IpAddr,
};

use chrono::TimeDelta;
use http::Method;
use proptest::{
    option,
    prelude::*,
    sample::{select, subsequence},
    test_runner::{Config, TestCaseError, TestRunner},
};

use super::*;
use crate::{
    denial::InvalidKey,
    policy::{allowed, validity},
    record::{AllowedNetwork, EndpointRule, RateLimits, User, UserId},
};

/// Number of cases, unless `PROPTEST_CASES` is set. 100,000 take a minute without optimization.
const CASES: u32 = 10_000;

const SCOPES: [&str; 9] = ["*", "a", "a*", "a:*", "a:x", "a:x:*", "a:x:y", "b", "b.*"];
const PERMISSIONS: [&str; 3] = ["read", "write", "*"];
const MODELS: [&str; 3] = ["m", "n", "*"];
const RULES: [&str; 14] = [
    "*",
    "/*",
    "/a",
    "/a/",
    "/a/*",
    "/a/x",
    "/a/b/*",
    "/ab",
    "GET *",
    "GET /a/*",
    "GET /a/x",
    "HEAD /a/x",
    "POST /a/*",
    "POST /a/x",
];
/// The last four are no paths, or ambiguous.
const PATHS: [&str; 11] =
    ["/", "/a", "/a/", "/a/x", "/a/b/c", "/ab", "/b", "*", "", "/a//x", "/a/%2e%2e/x"];
const METHODS: [Method; 3] = [Method::GET, Method::HEAD, Method::POST];
const NETWORKS: [&str; 11] = [
    "0.0.0.0/0",
    "10.0.0.0/8",
    "10.1.0.0/16",
    "10.1.2.3",
    "::ffff:0:0/96",
    "::ffff:10.0.0.0/104",
    "::/0",
    "::fffe:0:0/95",
    "2001:db8::/32",
    "2001:db8::/48",
    "2001:db8::1",
];
const ADDRESSES: [&str; 9] = [
    "10.1.2.3",
    "10.1.9.9",
    "10.9.9.9",
    "192.0.2.1",
    "::ffff:10.1.2.3",
    "::fffe:1:1",
    "2001:db8::1",
    "2001:db8:1::1",
    "2001:db9::1",
];
/// Times of requests in seconds after a midnight, on both sides of the ends of windows.
const SECONDS: [u64; 9] = [0, 1, 59, 60, 120, 3_599, 3_600, 7_200, 86_400];
/// Days of 2026 on which money is spent: on both sides of the ends of weeks and months. The weeks from 28 September and
/// from 26 October lie in two months.
const DAYS: [(u32, u32); 9] =
    [(9, 27), (9, 28), (9, 30), (10, 1), (10, 4), (10, 5), (10, 30), (10, 31), (11, 1)];
const PERIODS: [BudgetPeriod; 4] =
    [BudgetPeriod::Daily, BudgetPeriod::Weekly, BudgetPeriod::Monthly, BudgetPeriod::Total];

const NOW: DateTime<Utc> = DateTime::UNIX_EPOCH;

/// Requests with a key: one by each rule that allows or denies a single request, and series for the limits.
#[derive(Debug, Clone)]
struct Requests {
    scope: &'static str,
    permission: &'static str,
    model: &'static str,
    method: Method,
    path: &'static str,
    address: Option<IpAddr>,
    /// The owner of what is requested.
    owner: UserId,
    /// Minutes from the check of the ceiling to the request.
    minutes: i64,
    /// Ordered.
    seconds: Vec<u64>,
    /// Ordered days, and cents.
    spending: Vec<((u32, u32), u64)>,
}

fn requests() -> impl Strategy<Value = Requests> {
    let addresses: Vec<IpAddr> = ADDRESSES.iter().map(|it| it.parse().unwrap()).collect();
    let texts = (select(&SCOPES[..]), select(&PERMISSIONS[..]), select(&MODELS[..]));
    let endpoint = (select(METHODS.to_vec()), select(&PATHS[..]));
    let address = option::weighted(0.9, select(addresses));
    let seconds = prop::collection::vec(select(&SECONDS[..]), 0..8);
    let spending = prop::collection::vec((select(&DAYS[..]), 1..=3_u64), 0..8);
    let series = (seconds, spending);
    (texts, endpoint, address, 1..=2_i64, 0..=6_i64, series).prop_map(
        |((scope, permission, model), (method, path), address, owner, halves, series)| {
            let (mut seconds, mut spending) = series;
            seconds.sort_unstable();
            spending.sort_unstable();
            let (owner, minutes) = (owner.into(), halves * 30);
            Requests {
                scope,
                permission,
                model,
                method,
                path,
                address,
                owner,
                minutes,
                seconds,
                spending,
            }
        },
    )
}

impl Requests {
    /// Returns the rule by which `granted` allows a request that `maker` is denied.
    fn allowed_beyond(&self, maker: &KeyRecord, granted: &KeyRecord) -> Option<&'static str> {
        let mut by_request = self.decisions(maker).into_iter().zip(self.decisions(granted));
        let exceeded = by_request.find(|((_, held), (_, granted))| *granted && !held);
        let requests = admitted(granted, &self.seconds);
        let spent = affordable(granted.budget, &self.spending);
        exceeded
            .map(|((rule, _), _)| rule)
            .or((admitted(maker, &requests) != requests).then_some("rate limits"))
            .or((affordable(maker.budget, &spent) != spent).then_some("budget"))
    }

    /// Returns whether each rule allows the request.
    fn decisions(&self, key: &KeyRecord) -> [(&'static str, bool); 7] {
        let at = NOW + TimeDelta::minutes(self.minutes);
        let endpoint =
            allowed(&key.allowed_endpoints, |rule| rule.matches(&self.method, self.path));
        // A key with a list is denied where the address is unknown.
        let address = allowed(&key.allowed_ips, |network| {
            self.address.is_some_and(|address| network.contains(address))
        });
        [
            ("validity", validity(key, at).is_ok()),
            ("owner", key.user.id == self.owner),
            ("scopes", key.scopes.iter().any(|held| grants(held, self.scope))),
            ("permissions", key.permissions.iter().any(|held| held == self.permission)),
            ("models", allowed(&key.allowed_models, |model| model == self.model)),
            ("endpoints", endpoint),
            ("networks", address),
        ]
    }
}

/// Returns those of the requests that are within the rate limits of a new key.
fn admitted(key: &KeyRecord, seconds: &[u64]) -> Vec<u64> {
    let mut passed: Vec<u64> = Vec::new();
    for &second in seconds {
        let has_room = RatePeriod::ALL.into_iter().all(|period| {
            let window = |second: u64| second / period.seconds();
            let used = passed.iter().filter(|&&it| window(it) == window(second)).count();
            period.limit(&key.rate_limits).is_none_or(|limit| (used as u64) < limit)
        });
        if key.is_unlimited || has_room {
            passed.push(second);
        }
    }
    passed
}

/// Returns those of the amounts that the budget of a new key has room for.
fn affordable(budget: Option<Budget>, spending: &[((u32, u32), u64)]) -> Vec<((u32, u32), u64)> {
    let Some(budget) = budget else { return spending.to_vec() };
    let period = |(month, day)| {
        let day = chrono::NaiveDate::from_ymd_opt(2026, month, day).unwrap();
        budget.period.days(day.and_hms_opt(12, 0, 0).unwrap().and_utc().into())
    };
    let mut paid: Vec<((u32, u32), u64)> = Vec::new();
    for &(day, cents) in spending {
        let in_period = paid.iter().filter(|(other, _)| period(*other) == period(day));
        let spent: u64 = in_period.map(|(_, cents)| cents).sum();
        if spent + cents <= budget.limit_cents {
            paid.push((day, cents));
        }
    }
    paid
}

/// A change of a record in one field.
#[derive(Debug, Clone)]
enum Edit {
    IsActive(bool),
    OwnerIsActive(bool),
    Owner(UserId),
    Scopes(Vec<&'static str>),
    Permissions(Vec<&'static str>),
    Models(Vec<&'static str>),
    Endpoints(Vec<EndpointRule>),
    Networks(Vec<AllowedNetwork>),
    RateLimits(RateLimits),
    Unlimited(bool),
    Budget(Option<Budget>),
    ExpiresAt(Option<DateTime<Utc>>),
    NotBefore(Option<DateTime<Utc>>),
}

impl Edit {
    fn apply(self, record: &mut KeyRecord) {
        let texts = |list: Vec<&str>| list.into_iter().map(str::to_owned).collect();
        match self {
            Self::IsActive(is_set) => record.is_active = is_set,
            Self::OwnerIsActive(is_set) => record.user.is_active = is_set,
            Self::Owner(id) => record.user.id = id,
            Self::Scopes(list) => record.scopes = texts(list),
            Self::Permissions(list) => record.permissions = texts(list),
            Self::Models(list) => record.allowed_models = texts(list),
            Self::Endpoints(list) => record.allowed_endpoints = list,
            Self::Networks(list) => record.allowed_ips = list,
            Self::RateLimits(limits) => record.rate_limits = limits,
            Self::Unlimited(is_set) => record.is_unlimited = is_set,
            Self::Budget(budget) => record.budget = budget,
            Self::ExpiresAt(time) => record.expires_at = time,
            Self::NotBefore(time) => record.not_before = time,
        }
    }
}

fn some_of<T: Clone + fmt::Debug + 'static>(all: &[T]) -> impl Strategy<Value = Vec<T>> + use<T> {
    subsequence(all.to_vec(), 0..=2)
}

fn edit() -> impl Strategy<Value = Edit> {
    let rules: Vec<EndpointRule> = RULES.iter().map(|it| it.parse().unwrap()).collect();
    let networks: Vec<AllowedNetwork> = NETWORKS.iter().map(|it| it.parse().unwrap()).collect();
    let limit = || option::of(0..=3_u64);
    let limits = (limit(), limit(), limit()).prop_map(|(per_minute, per_hour, per_day)| {
        Edit::RateLimits(RateLimits { per_minute, per_hour, per_day })
    });
    let budget = (0..=4_u64, select(&PERIODS[..]))
        .prop_map(|(limit_cents, period)| Budget { limit_cents, period });
    let time = || option::of((-1..=3_i64).prop_map(|hours| NOW + TimeDelta::hours(hours)));
    prop_oneof![
        1 => any::<bool>().prop_map(Edit::IsActive),
        1 => any::<bool>().prop_map(Edit::OwnerIsActive),
        1 => (1..=2_i64).prop_map(|id| Edit::Owner(id.into())),
        3 => some_of(&SCOPES).prop_map(Edit::Scopes),
        2 => some_of(&PERMISSIONS).prop_map(Edit::Permissions),
        2 => some_of(&MODELS).prop_map(Edit::Models),
        4 => some_of(&rules).prop_map(Edit::Endpoints),
        4 => some_of(&networks).prop_map(Edit::Networks),
        3 => limits,
        2 => any::<bool>().prop_map(Edit::Unlimited),
        4 => option::weighted(0.9, budget).prop_map(Edit::Budget),
        3 => time().prop_map(Edit::ExpiresAt),
        3 => time().prop_map(Edit::NotBefore),
    ]
}

/// A maker with rules in many fields, and the edits that make the granted record of it.
fn pairs() -> impl Strategy<Value = (KeyRecord, KeyRecord)> {
    let edits = |count| prop::collection::vec(edit(), count);
    (edits(0..8), edits(0..4)).prop_map(|(of_maker, of_granted)| {
        let mut maker = KeyRecord::new(1, "a", User::new(1, ""));
        of_maker.into_iter().for_each(|edit| edit.apply(&mut maker));
        let mut granted = maker.clone();
        of_granted.into_iter().for_each(|edit| edit.apply(&mut granted));
        (maker, granted)
    })
}

fn config(cases: u32) -> Config {
    let default = Config::default();
    let cases = if std::env::var_os("PROPTEST_CASES").is_some() { default.cases } else { cases };
    Config { cases, failure_persistence: None, ..default }
}

#[test]
fn nothing_is_granted_that_the_maker_is_denied() {
    let config = config(CASES);
    let cases = config.cases;
    let (within, exceeded) = (Cell::new(0_u32), RefCell::new(BTreeMap::new()));
    // How often the maker was denied a request that an exceeding key is allowed, by rule.
    let violations = RefCell::new(BTreeMap::new());
    let count = |map: &RefCell<BTreeMap<&'static str, u32>>, name| {
        *map.borrow_mut().entry(name).or_default() += 1;
    };
    let outcome = TestRunner::new(config).run(&(pairs(), requests()), |(pair, requests)| {
        let (maker, granted) = &pair;
        let beyond = requests.allowed_beyond(maker, granted);
        match (ceiling(maker, granted, GrantableOwners::Own, NOW), beyond) {
            (Ok(()), None) => within.set(within.get() + 1),
            (Ok(()), Some(rule)) => {
                return Err(TestCaseError::fail(format!(
                    "{rule}: granted, but denied to the maker"
                )));
            }
            (Err(field), beyond) => {
                count(&exceeded, field.as_str());
                if let Some(rule) = beyond {
                    count(&violations, rule);
                }
            }
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    let (within, exceeded, violations) =
        (within.get(), exceeded.into_inner(), violations.into_inner());
    println!(
        "{within} of {cases} within the ceiling, exceeded: {exceeded:?}, violations: {violations:?}"
    );
    if cases < CASES {
        return;
    }
    // Both outcomes are common, for each field and each rule.
    let common = cases / 10;
    assert!((common..cases - common).contains(&within), "{within} of {cases}");
    let fields = exceeded.values().filter(|&&count| count > cases / 1000);
    assert_eq!(fields.count(), 12, "{exceeded:?}");
    let rules = violations.values().filter(|&&count| count > cases / 2000);
    assert_eq!(rules.count(), 9, "{violations:?}");
}

#[test]
fn a_valid_key_may_be_granted_with_what_its_maker_has_and_grants_no_more() {
    let steps = (pairs(), prop::collection::vec(edit(), 0..3));
    let (granted_twice, denied) = (Cell::new(0_u32), Cell::new(0_u32));
    let config = config(CASES / 5);
    let outcome = TestRunner::new(config).run(&steps, |((maker, granted), edits)| {
        let mut last = granted.clone();
        edits.into_iter().for_each(|edit| edit.apply(&mut last));
        let check = |maker, granted| ceiling(maker, granted, GrantableOwners::Own, NOW);
        // A maker that is not valid yet grants keys that start no earlier.
        let grants_anything =
            matches!(validity(&maker, NOW), Ok(()) | Err(InvalidKey::NotYetValid));
        prop_assert_eq!(check(&maker, &maker).is_ok(), grants_anything);
        if check(&maker, &granted).is_ok() && check(&granted, &last).is_ok() {
            prop_assert_eq!(check(&maker, &last), Ok(()));
            granted_twice.set(granted_twice.get() + 1);
        } else {
            denied.set(denied.get() + 1);
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    assert!(granted_twice.get() > 100 && denied.get() > 100);
}
