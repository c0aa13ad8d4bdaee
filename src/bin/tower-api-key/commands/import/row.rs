//! From the fields of a row to a key.

use std::str::FromStr;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use tower_api_key::{
    NewKey, chrono,
    key::KeyHash,
    management::ImportedKey,
    record::{Budget, BudgetPeriod, KeyRecord, User, UserId},
};

use super::reader::{Row, RowError};
use crate::values::{self, UserRef};

/// The columns of an import.
pub(super) const COLUMNS: [&str; 20] = [
    "key_prefix",
    "key_hash",
    "user",
    "name",
    "description",
    "permissions",
    "scopes",
    "rate_limit_per_minute",
    "rate_limit_per_hour",
    "rate_limit_per_day",
    "allowed_models",
    "allowed_endpoints",
    "allowed_ips",
    "is_unlimited",
    "budget_limit_cents",
    "budget_type",
    "expires_at",
    "not_before",
    "metadata",
    "is_active",
];

/// A row whose fields were read.
pub(super) struct ParsedRow {
    pub(super) line: u64,
    pub(super) owner: UserRef,
    record: KeyRecord,
    hash: KeyHash,
}

impl ParsedRow {
    /// Returns the key of a user.
    pub(super) fn key(self, owner: UserId) -> ImportedKey {
        let new = NewKey::from_template(&self.record, owner, &self.record.name);
        let key = ImportedKey::new(new, self.record.prefix, self.hash);
        if self.record.is_active { key } else { key.revoked() }
    }
}

/// Reads the fields of a row. `owner` is the owner of rows without a user.
pub(super) fn parse(row: Row, owner: Option<&UserId>) -> Result<ParsedRow, RowError> {
    let line = row.line;
    read(line, row.fields, owner).map_err(|reason| RowError { line, reason })
}

fn read(
    line: u64,
    fields: Map<String, Value>,
    owner: Option<&UserId>,
) -> Result<ParsedRow, String> {
    let mut fields = Fields(fields);
    let owner = match (fields.text("user")?, owner) {
        (Some(user), _) => values::user(&user).map_err(|error| format!("user: {error}"))?,
        (None, Some(owner)) => UserRef::Id(owner.clone()),
        (None, None) => return Err("user is missing: add the column, or give --user".to_owned()),
    };
    let required = |text: Option<String>, name| text.ok_or_else(|| format!("{name} is missing"));
    let prefix = required(fields.text("key_prefix")?, "key_prefix")?;
    let hash = required(fields.text("key_hash")?, "key_hash")?;
    let hash: KeyHash = hash.parse().map_err(|error| format!("key_hash: {error}"))?;

    let mut record = KeyRecord::new(0, prefix, User::new(0, ""));
    record.name = fields.text("name")?.unwrap_or_default();
    record.description = fields.text("description")?.unwrap_or_default();
    record.permissions = fields.list("permissions")?;
    record.scopes = fields.list("scopes")?;
    record.allowed_models = fields.list("allowed_models")?;
    record.allowed_endpoints = fields.parsed("allowed_endpoints")?;
    record.allowed_ips = fields.parsed("allowed_ips")?;
    record.rate_limits.per_minute = fields.number("rate_limit_per_minute")?;
    record.rate_limits.per_hour = fields.number("rate_limit_per_hour")?;
    record.rate_limits.per_day = fields.number("rate_limit_per_day")?;
    record.is_unlimited = fields.flag("is_unlimited")?.unwrap_or(false);
    record.is_active = fields.flag("is_active")?.unwrap_or(true);
    record.budget = fields.budget()?;
    record.expires_at = fields.time("expires_at")?;
    record.not_before = fields.time("not_before")?;
    record.metadata = fields.json("metadata")?;
    match fields.0.keys().next() {
        Some(unknown) => Err(format!("the field {unknown:?} is unknown")),
        None => Ok(ParsedRow { line, owner, record, hash }),
    }
}

/// The fields that were not read yet. An absent field is not an unreadable one.
struct Fields(Map<String, Value>);

