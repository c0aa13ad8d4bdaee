//! How each kind of item is printed: [`Shown`].

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Value, json};
use tower_api_key::{
    AuthContext, chrono,
    clock::{Clock, SystemClock},
    record::{KeyRecord, RatePeriod, User},
    store::{AuditEntry, DailyUsage},
};

use crate::values::shown_budget;

/// An item that can be printed.
pub(crate) trait Shown {
    /// Header of a table.
    const HEADER: &'static [&'static str];

    /// Returns the id alone.
    fn id(&self) -> String;

    /// Returns the item for programs.
    fn json(&self) -> Value;

    /// Returns the row of a table.
    fn cells(&self) -> Vec<String>;

    /// Returns the names and values of all fields.
    fn details(&self) -> Vec<[String; 2]> {
        Self::HEADER
            .iter()
            .map(|name| (*name).to_owned())
            .zip(self.cells())
            .map(Into::into)
            .collect()
    }
}

/// Returns a key for programs: without its hashes, which a record does not have.
pub(crate) fn key_json(key: &KeyRecord) -> Value {
    serde_json::to_value(key).unwrap_or_default()
}

impl Shown for KeyRecord {
    const HEADER: &'static [&'static str] =
        &["ID", "NAME", "OWNER", "LOOKUP ID", "STATE", "SCOPES", "EXPIRES", "LAST USED"];

    fn id(&self) -> String {
        self.id.to_string()
    }

    fn json(&self) -> Value {
        key_json(self)
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.name.clone(),
            self.user.email.clone(),
            self.prefix.clone(),
            state(self),
            self.scopes.join(" "),
            self.expires_at.map_or("never".to_owned(), |it| it.format("%Y-%m-%d").to_string()),
            self.last_used_at.map_or("-".to_owned(), minutes),
        ]
    }

    fn details(&self) -> Vec<[String; 2]> {
        let mut details = vec![
            ("id", self.id.to_string()),
            ("name", self.name.clone()),
            ("description", self.description.clone()),
            ("owner", format!("{} (id {})", self.user.email, self.user.id)),
            ("lookup id", self.prefix.clone()),
            ("state", state(self)),
            ("scopes", list(&self.scopes, "none")),
            ("permissions", list(&self.permissions, "none")),
            ("models", list(&self.allowed_models, "all")),
            ("endpoints", list(&self.allowed_endpoints, "all")),
            ("networks", list(&self.allowed_ips, "all")),
            ("rate limits", limits(self)),
            ("budget", self.budget.map_or("none".to_owned(), shown_budget)),
            ("expires", self.expires_at.map_or("never".to_owned(), seconds)),
        ];
        let mut add = |name, value: Option<String>| {
            if let Some(value) = value {
                details.push((name, value));
            }
        };
        add("not before", self.not_before.map(seconds));
        add("last used", self.last_used_at.map(minutes));
        let grace = self.grace.as_ref();
        add("previous secret works until", grace.map(|grace| seconds(grace.ends_at)));
        add("previous secret last used", grace.and_then(|grace| grace.last_used_at).map(minutes));
        add("created", Some(seconds(self.created_at)));
        add("created by", self.created_by.clone());
        add("created by key", self.created_by_key.as_ref().map(ToString::to_string));
        add("revoked", self.revoked_at.map(seconds));
        add("revoked by", self.revoked_by.clone());
        add("revoke reason", self.revoke_reason.clone());
        add("metadata", Some(&self.metadata).filter(|it| !it.is_null()).map(ToString::to_string));
        add("revision", Some(self.revision.0.to_string()));
        let is_shown = |(name, value): &(&str, String)| *name != "description" || !value.is_empty();
        let details = details.into_iter().filter(is_shown);
        details.map(|(name, value)| [name.to_owned(), value]).collect()
    }
}

impl Shown for User {
    const HEADER: &'static [&'static str] = &["ID", "E-MAIL", "ROLE", "STATE"];

    fn id(&self) -> String {
        self.id.to_string()
    }

    fn json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    fn cells(&self) -> Vec<String> {
        let state = if self.is_active { "active" } else { "inactive" };
        vec![self.id.to_string(), self.email.clone(), self.role.clone(), state.to_owned()]
    }
}

impl Shown for AuditEntry {
    const HEADER: &'static [&'static str] =
        &["ID", "TIME", "ACTION", "KEY", "USER", "ACTOR", "CHANGED", "REASON"];

    fn id(&self) -> String {
        self.id.to_string()
    }

    fn json(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    fn cells(&self) -> Vec<String> {
        let id = |id: Option<String>| id.unwrap_or_else(|| "-".to_owned());
        let role = self.database_role.as_ref().map(|role| format!("(role {role})"));
        vec![
            self.id.to_string(),
            seconds(self.at),
            self.action.name().to_owned(),
            id(self.key.as_ref().map(ToString::to_string)),
            id(self.user.as_ref().map(ToString::to_string)),
            id(self.actor.clone().or(role)),
            changed(self),
            self.reason.clone().unwrap_or_default(),
        ]
    }
}

impl Shown for DailyUsage {
    const HEADER: &'static [&'static str] = &["DAY", "REQUESTS", "TOKENS", "COST"];

    fn id(&self) -> String {
        self.day.to_string()
    }

    fn json(&self) -> Value {
        json!({
            "day": self.day,
            "requests": self.requests,
            "tokens": self.tokens,
            "cost_micro_cents": self.cost_micro_cents,
        })
    }

    fn cells(&self) -> Vec<String> {
        let micros = i128::from(self.cost_micro_cents);
        // The main unit of the currency has 100 cents of a million micro-cents.
        let (sign, micros) = (if micros < 0 { "-" } else { "" }, micros.abs());
        let cost = format!("{sign}{}.{:06}", micros / 100_000_000, micros % 100_000_000 / 100);
        vec![self.day.to_string(), self.requests.to_string(), self.tokens.to_string(), cost]
    }
}

/// Returns the state of a key at present, by the code that decides about requests.
fn state(key: &KeyRecord) -> String {
    let now: DateTime<Utc> = SystemClock.now().into();
    let is_valid = AuthContext::unverified(key.clone()).is_valid_at(now);
    let state = match key {
        _ if is_valid => "active",
        key if !key.is_active => "revoked",
        key if !key.user.is_active => "owner inactive",
        key if key.expires_at.is_some_and(|expiry| now >= expiry) => "expired",
        _ => "not valid yet",
    };
    state.to_owned()
}

fn limits(key: &KeyRecord) -> String {
    if key.is_unlimited {
        return "unlimited".to_owned();
    }
    let periods = [RatePeriod::Minute, RatePeriod::Hour, RatePeriod::Day];
    let limits = periods.into_iter().filter_map(|period| {
        Some(format!("{}/{}", period.limit(&key.rate_limits)?, period.name()))
    });
    list(&limits.collect::<Vec<_>>(), "none")
}

/// Names the fields that an entry changed.
fn changed(entry: &AuditEntry) -> String {
    let (Some(Value::Object(before)), Some(Value::Object(after))) = (&entry.before, &entry.after)
    else {
        return String::new();
    };
    let names = after.iter().filter(|(name, value)| before.get(*name) != Some(value));
    names.map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" ")
}

fn list<T: ToString>(entries: &[T], empty: &str) -> String {
    if entries.is_empty() {
        return empty.to_owned();
    }
    entries.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn seconds(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn minutes(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d %H:%M").to_string()
}
