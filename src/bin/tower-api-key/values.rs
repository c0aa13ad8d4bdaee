//! Values as people write them: durations, times, limits, budgets, and references to users.

use std::time::Duration;

use chrono::{DateTime, NaiveDate, NaiveTime, TimeDelta, Utc};
use serde_json::Value;
use tower_api_key::{
    chrono,
    record::{Budget, BudgetPeriod, RateLimits, RatePeriod, UserId},
};

/// Parses a duration such as `90d`, `24h`, `1h30m` or `0`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(char, u64); 5] =
        [('s', 1), ('m', 60), ('h', 3600), ('d', 86_400), ('w', 7 * 86_400)];
    let wrong =
        || "write a duration as a number with s, m, h, d or w, such as 90d or 24h".to_owned();
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let (mut seconds, mut rest) = (0_u64, text);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit = rest[digits..].chars().next().ok_or_else(wrong)?;
        let (_, size) = UNITS.into_iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        let part = number.checked_mul(size).ok_or_else(wrong)?;
        seconds = seconds.checked_add(part).ok_or_else(wrong)?;
        rest = &rest[digits + unit.len_utf8()..];
    }
    if text.is_empty() { Err(wrong()) } else { Ok(Duration::from_secs(seconds)) }
}

/// A time: relative to now, absolute, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    In(Duration),
    At(DateTime<Utc>),
    Never,
}

/// Parses `90d`, `2027-01-01`, a time in RFC 3339, or `never`.
pub(crate) fn when(text: &str) -> Result<When, String> {
    if text.eq_ignore_ascii_case("never") {
        return Ok(When::Never);
    }
    if let Ok(time) = time(text) {
        return Ok(When::At(time));
    }
    duration(text).map(When::In).map_err(|_| {
        "write a time as 90d, 2027-01-01, 2027-01-01T12:00:00Z (RFC 3339) or never".to_owned()
    })
}

/// Parses `2027-01-01` or a time in RFC 3339.
pub(crate) fn time(text: &str) -> Result<DateTime<Utc>, String> {
    if let Ok(day) = text.parse::<NaiveDate>() {
        return Ok(day.and_time(NaiveTime::MIN).and_utc());
    }
    let time = DateTime::parse_from_rfc3339(text);
    time.map(Into::into).map_err(|_| {
        "write a time as 2027-01-01 (midnight UTC) or 2027-01-01T12:00:00Z (RFC 3339)".to_owned()
    })
}

/// Parses a time in the past: `90d` ago, `2027-01-01`, or a time in RFC 3339.
pub(crate) fn past(text: &str) -> Result<When, String> {
    match when(text)? {
        When::Never => {
            Err("write a time as 90d (that long ago), 2027-01-01 or RFC 3339".to_owned())
        }
        when => Ok(when),
    }
}

impl When {
    /// Returns the time, counted from now on; `None` for never.
    pub(crate) fn after(self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Self::In(duration) => Some(shifted(now, duration, 1)),
            Self::At(time) => Some(time),
            Self::Never => None,
        }
    }

    /// Returns the time, counted back from now.
    pub(crate) fn before_now(self, now: DateTime<Utc>) -> DateTime<Utc> {
        match self {
            Self::In(duration) => shifted(now, duration, -1),
            Self::At(time) => time,
            Self::Never => DateTime::<Utc>::MIN_UTC,
        }
    }
}

/// The largest time that both databases store.
fn shifted(now: DateTime<Utc>, by: Duration, sign: i32) -> DateTime<Utc> {
    let last = || {
        NaiveDate::from_ymd_opt(9999, 12, 31)
            .map_or(now, |day| day.and_time(NaiveTime::MIN).and_utc())
    };
    let by = TimeDelta::from_std(by).ok().and_then(|by| by.checked_mul(sign));
    let shifted = by.and_then(|by| now.checked_add_signed(by));
    if sign < 0 {
        return shifted.unwrap_or(DateTime::UNIX_EPOCH).max(DateTime::UNIX_EPOCH);
    }
    shifted.unwrap_or_else(last).min(last())
}

/// A rate limit, such as `100/min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) requests: u64,
    pub(crate) period: RatePeriod,
}

/// Parses `100/min`, `1000/hour` or `10000/day`.
pub(crate) fn limit(text: &str) -> Result<Limit, String> {
    let wrong = || "write a rate limit as 100/min, 1000/hour or 10000/day".to_owned();
    let (requests, period) = text.split_once('/').ok_or_else(wrong)?;
    let period = match period.to_ascii_lowercase().as_str() {
        "m" | "min" | "minute" => RatePeriod::Minute,
        "h" | "hour" => RatePeriod::Hour,
        "d" | "day" => RatePeriod::Day,
        _ => return Err(wrong()),
    };
    Ok(Limit { requests: number(requests).ok_or_else(wrong)?, period })
}

/// Parses digits, without the sign that integers accept otherwise.
fn number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number { text.parse().ok() } else { None }
}

/// Returns the limits of a list, in which each period may occur once.
pub(crate) fn limits(list: &[Limit]) -> Result<RateLimits, String> {
    let mut limits = RateLimits::default();
    for limit in list {
        let field = match limit.period {
            RatePeriod::Minute => &mut limits.per_minute,
            RatePeriod::Hour => &mut limits.per_hour,
            _ => &mut limits.per_day,
        };
        if field.replace(limit.requests).is_some() {
            return Err(format!("--limit is given twice per {}", limit.period.name()));
        }
    }
    Ok(limits)
}

