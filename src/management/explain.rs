//! Why a request with a key would be allowed or denied: [`Explanation`].

use std::net::IpAddr;

use chrono::{DateTime, NaiveDate, SecondsFormat, Utc};
use http::Method;

use super::{error::ManageError, key_manager::KeyManager};
use crate::{
    context::AuthContext,
    denial::{BudgetExceeded, Denial, Forbidden},
    policy,
    record::{Budget, KeyId, KeyRecord, RatePeriod, Secret, User},
    store::KeyRepository,
};

/// The request to explain. What is not set is not checked, except for the address: a key with networks is denied
/// without one.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ExplainedRequest {
    /// Method and path.
    pub endpoint: Option<(Method, String)>,
    /// Address of the client.
    pub address: Option<IpAddr>,
    /// The model that the handler requires.
    pub model: Option<String>,
    /// The scopes that the handler requires.
    pub scopes: Vec<String>,
    /// Time of the request; `None` means now.
    pub at: Option<DateTime<Utc>>,
}

/// The rules of a key, each with its outcome for a request.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Explanation {
    /// The key.
    pub key: KeyRecord,
    /// Time for which the rules were evaluated.
    pub at: DateTime<Utc>,
    /// The rules, in the order in which a request meets them.
    pub rules: Vec<RuleOutcome>,
}

/// The outcome of one rule.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RuleOutcome {
    /// Name of the rule.
    pub rule: &'static str,
    /// Why the rule denies the request; `None` if it does not.
    pub denial: Option<Denial>,
    /// The values that the rule compared.
    pub detail: String,
}

impl Explanation {
    /// Returns whether no rule denies the request. Rate limits are counted on the nodes or in Redis, and are not checked.
    pub fn is_allowed(&self) -> bool {
        self.denial().is_none()
    }

    /// Returns the denial that the request would get.
    pub fn denial(&self) -> Option<&Denial> {
        self.rules.iter().find_map(|rule| rule.denial.as_ref())
    }
}

impl<R: KeyRepository> KeyManager<R> {
    /// Evaluates each rule of a key for a request, with the code that decides about requests.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Store`.
    pub async fn explain(
        &self,
        id: &KeyId,
        request: &ExplainedRequest,
    ) -> Result<Explanation, ManageError> {
        let key = self.find(id).await?;
        let at = request.at.unwrap_or_else(|| self.now());
        let mut rules = validity_rules(&key, at);
        rules.extend(previous_secret_rule(&key, at));
        rules.extend(request_rules(&key, request));
        rules.extend(limit_rules(&key));
        if let Some(budget) = key.budget {
            let spent = self.spent(&key, budget, at).await?;
            rules.push(budget_rule(budget, spent, at));
        } else {
            rules.push(allowed("budget", "the key has no budget"));
        }
        Ok(Explanation { key, at, rules })
    }

    /// Returns the cost of the budget's period that contains `at`, in micro-cents.
    async fn spent(
        &self,
        key: &KeyRecord,
        budget: Budget,
        at: DateTime<Utc>,
    ) -> Result<i64, ManageError> {
        let days = budget.period.days(at.into());
        let (from, to) = days.unwrap_or((NaiveDate::MIN, NaiveDate::MAX));
        // The end is the first day after the period.
        let last = days.and_then(|_| to.pred_opt()).unwrap_or(to);
        let usage = match days {
            // The totals contain the cost of each day, and costs from before the usage was counted by day.
            None => return Ok(key.usage.cost_micro_cents),
            Some(_) => self.usage(&key.id, from, last).await?,
        };
        Ok(usage.iter().map(|day| day.cost_micro_cents).fold(0, i64::saturating_add))
    }
}

fn allowed(rule: &'static str, detail: impl Into<String>) -> RuleOutcome {
    RuleOutcome { rule, denial: None, detail: detail.into() }
}

