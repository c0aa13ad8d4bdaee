use super::*;
use crate::record::{RateLimits, User};

const NOW: DateTime<Utc> = DateTime::UNIX_EPOCH;

fn hours(hours: i64) -> DateTime<Utc> {
    NOW + chrono::TimeDelta::hours(hours)
}

fn record() -> KeyRecord {
    KeyRecord::new(1, "a", User::new(1, "ada@example.com"))
}

fn with(set: impl FnOnce(&mut KeyRecord)) -> KeyRecord {
    let mut record = record();
    set(&mut record);
    record
}

fn check(maker: &KeyRecord, granted: &KeyRecord) -> Result<(), CeilingField> {
    ceiling(maker, granted, GrantableOwners::Own, NOW)
}

/// Checks rows of what the maker has, what is granted, and whether it is within the ceiling.
fn table<T: Copy + fmt::Debug>(
    field: CeilingField,
    set: impl Fn(&mut KeyRecord, T),
    rows: &[(T, T, bool)],
) {
    for &(held, granted, is_within) in rows {
        let [maker, new] = [held, granted].map(|value| with(|record| set(record, value)));
        let expected = if is_within { Ok(()) } else { Err(field) };
        assert_eq!(check(&maker, &new), expected, "{field}: {held:?} grants {granted:?}");
    }
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}

type List = &'static [&'static str];

#[test]
fn scopes_are_granted_by_scopes_with_their_wildcards() {
    let rows: &[(List, List, bool)] = &[
        (&[], &[], true),
        (&[], &["a"], false),
        (&["a", "b"], &["b"], true),
        (&["a:*"], &["a:x", "a:x:y"], true),
        (&["a:*"], &["a:*", "a:x:*"], true),
        (&["a:*"], &["a"], false),
        (&["a:*"], &["*"], false),
        (&["a:x"], &["a:*"], false),
        (&["a:x:*"], &["a:*"], false),
        (&["*"], &["*", "a:*", "b"], true),
        // Not a wildcard.
        (&["a*"], &["ab"], false),
        (&["a:x", "b"], &["a:x", "c"], false),
    ];
    table(CeilingField::Scopes, |record, list| record.scopes = texts(list), rows);
}

#[test]
fn permissions_are_a_subset() {
    let rows: &[(List, List, bool)] = &[
        (&["read", "write"], &["read"], true),
        (&["read"], &[], true),
        (&["read"], &["read", "write"], false),
        (&["*"], &["read"], false),
        (&[], &["read"], false),
    ];
    table(CeilingField::Permissions, |record, list| record.permissions = texts(list), rows);
}

#[test]
fn an_empty_list_of_models_is_within_an_empty_list_only() {
    let rows: &[(List, List, bool)] = &[
        (&[], &[], true),
        (&[], &["m"], true),
        (&["m", "n"], &["n"], true),
        (&["m"], &[], false),
        (&["m"], &["n"], false),
        (&["m-*"], &["m-1"], false),
    ];
    table(CeilingField::Models, |record, list| record.allowed_models = texts(list), rows);
}

#[test]
fn each_endpoint_rule_is_covered_by_one_rule() {
    let rows: &[(List, List, bool)] = &[
        (&[], &[], true),
        (&[], &["*"], true),
        // An empty list also allows ambiguous paths.
        (&["*"], &[], false),
        (&["*"], &["*", "/*", "/a", "GET /a/*"], true),
        (&["/*"], &["/*", "/", "/a/*"], true),
        // `OPTIONS *`.
        (&["/*"], &["*"], false),
        (&["/a/*"], &["/a/x", "/a/b/*", "/a/*", "/a/"], true),
        (&["/a/*"], &["/a"], false),
        (&["/a/*"], &["/ab"], false),
        (&["/a/*"], &["/ab/*"], false),
        (&["/a/b/*"], &["/a/*"], false),
        (&["/a"], &["/a"], true),
        (&["/a"], &["/a/*"], false),
        (&["/a"], &["/a/"], false),
        (&["/a"], &["*"], false),
        (&["/a/"], &["/a/*"], false),
        (&["GET /a"], &["GET /a", "HEAD /a"], true),
        (&["HEAD /a"], &["GET /a"], false),
        (&["GET /a"], &["POST /a"], false),
        (&["GET /a"], &["/a"], false),
        (&["/a"], &["GET /a", "/a"], true),
        (&["GET *"], &["HEAD /a/*"], true),
        // Two rules together do not cover one.
        (&["GET /a", "POST /a"], &["/a"], false),
        (&["GET /a", "/b/*"], &["GET /a", "/b/c", "/c"], false),
    ];
    let rules = |list: List| list.iter().map(|rule| rule.parse().unwrap()).collect();
    table(CeilingField::Endpoints, |record, list| record.allowed_endpoints = rules(list), rows);
}