impl Fields {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, String> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(_) => Err(format!("{name} is not a text")),
        }
    }

    /// A number; −1 means unlimited, as in adopted tables.
    fn number(&mut self, name: &str) -> Result<Option<u64>, String> {
        match self.text(name)?.as_deref().map(str::trim) {
            None | Some("-1") => Ok(None),
            Some(text) => {
                let number = text.parse().map_err(|_| format!("{name} is not a whole number"))?;
                Ok(Some(number))
            }
        }
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>, String> {
        let text = match self.take(name) {
            None => return Ok(None),
            Some(Value::Bool(flag)) => return Ok(Some(flag)),
            Some(Value::Number(number)) => number.to_string(),
            Some(Value::String(text)) => text.trim().to_ascii_lowercase(),
            Some(_) => String::new(),
        };
        match text.as_str() {
            "true" | "t" | "1" => Ok(Some(true)),
            "false" | "f" | "0" => Ok(Some(false)),
            _ => Err(format!("{name} is neither true nor false")),
        }
    }

    fn list(&mut self, name: &str) -> Result<Vec<String>, String> {
        let wrong = || format!("{name} is not a list of texts");
        let value = match self.take(name) {
            None => return Ok(Vec::new()),
            Some(Value::String(text)) if text.trim_start().starts_with('[') => {
                serde_json::from_str(&text).map_err(|_| wrong())?
            }
            Some(Value::String(text)) => {
                let entries = text.split([';', ',']).map(str::trim).filter(|it| !it.is_empty());
                let entries: Vec<_> = entries.map(str::to_owned).collect();
                // An empty list may mean that everything is allowed, which separators alone do not express.
                return if entries.is_empty() { Err(wrong()) } else { Ok(entries) };
            }
            Some(value) => value,
        };
        serde_json::from_value(value).map_err(|_| wrong())
    }

    fn parsed<T: FromStr<Err: std::fmt::Display>>(&mut self, name: &str) -> Result<Vec<T>, String> {
        let entries = self.list(name)?;
        let parsed = entries.iter().map(|entry| entry.parse());
        parsed.collect::<Result<_, _>>().map_err(|error: T::Err| format!("{name}: {error}"))
    }

    fn budget(&mut self) -> Result<Option<Budget>, String> {
        let limit = self.number("budget_limit_cents")?;
        let period = self.text("budget_type")?;
        // A period without a limit has no effect, as in adopted tables.
        let Some(limit_cents) = limit else { return Ok(None) };
        let period = period.ok_or("budget_type is missing: total, daily, weekly or monthly")?;
        let period = BudgetPeriod::from_name(&period)
            .ok_or("budget_type is not total, daily, weekly or monthly")?;
        Ok(Some(Budget { limit_cents, period }))
    }

    /// A time in RFC 3339 or as PostgreSQL exports it, or a day.
    fn time(&mut self, name: &str) -> Result<Option<DateTime<Utc>>, String> {
        let Some(text) = self.text(name)? else { return Ok(None) };
        let exported = DateTime::parse_from_str(&text, "%Y-%m-%d %H:%M:%S%.f%#z");
        match exported {
            Ok(time) => Ok(Some(time.into())),
            Err(_) => values::time(&text).map(Some).map_err(|error| format!("{name}: {error}")),
        }
    }

    fn json(&mut self, name: &str) -> Result<Value, String> {
        match self.take(name) {
            None => Ok(Value::Null),
            Some(Value::String(text)) => {
                serde_json::from_str(&text).map_err(|_| format!("{name} is not JSON"))
            }
            Some(value) => Ok(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{args::InputFormat, commands::import::reader::Rows};

    const HASH: &str = "$2b$04$K9q0lq1oU9hQ4n5u0mQ3UuXyV0b3h7i1c2Zs8w9y0A1B2C3D4E5F6";

    fn rows(text: &str, format: InputFormat) -> Vec<Result<ParsedRow, (u64, String)>> {
        let mut rows = Rows::new(text.as_bytes(), format).unwrap();
        let mut parsed = Vec::new();
        while let Some(row) = rows.next().unwrap() {
            let owner = UserId::from(7);
            let row = row.and_then(|row| parse(row, Some(&owner)));
            parsed.push(row.map_err(|error| (error.line, error.reason)));
        }
        parsed
    }

    fn records(text: &str, format: InputFormat) -> Vec<KeyRecord> {
        rows(text, format).into_iter().map(|row| row.map_err(|it| it.1).unwrap().record).collect()
    }

    #[test]
    fn both_formats_describe_the_same_key() {
        let csv = format!(
            "key_prefix,key_hash,name,scopes,allowed_endpoints,rate_limit_per_minute,expires_at,budget_limit_cents,\
             budget_type,metadata,is_active\n\
             abcd,{HASH},laptop,\"chat:*;read\",\"[\"\"POST /v1/chat\"\"]\",60,2030-01-01 00:00:00+00,2000,monthly,\
             \"{{\"\"a\"\":1}}\",f\n"
        );
        let json = format!(
            r#"{{"key_prefix":"abcd","key_hash":"{HASH}","name":"laptop","scopes":["chat:*","read"],
            "allowed_endpoints":["POST /v1/chat"],"rate_limit_per_minute":60,"expires_at":"2030-01-01T00:00:00Z",
            "budget_limit_cents":2000,"budget_type":"monthly","metadata":{{"a":1}},"is_active":false}}"#
        )
        .replace('\n', "");
        let (csv, json) = (records(&csv, InputFormat::Csv), records(&json, InputFormat::Jsonl));
        assert_eq!(csv, json);
        assert_eq!(csv[0].scopes, ["chat:*", "read"]);
        assert!(!csv[0].is_active);
    }

    #[test]
    fn broken_rows_are_reported_with_their_lines_and_others_are_read() {
        let text = format!(
            "key_prefix,key_hash,user,allowed_ips,is_unlimited\n\
             a,{HASH},1,,\n\
             b,secret-in-a-wrong-column,1,,\n\
             c,{HASH},1\n\
             d,{HASH},nobody,,\n\
             \"e\ne\",{HASH},1,10.0.0.0/33,\n\
             f,{HASH},1,;,\n\
             g,{HASH},1,,maybe\n\
             ,{HASH},1,,\n\
             h,{HASH},1,,\n"
        );
        let parsed = rows(&text, InputFormat::Csv);
        let errors: Vec<_> =
            parsed.iter().filter_map(|row| row.as_ref().err()).map(|(line, _)| *line).collect();
        assert_eq!(errors, [3, 4, 5, 6, 8, 9, 10]);
        assert_eq!(parsed.iter().filter(|row| row.is_ok()).count(), 2);
        let shown = parsed.iter().filter_map(|row| row.as_ref().err()).map(|it| it.1.clone());
        assert!(!shown.collect::<String>().contains("secret-in-a-wrong-column"));
    }

    #[test]
    fn lines_that_are_not_json_are_reported() {
        let good = format!(r#"{{"key_prefix":"a","key_hash":"{HASH}"}}"#);
        let unknown = format!(r#"{{"key_prefix":"a","key_hash":"{HASH}","scope":["a"]}}"#);
        let long = "x".repeat(3 * 1024 * 1024);
        let text = format!("{good}\n\n{{\n[1]\n{unknown}\n{long}\n{good}");
        let parsed = rows(&text, InputFormat::Jsonl);
        let outcomes: Vec<_> =
            parsed.iter().map(|row| row.as_ref().map(|row| row.line).map_err(|it| it.0)).collect();
        assert_eq!(outcomes, [Ok(1), Err(3), Err(4), Err(5), Err(6), Ok(7)]);
    }

    #[test]
    fn an_unknown_column_stops_the_import() {
        let text = format!("key_prefix,key_hash,scope\na,{HASH},chat:read\n");
        assert!(Rows::new(text.as_bytes(), InputFormat::Csv).is_err());
    }
}
