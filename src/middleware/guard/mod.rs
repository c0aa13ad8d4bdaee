//! Layers behind the auth layer, each of which enforces one rule.

mod budget;
mod rate_limit;
mod require;
mod service;

pub use self::{
    budget::BudgetLayer,
    rate_limit::RateLimitLayer,
    require::RequireLayer,
    service::{Guard, GuardFuture},
};
