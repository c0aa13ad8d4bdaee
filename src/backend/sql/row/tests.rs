use serde_json::json;

use super::*;
use crate::record::{BudgetPeriod, RateLimits};

fn stored(record: KeyRecord) -> StoredKey {
    StoredKey::new(record, KeyHash::sha256("secret"))
}

/// Returns a row as the stores select it.
fn row(key: &StoredKey) -> Map<String, Value> {
    let mut row = encode(key);
    let rest = json!({
        "id": 7, "user_email": "a@b.c", "user_role": "user", "user_is_active": true, "total_cost": "0",
        // Both databases return it as text.
        "metadata": key.record.metadata.to_string(), "api_key_revision": 1, "user_revision": 1,
    });
    row.extend(rest.as_object().cloned().unwrap());
    for column in &KEY_COLUMNS {
        row.entry(column.name).or_insert(Value::Null);
    }
    row.retain(|name, _| KEY_COLUMNS.iter().all(|it| it.is_read || it.name != name));
    row
}

#[test]
fn a_column_that_is_absent_from_a_result_is_an_error_that_names_it() {
    let row = row(&stored(KeyRecord::new(7, "prefix", User::new(1, "a@b.c"))));
    assert!(decode(&Value::Object(row.clone()).to_string()).is_ok());
    for column in row.keys() {
        let mut lacking = row.clone();
        lacking.remove(column);
        let error = decode(&Value::Object(lacking).to_string()).unwrap_err().to_string();
        assert!(error.contains(&format!("column {column}: ")), "{column}: {error}");
    }
}

#[cfg(feature = "postgres")]
#[test]
fn a_text_that_is_absent_or_not_of_its_kind_is_an_error_that_names_the_column() {
    let hash = KeyHash::sha256("secret").expose_hash();
    let texts = || -> Vec<Option<&[u8]>> {
        let text = |(name, kind): &(&str, ColumnKind)| match (*name, kind) {
            ("key_hash", _) => Some(hash.as_bytes()),
            ("key_prefix", _) => Some("prefix".as_bytes()),
            (_, ColumnKind::Integer) => Some("7".as_bytes()),
            (_, ColumnKind::Flag) => Some("true".as_bytes()),
            (_, ColumnKind::List) => Some("[]".as_bytes()),
            _ => None,
        };
        READ.iter().map(text).collect()
    };
    assert!(decode_texts(texts()).is_ok_and(|key| key.record.is_active));
    for (at, (column, kind)) in READ.iter().enumerate() {
        let mut lacking = texts();
        lacking.truncate(at);
        let error = decode_texts(lacking).unwrap_err().to_string();
        assert!(error.contains(&format!("column {column}: is missing")), "{column}: {error}");
        if matches!(
            kind,
            ColumnKind::Integer | ColumnKind::Flag | ColumnKind::List | ColumnKind::Time
        ) {
            let mut wrong = texts();
            wrong[at] = Some(b"wrong");
            let error = decode_texts(wrong).unwrap_err().to_string();
            assert!(error.contains(&format!("column {column}: ")), "{column}: {error}");
        }
        let mut unreadable = texts();
        unreadable[at] = Some(b"\xff");
        let error = decode_texts(unreadable).unwrap_err().to_string();
        assert!(error.contains(&format!("column {column}: is not UTF-8")), "{column}: {error}");
    }
}

