//! What is stored of a key and its owner, and the values of its rules.
//!
//! [`KeyRecord`] is the data of a key without its hash, and [`User`] its owner. Handlers read both from the
//! [`AuthContext`](crate::AuthContext); a store of your own creates them. [`EndpointRule`], [`AllowedNetwork`],
//! [`RateLimits`] and [`Budget`] are the values of the rules, for [`NewKey`](crate::NewKey) as well.
//!
//! ```
//! use tower_api_key::record::{Budget, BudgetPeriod, KeyRecord, RateLimits, User};
//!
//! # fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let mut record = KeyRecord::new(1, "a1b2c3d4e5", User::new(7, "ada@example.com"));
//! record.scopes = vec!["chat:*".into()];
//! record.allowed_endpoints = vec!["POST /v1/*".parse()?];
//! record.allowed_ips = vec!["192.0.2.0/24".parse()?];
//! record.rate_limits = RateLimits::default().per_minute(60);
//! record.budget = Some(Budget { limit_cents: 500, period: BudgetPeriod::Monthly });
//! # Ok(())
//! # }
//! ```
//!
//! # Scopes
//!
//! A scope of a key may end in a wildcard: `chat:*` grants `chat:write`, and `*` everything.
//! [`AuthContext::has_scope`](crate::AuthContext::has_scope) defines it exactly. Permissions have no wildcards.

mod as_text;
mod endpoint_rule;
mod key_record;
mod network;
mod quota;

pub(crate) use self::network::canonical;
pub use self::{
    endpoint_rule::{EndpointRule, EndpointRuleError},
    key_record::{
        Budget, BudgetPeriod, GracePeriod, KeyId, KeyRecord, RateLimits, Revision, Revisions,
        Secret, UsageTotals, User, UserId,
    },
    network::{AllowedNetwork, NetworkError},
    quota::{Quota, RatePeriod, RateWindow},
};
