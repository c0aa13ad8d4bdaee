//! The stored data of a key and its owner, and the values of its rules.

mod as_text;
mod endpoint_rule;
mod key_record;
mod network;
mod quota;

pub(crate) use self::network::canonical;
pub use self::{
    endpoint_rule::{EndpointRule, EndpointRuleError},
    key_record::{
        Budget, BudgetPeriod, KeyId, KeyRecord, RateLimits, Revision, Revisions, UsageTotals, User,
        UserId,
    },
    network::{AllowedNetwork, NetworkError},
    quota::{Quota, RatePeriod, RateWindow},
};
