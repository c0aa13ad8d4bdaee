//! From the options for what a key allows to records and patches.

use chrono::{DateTime, Utc};
use tower_api_key::{
    chrono,
    management::KeyPatch,
    record::{KeyRecord, RateLimits},
};

use crate::{
    args::{Clear, RightsArgs, UpdateArgs},
    failure::Failure,
    values,
};

/// Sets the options on a record.
pub(super) fn apply(
    rights: &RightsArgs,
    record: &mut KeyRecord,
    now: DateTime<Utc>,
) -> Result<(), Failure> {
    fn replace<T: Clone>(field: &mut Vec<T>, given: &[T]) {
        if !given.is_empty() {
            *field = given.to_vec();
        }
    }
    replace(&mut record.scopes, &rights.scope);
    replace(&mut record.permissions, &rights.permission);
    replace(&mut record.allowed_models, &rights.model);
    replace(&mut record.allowed_endpoints, &rights.endpoint);
    replace(&mut record.allowed_ips, &rights.ip);
    let limits = limits(rights)?;
    record.rate_limits.per_minute = limits.per_minute.or(record.rate_limits.per_minute);
    record.rate_limits.per_hour = limits.per_hour.or(record.rate_limits.per_hour);
    record.rate_limits.per_day = limits.per_day.or(record.rate_limits.per_day);
    if let Some(description) = &rights.description {
        record.description.clone_from(description);
    }
    if let Some(expires) = rights.expires {
        record.expires_at = expires.after(now);
    }
    if let Some(start) = rights.not_before {
        record.not_before = start.after(now);
    }
    record.budget = rights.budget.or(record.budget);
    record.is_unlimited = rights.unlimited.unwrap_or(record.is_unlimited);
    if let Some(metadata) = &rights.metadata {
        record.metadata.clone_from(metadata);
    }
    Ok(())
}

fn limits(rights: &RightsArgs) -> Result<RateLimits, Failure> {
    values::limits(&rights.limit).map_err(Failure::usage)
}

/// Returns the edit that the options describe. What is both cleared and set is set.
pub(super) fn patch(args: &UpdateArgs, now: DateTime<Utc>) -> Result<KeyPatch, Failure> {
    let mut patch =
        args.clear.iter().fold(KeyPatch::default(), |patch, field| cleared(patch, *field));
    let rights = &args.rights;
    if let Some(name) = &args.name {
        patch = patch.name(name);
    }
    if let Some(description) = &rights.description {
        patch = patch.description(description);
    }
    if !rights.scope.is_empty() {
        patch = patch.scopes(rights.scope.iter().cloned());
    }
    if !rights.permission.is_empty() {
        patch = patch.permissions(rights.permission.iter().cloned());
    }
    if !rights.model.is_empty() {
        patch = patch.allowed_models(rights.model.iter().cloned());
    }
    if !rights.endpoint.is_empty() {
        patch = patch.allowed_endpoints(rights.endpoint.iter().cloned());
    }
    if !rights.ip.is_empty() {
        patch = patch.allowed_ips(rights.ip.iter().cloned());
    }
    let limits = limits(rights)?;
    if limits.per_minute.is_some() {
        patch = patch.per_minute(limits.per_minute);
    }
    if limits.per_hour.is_some() {
        patch = patch.per_hour(limits.per_hour);
    }
    if limits.per_day.is_some() {
        patch = patch.per_day(limits.per_day);
    }
    if let Some(expires) = rights.expires {
        patch = patch.expires_at(expires.after(now));
    }
    if let Some(start) = rights.not_before {
        patch = patch.not_before(start.after(now));
    }
    if rights.budget.is_some() {
        patch = patch.budget(rights.budget);
    }
    if let Some(is_unlimited) = rights.unlimited {
        patch = patch.unlimited(is_unlimited);
    }
    if let Some(metadata) = &rights.metadata {
        patch = patch.metadata(metadata.clone());
    }
    if patch.is_empty() {
        return Err(Failure::usage("nothing to change: give an option, for example --name"));
    }
    Ok(patch)
}

fn cleared(patch: KeyPatch, field: Clear) -> KeyPatch {
    match field {
        Clear::Description => patch.description(""),
        Clear::Scopes => patch.scopes::<String>([]),
        Clear::Permissions => patch.permissions::<String>([]),
        Clear::Models => patch.allowed_models::<String>([]),
        Clear::Endpoints => patch.allowed_endpoints([]),
        Clear::Ips => patch.allowed_ips([]),
        Clear::Limits => patch.per_minute(None).per_hour(None).per_day(None),
        Clear::LimitPerMinute => patch.per_minute(None),
        Clear::LimitPerHour => patch.per_hour(None),
        Clear::LimitPerDay => patch.per_day(None),
        Clear::Budget => patch.budget(None),
        Clear::Expires => patch.expires_at(None),
        Clear::NotBefore => patch.not_before(None),
        Clear::Metadata => patch.metadata(serde_json::Value::Null),
    }
}