#[test]
fn a_record_that_is_encoded_and_decoded_is_unchanged() {
    let mut record = KeyRecord::new(7, "prefix", User::new(1, "a@b.c"));
    record.name = "laptop".to_owned();
    record.permissions = vec!["files".to_owned()];
    record.scopes = vec!["chat:write".to_owned()];
    record.rate_limits = RateLimits::default().per_minute(1).per_hour(2).per_day(3);
    record.allowed_models = vec!["small".to_owned()];
    record.allowed_endpoints = vec!["POST /v1/chat".parse().unwrap()];
    record.allowed_ips = vec!["10.0.0.0/8".parse().unwrap()];
    record.is_unlimited = true;
    record.budget = Some(Budget { limit_cents: 5, period: BudgetPeriod::Daily });
    record.expires_at = DateTime::from_timestamp(1_900_000_000, 0);
    record.metadata = json!({ "team": "a" });
    record.revision = Revision(1);
    record.description = "of Ada".to_owned();
    record.not_before = DateTime::from_timestamp(1_800_000_000, 0);
    record.created_by = Some("ada".to_owned());
    record.created_by_key = Some(3.into());
    record.revoked_at = DateTime::from_timestamp(1_850_000_000, 0);
    record.revoked_by = Some("bob".to_owned());
    record.revoke_reason = Some("lost".to_owned());
    let grace = GracePeriod::new("before", DateTime::from_timestamp(1_860_000_000, 0).unwrap());
    record.grace = Some(grace);

    let key = stored(record)
        .with_upgrade(KeyHash::sha256("fast"))
        .with_previous(KeyHash::sha256("previous"), Some(KeyHash::sha256("previous fast")));
    let decoded = decode(&Value::Object(row(&key)).to_string()).unwrap();
    assert_eq!(decoded.record, key.record);
    assert_eq!(
        (decoded.hash, decoded.upgraded, decoded.previous),
        (key.hash, key.upgraded, key.previous)
    );
}

#[test]
fn a_previous_secret_without_an_end_is_not_accepted() {
    let mut record = KeyRecord::new(7, "prefix", User::new(1, "a@b.c"));
    record.grace = Some(GracePeriod::new("prefix", DateTime::UNIX_EPOCH));
    let row = row(&stored(record).with_previous(KeyHash::sha256("previous"), None));
    for column in ["previous_key_prefix", "previous_key_hash", "previous_expires_at"] {
        let mut lacking = row.clone();
        lacking.insert(column.to_owned(), Value::Null);
        let decoded = decode(&Value::Object(lacking).to_string()).unwrap();
        assert_eq!((decoded.record.grace, decoded.previous), (None, None), "{column}");
    }
}

#[test]
fn the_audit_of_postgres_has_the_fields_of_an_audited_key() {
    let trigger = include_str!("../../../../schema/triggers/postgres.sql");
    let key = KeyRecord::new(7, "prefix", User::new(1, "a@b.c"));
    let audited = crate::store::audited_key(&key);
    let mut expected: Vec<_> = audited.as_object().unwrap().keys().map(String::as_str).collect();
    expected.sort_unstable();
    let lists = trigger.split("jsonb_build_object(\n").skip(1);
    let lists: Vec<_> = lists.filter(|list| list.contains("'scopes'")).collect();
    assert_eq!(lists.len(), 4, "as JSON, before, after, and of the rows of a statement");
    for list in lists {
        let (list, _) = list.split_once(");").unwrap();
        let mut names: Vec<_> = list.split('\'').skip(1).step_by(2).collect();
        let source = |name: &&str| {
            let rows = ["old_row.", "new_row.", "a.", "k -> '"];
            rows.iter().any(|row| list.contains(&format!("'{name}', {row}{name}")))
        };
        assert!(names.iter().all(source), "{names:?}");
        names.sort_unstable();
        names.dedup();
        assert_eq!(names, expected);
    }
}

/// A new column that decisions read must be in the trigger, or a change of it reaches no node.
#[test]
fn the_trigger_of_postgres_compares_each_column_whose_update_is_a_change() {
    let trigger = include_str!("../../../../schema/triggers/postgres.sql");
    let (_, body) = trigger.split_once("FUNCTION api_key_revise_key()").unwrap();
    let (body, _) = body.split_once("FUNCTION api_key_revise_user()").unwrap();
    for column in &KEY_COLUMNS {
        let name = column.name;
        let typed = [
            format!("OLD.{name} IS DISTINCT FROM NEW.{name}"),
            format!("OLD.{name}::text IS DISTINCT FROM NEW.{name}::text"),
        ];
        let is_compared = typed.iter().any(|comparison| body.contains(comparison));
        let is_compared_as_json =
            body.contains(&format!("o -> '{name}' IS DISTINCT FROM n -> '{name}'"));
        let expected = (column.is_change, column.is_change);
        assert_eq!((is_compared, is_compared_as_json), expected, "{name}");
    }
}
