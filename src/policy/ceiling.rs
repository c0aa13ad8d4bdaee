//! The ceiling rule: a key grants at most what it has.

#[cfg(test)]
mod property;
#[cfg(test)]
mod tests;

use std::fmt;

use chrono::{DateTime, Utc};

use super::scope::grants;
use crate::record::{Budget, BudgetPeriod, KeyRecord, RatePeriod};

/// Owners of the keys that a maker may grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GrantableOwners {
    /// The owner of the maker.
    Own,
    /// Every owner, for administrators.
    Any,
}

/// Returns the first field in which `granted` exceeds what the key `maker` may grant at `now`.
///
/// If the result is `Ok`, every set of requests from `now` on that `granted` allows would also be allowed to `maker`. The
/// reverse does not hold: each rule of `granted` is compared with single rules of `maker`, so that two networks of
/// `maker` do not cover one that is as large as both. Limits are compared with limits. The rule neither subtracts what
/// `maker` has used nor adds up the keys that it has granted.
///
/// | field | within the ceiling if |
/// |---|---|
/// | the maker itself | it and its owner are active, and it has not expired |
/// | owner | it has the id of the maker's owner, or `owners` is `Any` |
/// | scopes | each is granted by a scope of the maker; `a:*` by `a:*` or `*` |
/// | permissions | each is a permission of the maker |
/// | models, endpoints, networks | each is covered by one of the maker's. An empty list allows everything, and is within an empty list only |
/// | `is_unlimited` | it is not set, or the maker is unlimited |
/// | rate limits | the limit of each window is at most the maker's, or the maker is unlimited |
/// | budget | the limit is at most the maker's, and each period of the maker lies within one of the granted key |
/// | expiry | it is at most the maker's |
/// | start | it is at least the maker's, or the maker's is not after `now` |
///
/// `None` exceeds every value of a rate limit, a budget, an expiry and a start.
pub(crate) fn ceiling(
    maker: &KeyRecord,
    granted: &KeyRecord,
    owners: GrantableOwners,
    now: DateTime<Utc>,
) -> Result<(), CeilingField> {
    use CeilingField as Field;
    let is_active = maker.is_active && maker.user.is_active;
    let is_expired = maker.expires_at.is_some_and(|expiry| now >= expiry);
    let is_own = maker.user.id == granted.user.id;
    let checks = [
        (Field::IsActive, is_active),
        (Field::ExpiresAt, !is_expired),
        (Field::Owner, is_own || owners == GrantableOwners::Any),
        (Field::Scopes, each(&granted.scopes, &maker.scopes, |held, it| grants(held, it))),
        (Field::Permissions, each(&granted.permissions, &maker.permissions, String::eq)),
        (Field::Models, listed(&granted.allowed_models, &maker.allowed_models, String::eq)),
        (
            Field::Endpoints,
            listed(&granted.allowed_endpoints, &maker.allowed_endpoints, |held, it| {
                held.covers(it)
            }),
        ),
        (
            Field::Networks,
            listed(&granted.allowed_ips, &maker.allowed_ips, |held, it| held.covers(it)),
        ),
        (Field::Unlimited, maker.is_unlimited || !granted.is_unlimited),
        (Field::RateLimits, maker.is_unlimited || has_lower_limits(granted, maker)),
        (Field::Budget, has_lower_budget(granted.budget, maker.budget)),
        (Field::ExpiresAt, at_most(granted.expires_at, maker.expires_at)),
        (Field::NotBefore, starts_later(granted.not_before, maker.not_before, now)),
    ];
    let exceeded = checks.into_iter().find(|(_, is_within)| !is_within);
    exceeded.map_or(Ok(()), |(field, _)| Err(field))
}

/// Returns whether each granted value is covered by one of the held values.
fn each<T>(granted: &[T], held: &[T], covers: impl Fn(&T, &T) -> bool) -> bool {
    granted.iter().all(|it| held.iter().any(|held| covers(held, it)))
}

/// Returns whether a granted allow-list is covered by the held one. An empty list allows everything.
fn listed<T>(granted: &[T], held: &[T], covers: impl Fn(&T, &T) -> bool) -> bool {
    held.is_empty() || (!granted.is_empty() && each(granted, held, covers))
}

/// Returns whether a granted limit is at most the held one. `None` means unlimited.
fn at_most<T: PartialOrd>(granted: Option<T>, held: Option<T>) -> bool {
    held.is_none_or(|most| granted.is_some_and(|it| it <= most))
}

/// Compares each window with the same window alone. A limit that follows from that of another window is not used.
fn has_lower_limits(granted: &KeyRecord, maker: &KeyRecord) -> bool {
    RatePeriod::ALL
        .into_iter()
        .all(|period| at_most(period.limit(&granted.rate_limits), period.limit(&maker.rate_limits)))
}

fn has_lower_budget(granted: Option<Budget>, held: Option<Budget>) -> bool {
    held.is_none_or(|held| {
        granted.is_some_and(|it| {
            lies_within(held.period, it.period) && it.limit_cents <= held.limit_cents
        })
    })
}

/// Returns whether each period of the kind `inner` lies within one period of the kind `outer`. A limit for the longer
/// period then limits the shorter one, too. A week may lie in two months, so that a limit per month allows twice its
/// amount in a week.
fn lies_within(inner: BudgetPeriod, outer: BudgetPeriod) -> bool {
    inner == BudgetPeriod::Daily || outer == BudgetPeriod::Total || inner == outer
}

/// A start that has passed no longer restricts the maker.
fn starts_later(
    granted: Option<DateTime<Utc>>,
    held: Option<DateTime<Utc>>,
    now: DateTime<Utc>,
) -> bool {
    let held = held.filter(|&start| start > now);
    held.is_none_or(|least| granted.is_some_and(|it| it >= least))
}

/// The field of a key in which it exceeds what the key of its maker may grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CeilingField {
    /// The maker's key, or its owner, is not active, and grants nothing.
    IsActive,
    /// The owner is another user.
    Owner,
    /// A scope is not granted by the maker's scopes.
    Scopes,
    /// The maker does not have a permission.
    Permissions,
    /// A model is not in the maker's list, or the new list is empty.
    Models,
    /// An endpoint rule is not covered by one of the maker's, or the new list is empty.
    Endpoints,
    /// A network is not contained in one of the maker's, or the new list is empty.
    Networks,
    /// The rate limit of a window is higher than the maker's.
    RateLimits,
    /// The key is unlimited, and the maker's is not.
    Unlimited,
    /// The budget is larger than the maker's, or is for a period that does not imply the maker's.
    Budget,
    /// The key expires later than the maker's, or the maker's has expired.
    ExpiresAt,
    /// The key is valid before the maker's is.
    NotBefore,
}

impl CeilingField {
    /// Returns the name of the field: of its column, or of the setting if it has several columns.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::IsActive => "is_active",
            Self::Owner => "user_id",
            Self::Scopes => "scopes",
            Self::Permissions => "permissions",
            Self::Models => "allowed_models",
            Self::Endpoints => "allowed_endpoints",
            Self::Networks => "allowed_ips",
            Self::RateLimits => "rate_limits",
            Self::Unlimited => "is_unlimited",
            Self::Budget => "budget",
            Self::ExpiresAt => "expires_at",
            Self::NotBefore => "not_before",
        }
    }
}

impl fmt::Display for CeilingField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