/// Parses `20.00/month`, in the main unit of the currency.
pub(crate) fn budget(text: &str) -> Result<Budget, String> {
    let wrong =
        || "write a budget as 20.00/month: an amount and day, week, month or total".to_owned();
    let (amount, period) = text.split_once('/').ok_or_else(wrong)?;
    let period = match period.to_ascii_lowercase().as_str() {
        "day" | "daily" => BudgetPeriod::Daily,
        "week" | "weekly" => BudgetPeriod::Weekly,
        "month" | "monthly" => BudgetPeriod::Monthly,
        "total" => BudgetPeriod::Total,
        _ => return Err(wrong()),
    };
    let limit_cents = cents(amount).ok_or_else(wrong)?;
    Ok(Budget { limit_cents, period })
}

/// Parses an amount with at most two decimals, without a binary fraction.
fn cents(amount: &str) -> Option<u64> {
    let (whole, cents) = match amount.split_once('.') {
        None => (number(amount)?, 0),
        Some((whole, cents)) if cents.len() == 1 => (number(whole)?, number(cents)? * 10),
        Some((whole, cents)) if cents.len() == 2 => (number(whole)?, number(cents)?),
        Some(_) => return None,
    };
    whole.checked_mul(100)?.checked_add(cents)
}

/// Returns a budget in the form of [`budget`].
pub(crate) fn shown_budget(budget: Budget) -> String {
    let period = match budget.period {
        BudgetPeriod::Daily => "day",
        BudgetPeriod::Weekly => "week",
        BudgetPeriod::Monthly => "month",
        _ => "total",
    };
    format!("{}.{:02}/{period}", budget.limit_cents / 100, budget.limit_cents % 100)
}

/// A user, by id or by e-mail address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum UserRef {
    Id(UserId),
    Email(String),
}

/// Parses the id or the e-mail address of a user.
pub(crate) fn user(text: &str) -> Result<UserRef, String> {
    if let Ok(id) = text.parse::<i64>() {
        return Ok(UserRef::Id(id.into()));
    }
    if text.contains('@') {
        return Ok(UserRef::Email(text.to_owned()));
    }
    Err("write the id or the e-mail address of a user".to_owned())
}

/// Parses JSON.
pub(crate) fn json(text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|error| format!("write JSON: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        let seconds = |text| duration(text).map(|it| it.as_secs()).ok();
        for (text, expected) in [
            ("90d", Some(90 * 86_400)),
            ("24h", Some(86_400)),
            ("1h30m", Some(5400)),
            ("0", Some(0)),
            ("2w", Some(14 * 86_400)),
            ("", None),
            ("d", None),
            ("5", None),
            ("5x", None),
            ("-5d", None),
            ("1.5h", None),
            ("99999999999999999999d", None),
            ("9999999999999999999w", None),
            ("5é", None),
        ] {
            assert_eq!(seconds(text), expected, "{text}");
        }
    }

    #[test]
    fn times_are_relative_absolute_or_never() {
        let now = time("2026-01-01").unwrap();
        let at = |text| when(text).map(|it| it.after(now)).ok();
        assert_eq!(at("1d"), Some(time("2026-01-02").ok()));
        assert_eq!(at("2027-01-01"), Some(time("2027-01-01T00:00:00Z").ok()));
        assert_eq!(at("2027-01-01T01:00:00+01:00"), Some(time("2027-01-01").ok()));
        assert_eq!(at("never"), Some(None));
        for wrong in ["tomorrow", "2027-13-01", "2027-01-01 12:00", ""] {
            assert_eq!(at(wrong), None, "{wrong}");
        }
        // A far time is within what both databases store.
        assert_eq!(at("9999999w").flatten(), time("9999-12-31").ok());
        assert_eq!(past("30d").unwrap().before_now(now), time("2025-12-02").unwrap());
    }

    #[test]
    fn limits_have_a_period() {
        let pair = |text| limit(text).map(|it| (it.requests, it.period)).ok();
        assert_eq!(pair("100/min"), Some((100, RatePeriod::Minute)));
        assert_eq!(pair("1000/hour"), Some((1000, RatePeriod::Hour)));
        assert_eq!(pair("10000/day"), Some((10000, RatePeriod::Day)));
        for wrong in ["100", "100/week", "-1/min", "+1/min", "x/min", "/min", "1.5/min"] {
            assert_eq!(pair(wrong), None, "{wrong}");
        }
        let twice = [limit("1/min").unwrap(), limit("2/min").unwrap()];
        assert!(limits(&twice).is_err());
    }

    #[test]
    fn budgets_are_exact_and_have_a_period() {
        let cents = |text| budget(text).map(|it| (it.limit_cents, it.period)).ok();
        assert_eq!(cents("20.00/month"), Some((2000, BudgetPeriod::Monthly)));
        assert_eq!(cents("5/day"), Some((500, BudgetPeriod::Daily)));
        assert_eq!(cents("0.5/week"), Some((50, BudgetPeriod::Weekly)));
        assert_eq!(cents("1234.56/total"), Some((123_456, BudgetPeriod::Total)));
        for wrong in
            ["20", "20/", "20.001/month", "-1/day", "1e3/day", ".5/day", "5./day", "20/year"]
        {
            assert_eq!(cents(wrong), None, "{wrong}");
        }
        assert_eq!(shown_budget(budget("20/month").unwrap()), "20.00/month");
    }

    #[test]
    fn users_have_an_id_or_an_address() {
        assert_eq!(user("7"), Ok(UserRef::Id(7.into())));
        assert_eq!(user("ada@example.com"), Ok(UserRef::Email("ada@example.com".to_owned())));
        assert!(user("ada").is_err());
    }
}