/// Evaluates the validity rule for each of its conditions alone: on a record that is valid but for this condition.
fn validity_rules(key: &KeyRecord, at: DateTime<Utc>) -> Vec<RuleOutcome> {
    let outcome = |rule, detail, set: fn(&mut KeyRecord, &KeyRecord)| {
        let mut record = KeyRecord::new(0, "", User::new(0, ""));
        set(&mut record, key);
        let denial = policy::validity(&record, Secret::Current, at).err().map(Denial::from);
        RuleOutcome { rule, denial, detail }
    };
    let revoked = match (key.is_active, key.revoked_at) {
        (true, _) => "the key is active".to_owned(),
        (false, None) => "the key was revoked".to_owned(),
        (false, Some(time)) => {
            let by = key.revoked_by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
            let reason = key.revoke_reason.as_ref().map(|it| format!(": {it}")).unwrap_or_default();
            format!("the key was revoked at {}{by}{reason}", text(time))
        }
    };
    let state = if key.user.is_active { "is active" } else { "is not active" };
    let expiry = key.expires_at.map_or("never".to_owned(), text);
    let start = key.not_before.map_or("no start".to_owned(), text);
    vec![
        outcome("revoked", revoked, |record, key| record.is_active = key.is_active),
        outcome("owner", format!("{} {state}", key.user.email), |record, key| {
            record.user.clone_from(&key.user);
        }),
        outcome("expires_at", expiry, |record, key| record.expires_at = key.expires_at),
        outcome("not_before", start, |record, key| record.not_before = key.not_before),
    ]
}

/// Returns whether the previous secret of a rotated key is accepted. It denies nothing, because the request may have either
/// secret.
fn previous_secret_rule(key: &KeyRecord, at: DateTime<Utc>) -> Option<RuleOutcome> {
    let grace = key.grace.as_ref()?;
    let mut record = KeyRecord::new(0, "", User::new(0, ""));
    record.grace = Some(grace.clone());
    let detail = match policy::validity(&record, Secret::Previous, at) {
        Ok(()) => format!("the previous secret is accepted until {}", text(grace.ends_at)),
        Err(_) => format!("the previous secret is rejected since {}", text(grace.ends_at)),
    };
    Some(allowed("rotation", detail))
}

fn request_rules(key: &KeyRecord, request: &ExplainedRequest) -> Vec<RuleOutcome> {
    let caller = AuthContext::unverified(key.clone());
    let mut rules = Vec::new();
    let mut add = |rule, is_allowed: bool, denied: Forbidden, detail: String| {
        let denial = (!is_allowed).then(|| denied.into());
        rules.push(RuleOutcome { rule, denial, detail });
    };
    let networks = list(&key.allowed_ips, "every network");
    match request.address {
        Some(address) => {
            let is_allowed = caller.can_access_from(address);
            add(
                "network",
                is_allowed,
                Forbidden::Address,
                format!("{address}; allowed: {networks}"),
            );
        }
        None => {
            let detail = format!("the address is unknown; allowed: {networks}");
            add("network", key.allowed_ips.is_empty(), Forbidden::Address, detail);
        }
    }
    if let Some((method, path)) = &request.endpoint {
        // The query is not part of the path.
        let path = path.split('?').next().unwrap_or_default();
        let endpoints = list(&key.allowed_endpoints, "every endpoint");
        let is_allowed = caller.can_access_endpoint(method, path);
        let detail = format!("{method} {path}; allowed: {endpoints}");
        add("endpoint", is_allowed, Forbidden::Endpoint, detail);
    }
    if let Some(model) = &request.model {
        let models = list(&key.allowed_models, "every model");
        let denied = Forbidden::Model(model.clone());
        add("model", caller.can_access_model(model), denied, format!("{model}; allowed: {models}"));
    }
    for scope in &request.scopes {
        let scopes = list(&key.scopes, "none");
        let denied = Forbidden::Scope(scope.clone());
        add("scope", caller.has_scope(scope), denied, format!("{scope}; the key has: {scopes}"));
    }
    rules
}

