//! The rules of the doctor, without I/O: [`Check`].

use chrono::{DateTime, TimeDelta, Utc};
use tower_api_key::{
    backend::{FeedCheck, MissingPrivilege, PrivilegePurpose, SchemaVersion},
    chrono,
    redis::{RedisHealth, RedisHealthError},
};

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Check {
    pub(super) status: Status,
    pub(super) subject: &'static str,
    pub(super) message: String,
    /// What to do; empty if there is nothing to do.
    pub(super) hint: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Warning,
    Error,
}

impl Status {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

impl Check {
    pub(super) fn ok(subject: &'static str, message: impl Into<String>) -> Self {
        Self { status: Status::Ok, subject, message: message.into(), hint: String::new() }
    }

    pub(super) fn warning(
        subject: &'static str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { status: Status::Warning, subject, message: message.into(), hint: hint.into() }
    }

    pub(super) fn error(
        subject: &'static str,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Self {
        Self { status: Status::Error, ..Self::warning(subject, message, hint) }
    }
}

/// Checks what a migration would make. Triggers have a line of their own: without one, changes are missed.
pub(super) fn schema(pending: &[String], version: SchemaVersion) -> Vec<Check> {
    if version == SchemaVersion::Newer {
        return vec![Check::warning(
            "schema",
            "the schema was made by a newer version of tower-api-key",
            "use that version of this program",
        )];
    }
    let (triggers, others): (Vec<_>, Vec<_>) =
        pending.iter().map(String::as_str).partition(|what| what.contains("trigger"));
    let age = match version {
        SchemaVersion::Older => "the schema was made by an older version of tower-api-key; ",
        _ => "",
    };
    let check = |subject, what: Vec<&str>, fine: &str| match what.as_slice() {
        [] => Check::ok(subject, fine),
        what => Check::error(
            subject,
            format!("{age}missing or different: {}", what.join("; ")),
            "run `tower-api-key migrate`",
        ),
    };
    vec![
        check("schema", others, "tables, columns and indexes are up to date"),
        check("triggers", triggers, "all triggers exist and are enabled"),
    ]
}

pub(super) fn writes(is_read_only: bool) -> Check {
    match is_read_only {
        false => Check::ok("writes", "the database accepts writes"),
        true => Check::warning(
            "writes",
            "the database is read-only, as a standby is: keys can be checked, but not managed",
            "use the URL of the primary, or add target_session_attrs=read-write to it",
        ),
    }
}

pub(super) fn rights(missing: &[MissingPrivilege]) -> Vec<Check> {
    let purposes = [
        (PrivilegePurpose::Check, "check keys"),
        (PrivilegePurpose::Usage, "count usage and reserve budgets"),
        (PrivilegePurpose::Manage, "manage users and keys"),
    ];
    let lacks = |(purpose, name)| {
        let lacks = missing.iter().filter(|it| it.purpose == purpose);
        let lacks: Vec<_> = lacks.map(|it| format!("{} on {}", it.privilege, it.table)).collect();
        (!lacks.is_empty()).then(|| {
            let message = format!("the role can't {name}");
            let hint = format!("grant {}", lacks.join(", "));
            match purpose {
                // The role of a service needs no right to manage keys.
                PrivilegePurpose::Manage => Check::warning("rights", message, hint),
                _ => Check::error("rights", message, hint),
            }
        })
    };
    let checks: Vec<_> = purposes.into_iter().filter_map(lacks).collect();
    match checks.is_empty() {
        true => vec![Check::ok("rights", "the role has every right")],
        false => checks,
    }
}

/// Offset from which on clocks are reported, and offset from which on it is an error: the bounds of the crate assume
/// clocks that differ by less.
const SKEW_WARNING: TimeDelta = TimeDelta::seconds(1);
const SKEW_ERROR: TimeDelta = TimeDelta::seconds(5);

/// Compares the time of the database with the times of this machine before and after it was read. The offset is unknown
/// within the duration of the read.
pub(super) fn clock(before: DateTime<Utc>, database: DateTime<Utc>, after: DateTime<Utc>) -> Check {
    let offset = if database < before {
        database - before
    } else if database > after {
        database - after
    } else {
        TimeDelta::zero()
    };
    let side = if offset < TimeDelta::zero() { "behind" } else { "ahead of" };
    let message = format!(
        "the clock of the database is {:.1} s {side} that of this machine",
        offset.abs().num_milliseconds() as f64 / 1000.0
    );
    let hint = "synchronize both clocks with NTP: expiry and grace periods depend on them";
    match offset.abs() {
        offset if offset >= SKEW_ERROR => Check::error("clock", message, hint),
        offset if offset >= SKEW_WARNING => Check::warning("clock", message, hint),
        _ => Check::ok("clock", "the clock of the database is that of this machine, within 1 s"),
    }
}

pub(super) fn tls(is_encrypted: bool) -> Check {
    match is_encrypted {
        true => Check::ok("TLS", "the connection to the database is encrypted"),
        false => Check::warning(
            "TLS",
            "the connection to the database is not encrypted",
            "add sslmode=verify-full to the URL",
        ),
    }
}

pub(super) fn notifications(feed: &FeedCheck) -> Option<Check> {
    Some(match feed.is_notified {
        Some(true) => Check::ok("notifications", "notifications arrive"),
        Some(false) => Check::warning(
            "notifications",
            "notifications don't arrive: a pooler drops LISTEN, so that nodes notice changes at the next poll",
            "connect without the pooler, or in its session mode; or set poll_interval to the delay that you accept",
        ),
        // SQLite has none, and PostgreSQL sends none if it allows prepared transactions.
        None => return None,
    })
}

/// Slots of a Redis Cluster.
const SLOTS: u32 = 16_384;

pub(super) fn redis(health: Result<RedisHealth, RedisHealthError>, is_list: bool) -> Vec<Check> {
    let health = match health {
        Ok(health) => health,
        Err(error) => {
            let hint = "check the URL, the password, the network and the server; keys are checked without Redis meanwhile";
            return vec![Check::error("Redis", error.to_string(), hint)];
        }
    };
    let version = health.version.as_deref().unwrap_or("of unknown version");
    let millis = health.ping.as_secs_f64() * 1000.0;
    let mut checks = vec![Check::ok("Redis", format!("Redis {version} answers in {millis:.1} ms"))];
    if health.role.as_deref() == Some("slave") && !health.is_cluster {
        checks.push(Check::error(
            "Redis role",
            "the server is a replica, which rejects writes",
            "use the URL of the primary, or of a cluster",
        ));
    }
    let policy = health.eviction_policy.as_deref();
    checks.push(match policy {
        Some("noeviction") => Check::ok("Redis memory", "the eviction policy is noeviction"),
        Some(policy) if health.max_memory == Some(0) => Check::ok(
            "Redis memory",
            format!("the eviction policy is {policy}, without a memory limit"),
        ),
        Some(policy) => Check::warning(
            "Redis memory",
            format!("the eviction policy {policy} may evict counters of rate limits and entries of revoked keys"),
            "set maxmemory-policy noeviction, or use a Redis of its own",
        ),
        None => Check::warning(
            "Redis memory",
            "the user may not read the eviction policy",
            "allow INFO to the user, or check that maxmemory-policy is noeviction",
        ),
    });
    if health.is_cluster {
        checks.push(match health.slots_ok {
            Some(SLOTS) if is_list => {
                Check::ok("Redis slots", "all slots of the cluster are served")
            }
            Some(SLOTS) => Check::error(
                "Redis slots",
                "the server is part of a cluster, but the URL names a single server",
                "give the URLs of some nodes, separated by commas",
            ),
            Some(slots) => Check::error(
                "Redis slots",
                format!("{slots} of {SLOTS} slots of the cluster are served"),
                "repair the cluster: redis-cli --cluster fix",
            ),
            None => Check::warning(
                "Redis slots",
                "the user may not read the slots",
                "allow CLUSTER INFO",
            ),
        });
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: f64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + TimeDelta::milliseconds((seconds * 1000.0) as i64)
    }

    #[test]
    fn clocks_that_differ_are_reported_with_their_offset() {
        let check = |before, database, after| clock(at(before), at(database), at(after));
        assert_eq!(check(100.0, 100.01, 100.02).status, Status::Ok);
        // The time of the database is unknown within the duration of the read.
        assert_eq!(check(100.0, 104.0, 108.0).status, Status::Ok);
        assert_eq!(check(100.0, 102.0, 100.1).status, Status::Warning);
        let ahead = check(100.0, 110.1, 100.1);
        assert_eq!(ahead.status, Status::Error);
        assert!(ahead.message.contains("10.0 s ahead of"), "{ahead:?}");
        let behind = check(100.0, 90.0, 100.1);
        assert_eq!(behind.status, Status::Error);
        assert!(behind.message.contains("10.0 s behind"), "{behind:?}");
    }
}
