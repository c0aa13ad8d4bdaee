//! The property of the ceiling: what is granted allows no request that the maker is denied.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    net::IpAddr,
    slice::from_ref,
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
    record::{AllowedNetwork, EndpointRule, RateLimits, Secret, User, UserId},
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
const ADDRESSES: [&str; 10] = [
    "10.1.2.3",
    "10.1.9.9",
    "10.9.9.9",
    "192.0.2.1",
    "::ffff:10.1.2.3",
    "::fffe:1:1",
    "2001:db8::1",
    "2001:db8:1::1",
    "2001:db8::2",
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

/// Requests with a key, for the limits.
#[derive(Debug, Clone)]
struct Requests {
    /// Ordered.
    seconds: Vec<u64>,
    /// Ordered days, and cents.
    spending: Vec<((u32, u32), u64)>,
}

fn requests() -> impl Strategy<Value = Requests> {
    let seconds = prop::collection::vec(select(&SECONDS[..]), 0..8);
    let spending = prop::collection::vec((select(&DAYS[..]), 1..=2_u64), 0..12);
    (seconds, spending).prop_map(|(mut seconds, mut spending)| {
        seconds.sort_unstable();
        spending.sort_unstable();
        Requests { seconds, spending }
    })
}

/// What a single request is made of: every value of the alphabets.
struct Alphabet {
    addresses: Vec<Option<IpAddr>>,
    owners: [UserId; 2],
}

impl Alphabet {
    fn new() -> Self {
        let addresses = ADDRESSES.iter().map(|it| Some(it.parse().unwrap()));
        Self { addresses: addresses.chain([None]).collect(), owners: [1.into(), 2.into()] }
    }

    /// Returns the rule by which `granted` allows a request that `maker` is denied.
    fn allowed_beyond(&self, maker: &KeyRecord, granted: &KeyRecord) -> Option<&'static str> {
        let by_text = |all: &[&str], has: fn(&KeyRecord, &str) -> bool| {
            all.iter().any(|text| has(granted, text) && !has(maker, text))
        };
        let is_valid = |key: &KeyRecord, halves: i64| {
            validity(key, Secret::Current, NOW + TimeDelta::minutes(30 * halves)).is_ok()
        };
        let has_scope =
            |key: &KeyRecord, scope: &str| key.scopes.iter().any(|held| grants(held, scope));
        let has_permission =
            |key: &KeyRecord, name: &str| key.permissions.iter().any(|held| held == name);
        let has_model =
            |key: &KeyRecord, model: &str| allowed(&key.allowed_models, |it| it == model);
        let exceeded = [
            ("validity", (0..8).any(|at| is_valid(granted, at) && !is_valid(maker, at))),
            ("owner", self.owners.iter().any(|id| granted.user.id == *id && maker.user.id != *id)),
            ("scopes", by_text(&SCOPES, has_scope)),
            ("permissions", by_text(&PERMISSIONS, has_permission)),
            ("models", by_text(&MODELS, has_model)),
            (
                "endpoints",
                self.endpoint_beyond(&maker.allowed_endpoints, &granted.allowed_endpoints),
            ),
            ("networks", self.address_beyond(&maker.allowed_ips, &granted.allowed_ips)),
        ];
        exceeded.into_iter().find_map(|(rule, is_exceeded)| is_exceeded.then_some(rule))
    }

    fn endpoint_beyond(&self, held: &[EndpointRule], granted: &[EndpointRule]) -> bool {
        let allows =
            |list, method, path| allowed(list, |rule: &EndpointRule| rule.matches(method, path));
        let is_beyond = |method, path| allows(granted, method, path) && !allows(held, method, path);
        // Equal lists are frequent.
        held != granted
            && METHODS.iter().any(|method| PATHS.iter().any(|path| is_beyond(method, path)))
    }

    /// A key with a list is denied where the address is unknown.
    fn address_beyond(&self, held: &[AllowedNetwork], granted: &[AllowedNetwork]) -> bool {
        let allows = |list, address: Option<IpAddr>| {
            allowed(list, |network: &AllowedNetwork| address.is_some_and(|it| network.contains(it)))
        };
        self.addresses.iter().any(|&address| allows(granted, address) && !allows(held, address))
    }
}

impl Requests {
    /// Returns the limit within which `granted` allows requests that `maker` is denied.
    fn allowed_beyond(&self, maker: &KeyRecord, granted: &KeyRecord) -> Option<&'static str> {
        let requests = admitted(granted, &self.seconds);
        let spent = affordable(granted.budget, &self.spending);
        (admitted(maker, &requests) != requests).then_some("rate limits").or((affordable(
            maker.budget,
            &spent,
        ) != spent)
            .then_some("budget"))
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
    let (alphabet, config) = (Alphabet::new(), config(CASES));
    let cases = config.cases;
    let (within, exceeded) = (Cell::new(0_u32), RefCell::new(BTreeMap::new()));
    // How often the maker was denied a request that an exceeding key is allowed, by rule.
    let violations = RefCell::new(BTreeMap::new());
    let count = |map: &RefCell<BTreeMap<&'static str, u32>>, name| {
        *map.borrow_mut().entry(name).or_default() += 1;
    };
    let outcome = TestRunner::new(config).run(&(pairs(), requests()), |(pair, requests)| {
        let (maker, granted) = &pair;
        let beyond = alphabet.allowed_beyond(maker, granted);
        let beyond = beyond.or_else(|| requests.allowed_beyond(maker, granted));
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
            matches!(validity(&maker, Secret::Current, NOW), Ok(()) | Err(InvalidKey::NotYetValid));
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

/// Every pair of rules, networks and periods: neither more nor less is covered.
#[test]
fn a_rule_covers_exactly_those_that_allow_no_more() {
    let alphabet = Alphabet::new();
    let rules: Vec<EndpointRule> = RULES.iter().map(|it| it.parse().unwrap()).collect();
    for (held, granted) in pairs_of(&rules) {
        let is_beyond = alphabet.endpoint_beyond(from_ref(held), from_ref(granted));
        assert_eq!(held.covers(granted), !is_beyond, "{held} covers {granted}");
    }
    let networks: Vec<AllowedNetwork> = NETWORKS.iter().map(|it| it.parse().unwrap()).collect();
    for (held, granted) in pairs_of(&networks) {
        let is_beyond = alphabet.address_beyond(from_ref(held), from_ref(granted));
        assert_eq!(held.covers(granted), !is_beyond, "{held} covers {granted}");
    }
    let mut days = Vec::new();
    let first = chrono::NaiveDate::from_ymd_opt(2026, 1, 1).unwrap();
    days.extend(
        first.iter_days().take(800).map(|day| day.and_hms_opt(12, 0, 0).unwrap().and_utc()),
    );
    for (inner, outer) in pairs_of(&PERIODS) {
        let neighbours = || days.iter().zip(&days[1..]);
        let is_one = |period: &BudgetPeriod, (a, b): (&DateTime<Utc>, &DateTime<Utc>)| {
            period.days((*a).into()) == period.days((*b).into())
        };
        let lies_within_it = neighbours().all(|pair| !is_one(inner, pair) || is_one(outer, pair));
        assert_eq!(lies_within(*inner, *outer), lies_within_it, "{inner:?} in {outer:?}");
    }
}

fn pairs_of<T>(all: &[T]) -> impl Iterator<Item = (&T, &T)> {
    all.iter().flat_map(move |a| all.iter().map(move |b| (a, b)))
}