#[test]
fn each_network_is_contained_in_one_network() {
    let rows: &[(List, List, bool)] = &[
        (&[], &["::/0", "0.0.0.0/0"], true),
        (&["::/0", "0.0.0.0/0"], &[], false),
        (&["10.0.0.0/8"], &["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3"], true),
        (&["10.1.0.0/16"], &["10.0.0.0/8"], false),
        (&["10.0.0.0/8"], &["11.0.0.0/16"], false),
        (&["10.0.0.0/8"], &["::ffff:10.1.0.0/112"], true),
        (&["::ffff:10.0.0.0/104"], &["10.1.2.3"], true),
        (&["::ffff:0:0/96"], &["0.0.0.0/0"], true),
        (&["::/0"], &["2001:db8::/32"], true),
        // No v4 address is matched by `::/0`.
        (&["::/0"], &["0.0.0.0/0"], false),
        (&["::/0"], &["::ffff:10.1.2.3"], false),
        (&["0.0.0.0/0"], &["::/0"], false),
        (&["2001:db8::/48"], &["2001:db8::/32"], false),
        // Two networks together do not cover one.
        (&["10.0.0.0/9", "10.128.0.0/9"], &["10.0.0.0/8"], false),
    ];
    let networks = |list: List| list.iter().map(|it| it.parse().unwrap()).collect();
    table(CeilingField::Networks, |record, list| record.allowed_ips = networks(list), rows);
}

#[test]
fn the_rate_limit_of_each_window_is_at_most_the_makers() {
    let none = RateLimits::default();
    let rows = [
        (none, none.per_day(u64::MAX), true),
        (none.per_minute(5), none.per_minute(5), true),
        (none.per_minute(5), none.per_minute(6), false),
        (none.per_hour(5), none.per_hour(6), false),
        (none.per_day(5), none.per_day(6), false),
        (none.per_minute(5), none, false),
        // At most 24 a day, which is not computed.
        (none.per_day(24), none.per_hour(1), false),
        (none.per_minute(0), none.per_minute(0), true),
    ];
    table(CeilingField::RateLimits, |record, limits| record.rate_limits = limits, &rows);
}

#[test]
fn an_unlimited_key_is_granted_by_an_unlimited_key_only() {
    let rows =
        [(true, true, true), (true, false, true), (false, false, true), (false, true, false)];
    table(CeilingField::Unlimited, |record, is_set| record.is_unlimited = is_set, &rows);
    let maker = with(|it| {
        it.rate_limits = RateLimits::default().per_minute(1);
        it.is_unlimited = true;
    });
    assert_eq!(check(&maker, &record()), Ok(()), "its own limits do not apply to the maker");
}

#[test]
fn a_budget_is_within_one_whose_periods_lie_within_its_periods() {
    use BudgetPeriod::{Daily, Monthly, Total, Weekly};
    let budget = |limit_cents, period| Some(Budget { limit_cents, period });
    let set = |record: &mut KeyRecord, budget| record.budget = budget;
    let is_implied = |held, granted| {
        matches!((held, granted), (Daily, _) | (_, Total) | (Weekly, Weekly) | (Monthly, Monthly))
    };
    for held in [Daily, Weekly, Monthly, Total] {
        for granted in [Daily, Weekly, Monthly, Total] {
            let is_implied = is_implied(held, granted);
            let rows = [
                (budget(9, held), budget(9, granted), is_implied),
                (budget(9, held), budget(0, granted), is_implied),
                (budget(9, held), budget(10, granted), false),
            ];
            table(CeilingField::Budget, set, &rows);
        }
        let rows = [(None, budget(9, held), true), (budget(9, held), None, false)];
        table(CeilingField::Budget, set, &rows);
    }
}

#[test]
fn a_key_expires_no_later_than_its_maker() {
    let rows = [
        (None, Some(hours(9)), true),
        (None, None, true),
        (Some(hours(2)), Some(hours(2)), true),
        (Some(hours(2)), Some(hours(3)), false),
        (Some(hours(2)), None, false),
        // An expired key grants nothing.
        (Some(hours(0)), Some(hours(0)), false),
        (Some(hours(-1)), Some(hours(-2)), false),
    ];
    table(CeilingField::ExpiresAt, |record, expiry| record.expires_at = expiry, &rows);
}

#[test]
fn a_key_starts_no_earlier_than_its_maker() {
    let rows = [
        (None, None, true),
        (None, Some(hours(-1)), true),
        (Some(hours(2)), Some(hours(2)), true),
        (Some(hours(2)), Some(hours(3)), true),
        (Some(hours(2)), Some(hours(1)), false),
        (Some(hours(2)), None, false),
        // The maker has started.
        (Some(hours(0)), None, true),
        (Some(hours(-1)), Some(hours(-2)), true),
    ];
    table(CeilingField::NotBefore, |record, start| record.not_before = start, &rows);
}

#[test]
fn an_inactive_maker_grants_nothing() {
    let revoked = with(|record| record.is_active = false);
    let of_a_leaver = with(|record| record.user.is_active = false);
    for maker in [revoked, of_a_leaver] {
        assert_eq!(check(&maker, &maker), Err(CeilingField::IsActive));
    }
}

#[test]
fn a_key_has_the_owner_of_its_maker_unless_an_administrator_grants_it() {
    let other = KeyRecord::new(2, "b", User::new(2, "bob@example.com"));
    assert_eq!(check(&record(), &other), Err(CeilingField::Owner));
    assert_eq!(ceiling(&record(), &other, GrantableOwners::Any, NOW), Ok(()));
    // A new key has the id of its owner alone.
    let new = KeyRecord::new(0, "", User::new(1, ""));
    assert_eq!(check(&record(), &new), Ok(()));
    let scoped = with(|record| record.scopes = texts(&["a"]));
    let result = ceiling(&other, &scoped, GrantableOwners::Any, NOW);
    assert_eq!(result, Err(CeilingField::Scopes), "the other fields are still compared");
}

#[test]
fn fields_have_the_names_of_columns() {
    assert_eq!(CeilingField::Networks.to_string(), "allowed_ips");
    assert_eq!(CeilingField::Owner.as_str(), "user_id");
}