/// Names the limits. The counters are on the nodes or in Redis.
fn limit_rules(key: &KeyRecord) -> Vec<RuleOutcome> {
    if key.is_unlimited {
        return vec![allowed("rate_limit", "rate limits do not apply to the key")];
    }
    let limits = RatePeriod::ALL.into_iter().filter_map(|period| {
        let limit = period.limit(&key.rate_limits)?;
        let detail = format!("at most {limit} per {}; counted by the nodes", period.name());
        // No counter is needed to deny every request.
        let denial = (limit == 0).then(|| {
            let quota = crate::record::Quota::new(false, []);
            Denial::RateLimited(Box::new(quota))
        });
        Some(RuleOutcome { rule: "rate_limit", denial, detail })
    });
    let limits: Vec<_> = limits.collect();
    if limits.is_empty() {
        return vec![allowed("rate_limit", "the key has no rate limit of its own")];
    }
    limits
}

fn budget_rule(budget: Budget, spent: i64, at: DateTime<Utc>) -> RuleOutcome {
    let is_spent = spent >= budget.micro_cents();
    let resets_at = budget.period.end(at.into());
    let denial = is_spent.then(|| {
        let wait = resets_at.and_then(|end| end.duration_since(at.into()).ok());
        Denial::BudgetExceeded(BudgetExceeded { resets_at, wait })
    });
    let until = resets_at.map(|end| format!(" until {}", text(end.into()))).unwrap_or_default();
    let detail = format!(
        "{} of {} spent ({}{until})",
        money(spent),
        money(budget.micro_cents()),
        budget.period.name()
    );
    RuleOutcome { rule: "budget", denial, detail }
}

/// Formats micro-cents in the main unit of the currency.
fn money(micro_cents: i64) -> String {
    let cents = micro_cents / 1_000_000;
    format!(
        "{}{}.{:02}",
        if micro_cents < 0 { "-" } else { "" },
        (cents / 100).abs(),
        (cents % 100).abs()
    )
}

fn list<T: ToString>(entries: &[T], empty: &str) -> String {
    if entries.is_empty() {
        return empty.to_owned();
    }
    entries.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

fn text(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::MemoryStore,
        management::{NewKey, Rotation},
        record::BudgetPeriod,
    };

    #[tokio::test]
    async fn each_rule_is_listed_with_its_outcome() {
        let manager = KeyManager::new(MemoryStore::new());
        let user = manager.create_user("ada@example.com", "user").await.unwrap();
        let new = NewKey::new(user.id, "laptop")
            .scopes(["chat:*"])
            .allowed_endpoints(["POST /v1/*".parse().unwrap()])
            .allowed_ips(["10.0.0.0/8".parse().unwrap()])
            .budget(Budget { limit_cents: 2000, period: BudgetPeriod::Monthly });
        let id = manager.issue(new).await.unwrap().record().id.clone();
        let mut request = ExplainedRequest {
            endpoint: Some((Method::POST, "/v1/chat?stream=1".to_owned())),
            address: Some("10.1.2.3".parse().unwrap()),
            scopes: vec!["chat:write".to_owned()],
            ..ExplainedRequest::default()
        };
        let shown = manager.explain(&id, &request).await.unwrap();
        assert!(shown.is_allowed(), "{:?}", shown.rules);
        let budget = shown.rules.last().unwrap();
        assert!(budget.detail.starts_with("0.00 of 20.00 spent (monthly until "), "{budget:?}");

        request.address = None;
        request.endpoint = Some((Method::GET, "/v1/chat".to_owned()));
        let shown = manager.explain(&id, &request).await.unwrap();
        let denied: Vec<_> =
            shown.rules.iter().filter(|it| it.denial.is_some()).map(|it| it.rule).collect();
        assert_eq!(denied, ["network", "endpoint"]);

        manager.rotate(&id, Rotation::default()).await.unwrap();
        let detail = async |request: &ExplainedRequest| {
            let shown = manager.explain(&id, request).await.unwrap();
            let rule = shown.rules.into_iter().find(|it| it.rule == "rotation").unwrap();
            assert!(rule.denial.is_none());
            rule.detail
        };
        assert!(detail(&request).await.contains("accepted until"));
        request.at = Some(Utc::now() + chrono::TimeDelta::days(2));
        assert!(detail(&request).await.contains("rejected since"));

        request.at = None;
        manager.revoke(&id).await.unwrap();
        let shown = manager.explain(&id, &request).await.unwrap();
        assert_eq!(shown.denial().unwrap().to_string(), "the API key was revoked");
    }
}
