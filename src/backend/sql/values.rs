//! Interpretation of values in the columns of another service's tables: limits, budgets, grants.

use serde_json::Value;

use crate::record::{Budget, BudgetPeriod};

/// The value for "unlimited" where a column may not be NULL.
pub(in crate::backend) const UNLIMITED: i64 = -1;

/// Decodes a limit. NULL and -1 mean unlimited.
pub(in crate::backend) fn limit(value: Option<i64>) -> Result<Option<u64>, &'static str> {
    let limit = value.filter(|value| *value != UNLIMITED).map(u64::try_from).transpose();
    limit.map_err(|_| "is negative")
}

/// Decodes a budget; on failure it returns the column and the reason. The period matters only with a limit.
pub(in crate::backend) fn budget(
    limit_cents: Option<i64>,
    period: Option<&str>,
) -> Result<Option<Budget>, (&'static str, &'static str)> {
    let limit = limit(limit_cents).map_err(|reason| ("budget_limit_cents", reason))?;
    let Some(limit_cents) = limit else { return Ok(None) };
    let period = match period {
        // The strictest period is used, because none is given.
        None | Some("") => BudgetPeriod::Total,
        Some(name) => BudgetPeriod::from_name(name)
            .ok_or(("budget_type", "is not total, daily, weekly or monthly"))?,
    };
    Ok(Some(Budget { limit_cents, period }))
}

/// Decodes grants: a list of texts, or an object. The names of an object are joined by `:` down to a value that is true
/// or a list of texts: `{"chat": {"read": true}, "models": ["a"]}` grants `chat:read` and `models:a`. Any other value
/// in an object grants nothing. `None` if it is neither a list nor an object.
///
/// An allow-list can't be an object: an object without a true value would be an empty list, which allows everything.
pub(in crate::backend) fn grants(value: Value) -> Option<Vec<String>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::Array(entries) => entries.into_iter().map(text).collect(),
        Value::Object(_) => {
            let mut granted = Vec::new();
            grant("", value, &mut granted);
            Some(granted)
        }
        _ => None,
    }
}

fn grant(name: &str, value: Value, granted: &mut Vec<String>) {
    let below = |part: &str| match name {
        "" => part.to_owned(),
        name => format!("{name}:{part}"),
    };
    match value {
        Value::Bool(true) => granted.push(name.to_owned()),
        Value::Object(entries) => {
            entries.into_iter().for_each(|(part, value)| grant(&below(&part), value, granted));
        }
        Value::Array(entries) => {
            granted.extend(entries.into_iter().filter_map(text).map(|part| below(&part)));
        }
        _ => {}
    }
}

fn text(value: Value) -> Option<String> {
    if let Value::String(text) = value { Some(text) } else { None }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_grants_what_is_true_or_a_list_of_texts_at_any_depth() {
        let granted = |value| grants(value).unwrap();
        assert_eq!(granted(json!({ "chat": { "read": true, "write": false } })), ["chat:read"]);
        assert_eq!(granted(json!({ "models": ["a", 1, null, ["b"]] })), ["models:a"]);
        assert_eq!(
            granted(json!({ "read": true, "a": { "b": { "c": true } } })),
            ["a:b:c", "read"]
        );
        let nothing = json!({ "a": 1, "b": null, "c": "yes", "d": {}, "e": [], "f": false });
        assert!(granted(nothing).is_empty() && granted(Value::Null).is_empty());
        assert_eq!(granted(json!(["a"])), ["a"]);
        for neither in [json!([1]), json!("a"), json!(1), json!(true)] {
            assert_eq!(grants(neither), None);
        }
    }

    #[test]
    fn minus_one_is_unlimited_and_anything_else_below_zero_an_error() {
        assert_eq!(limit(Some(-1)), Ok(None));
        assert_eq!((limit(None), limit(Some(0))), (Ok(None), Ok(Some(0))));
        assert!(limit(Some(-2)).is_err() && limit(Some(i64::MIN)).is_err());
        assert_eq!(budget(None, Some("hourly")), Ok(None));
        assert_eq!(budget(Some(-1), Some("none")), Ok(None));
        let total = Some(Budget { limit_cents: 5, period: BudgetPeriod::Total });
        assert_eq!((budget(Some(5), None), budget(Some(5), Some(""))), (Ok(total), Ok(total)));
        assert!(budget(Some(5), Some("none")).is_err() && budget(Some(-2), None).is_err());
    }
}
