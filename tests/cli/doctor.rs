//! What the doctor finds.

use std::{fs, os::unix::fs::PermissionsExt};

use crate::{
    program::{Program, Run},
    support::{
        database::{run, url_of_role},
        servers::{PgBouncer, Postgres, Redis, RedisCluster},
    },
};

/// Asserts that one line has this status and all of these texts.
#[track_caller]
fn finds(run: &Run, code: i32, status: &str, texts: &[&str]) {
    assert_eq!(run.code, code, "{run:?}");
    let is_it =
        |line: &str| line.starts_with(status) && texts.iter().all(|text| line.contains(text));
    assert!(run.out.lines().any(is_it), "{status} {texts:?} is not in\n{}", run.out);
    assert_eq!(run.out.contains("What to do:"), status != "ok");
}

#[test]
fn faults_of_a_file_are_found() {
    let program = Program::at_new_file();
    program.run("doctor").fails(6, "migrate");
    program.run("migrate").ok();
    finds(&program.run("doctor"), 0, "ok", &["change feed", "came back"]);
    program.sql("DROP TRIGGER api_key_note");
    finds(&program.run("doctor"), 1, "error", &["triggers", "api_key_note"]);
    program.run("migrate").ok();
    program.sql("DROP TABLE api_key_audit");
    finds(&program.run("doctor"), 1, "error", &["schema", "table api_key_audit"]);
    program.run("migrate").ok();
    let json = program.run("doctor -o json").json();
    assert!(json.as_array().unwrap().iter().all(|check| check["status"] == "ok"), "{json}");
}

#[test]
fn a_file_that_can_not_be_written_is_found() {
    let program = Program::at_new_file();
    program.run("migrate").ok();
    fs::set_permissions(program.database(), fs::Permissions::from_mode(0o400)).unwrap();
    // The superuser may write it all the same.
    if fs::OpenOptions::new().append(true).open(program.database()).is_err() {
        finds(&program.run("doctor"), 0, "warning", &["writes"]);
    }
}

const DOWN_SQLITE: &str = include_str!("../../schema/sqlite/2026-11-26-000005_management/down.sql");
const DOWN_POSTGRES: &str =
    include_str!("../../schema/postgres/2026-11-26-000005_management/down.sql");

/// Asserts what the program says of a database that is one version behind, and brings it up to date.
#[track_caller]
fn is_behind(program: &Program) {
    let older = "made by an older version";
    finds(&program.run("doctor"), 1, "error", &["schema", older]);
    let check = program.run("migrate --check");
    assert_eq!((check.code, check.out.contains(older)), (1, true), "{check:?}");
    assert!(program.run("migrate --check -o id").out.trim().parse::<u32>().unwrap() > 0);
    let secret = ["key", "issue", "--user", "1", "--name", "a", "-o", "secret"];
    for words in [&["user", "create", "bob@example.com"][..], &["key", "list"], &secret] {
        program
            .run_words(words, "")
            .fails(1, "older version of tower-api-key: run `tower-api-key migrate`");
    }
    program.run("migrate").ok();
    assert_eq!(program.run("migrate --check").ok(), "The schema is up to date.\n");
    finds(&program.run("doctor"), 0, "ok", &["schema"]);
    assert_eq!(program.run("user list -o id").ok(), "1\n", "nothing was created");
}

/// Asserts what the program says of a database that is one version ahead. It changes no object of it.
#[track_caller]
fn is_ahead(program: &Program) {
    let newer = "made by a newer version";
    finds(&program.run("doctor"), 0, "warning", &["schema", newer]);
    for line in ["migrate --check", "migrate"] {
        let run = program.run(line);
        assert!(run.out.contains(newer), "{run:?}");
        run.ok();
    }
    let listed = program.run("user list -o id");
    assert_eq!((listed.code, &*listed.out), (0, "1\n"), "{listed:?}");
    assert_eq!(listed.err.lines().count(), 1, "{listed:?}");
    assert!(listed.err.contains("use that version of this program"), "{listed:?}");
}

#[test]
fn a_file_of_another_version_is_found() {
    let program = Program::with_user();
    program.sql(DOWN_SQLITE);
    is_behind(&program);
    // Only the triggers differ, as after a release without a new table.
    program.sql("UPDATE api_key_schema SET version = 1; DROP TRIGGER api_key_note");
    is_behind(&program);
    // The number alone.
    program.sql("UPDATE api_key_schema SET version = 1");
    is_behind(&program);
    // A newer version has other triggers and columns.
    program.sql(
        "UPDATE api_key_schema SET version = 90;
        ALTER TABLE api_keys ADD COLUMN quota INTEGER;
        DROP TRIGGER api_key_note_user_gone;
        CREATE TRIGGER api_key_note_user_gone AFTER DELETE ON users BEGIN
            INSERT INTO api_key_changes (user_id) VALUES (OLD.id); END",
    );
    is_ahead(&program);
    // An adopted file may use these for itself.
    program.sql("PRAGMA user_version = 7; UPDATE api_key_schema SET version = 2");
    program.run("migrate").ok();
    finds(&program.run("doctor"), 0, "ok", &["schema"]);
}

#[tokio::test]
async fn a_server_of_another_version_is_found() {
    let server = Postgres::start();
    let admin = server.client().await;
    let program = Program::at(&server.url());
    program.run("migrate").ok();
    program.run("user create ada@example.com").ok();
    let version =
        |number: u8| format!("COMMENT ON TABLE api_key_changes IS 'tower-api-key {number} abc'");
    run(&admin, DOWN_POSTGRES).await;
    run(&admin, &version(1)).await;
    is_behind(&program);
    run(&admin, &version(1)).await;
    is_behind(&program);
    run(&admin, &version(90)).await;
    is_ahead(&program);
}

#[test]
fn a_clock_that_is_wrong_is_found() {
    let doctor = |offset: &str| {
        let server = Postgres::with_clock(offset);
        let program = Program::at(&server.url());
        program.run("migrate").ok();
        program.run("doctor")
    };
    finds(&doctor("+0s"), 0, "ok", &["clock", "within 1 s"]);
    finds(&doctor("+10s"), 1, "error", &["clock", "10.0 s ahead of"]);
    finds(&doctor("+3s"), 0, "warning", &["clock", "3.0 s ahead of"]);
    let behind = doctor("-10s");
    finds(&behind, 1, "error", &["clock", "s behind"]);
    assert!(behind.out.contains("synchronize both clocks with NTP"), "{behind:?}");
}

#[tokio::test]
async fn faults_of_a_server_are_found() {
    let server = Postgres::start();
    let admin = server.client().await;
    let program = Program::at(&server.url());
    finds(&program.run("doctor"), 1, "error", &["schema", "table api_keys"]);
    program.run("migrate").ok();
    let fine = program.run("doctor");
    finds(&fine, 0, "ok", &["database", "PostgreSQL"]);
    finds(&fine, 0, "ok", &["notifications"]);

    run(&admin, "ALTER TABLE api_keys DISABLE TRIGGER api_key_note").await;
    finds(&program.run("doctor"), 1, "error", &["triggers", "api_key_note on api_keys"]);
    run(&admin, "DROP TRIGGER api_key_note ON api_keys").await;
    finds(&program.run("doctor"), 1, "error", &["triggers", "api_key_note on api_keys"]);
    program.run("migrate").ok();
    run(&admin, "ALTER TABLE api_keys DROP COLUMN description").await;
    finds(&program.run("doctor"), 1, "error", &["schema", "description"]);
    program.run("migrate").ok();
    finds(&program.run("doctor"), 0, "ok", &["schema"]);

    run(&admin, "CREATE ROLE service LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO service")
        .await;
    let service = Program::at(&url_of_role(&server.url(), "service"));
    let run_of_service = service.run("doctor");
    assert!(run_of_service.out.contains("the role has every right"), "{run_of_service:?}");
    finds(&service.run("doctor"), 0, "warning", &["change feed", "may not write"]);
    run(&admin, "REVOKE SELECT ON api_key_changes FROM service").await;
    finds(&service.run("doctor"), 1, "error", &["rights", "check keys"]);
    run(&admin, "GRANT SELECT ON api_key_changes TO service; REVOKE DELETE ON users FROM service")
        .await;
    finds(&service.run("doctor"), 0, "warning", &["rights", "manage users"]);

    let pooler = PgBouncer::start(&server, "");
    let pooled = Program::at(&pooler.url()).run("doctor --timeout 6s");
    finds(&pooled, 0, "warning", &["notifications", "LISTEN"]);
    assert!(pooled.out.contains("an event came back after"), "{pooled:?}");
}

#[test]
fn faults_of_redis_are_found() {
    let program = Program::at_new_file();
    program.run("migrate").ok();
    let redis = Redis::with_settings(&["requirepass=right"]);
    let program = program.with("REDIS_URL", redis.url());
    finds(&program.run("doctor"), 0, "ok", &["Redis", "answers in"]);
    finds(&program.run("doctor"), 0, "ok", &["Redis memory", "noeviction"]);

    let program = program.with("REDIS_URL", redis.url().replace("right", "verysecret"));
    let wrong = program.run("doctor");
    finds(&wrong, 1, "error", &["Redis", "authentication failed"]);
    assert!(!wrong.out.contains("verysecret"), "{wrong:?}");
    // A change does not wait for Redis for long.
    let changed = program.run("user create ada@example.com");
    assert!(changed.err.contains("Redis can't be used"), "{changed:?}");
    changed.ok();

    let evicting = Redis::with_settings(&["maxmemory=10mb", "maxmemory-policy=allkeys-lru"]);
    let program = program.with("REDIS_URL", evicting.url());
    finds(&program.run("doctor"), 0, "warning", &["Redis memory", "allkeys-lru"]);
    let program = program.with("REDIS_URL", "redis://:verysecret@127.0.0.1:1/");
    let down = program.run("doctor");
    assert!(!down.out.contains("verysecret"), "{down:?}");
    finds(&down, 1, "error", &["Redis"]);
}

#[test]
fn a_database_without_tables_is_reported_before_redis_is_used() {
    let redis = Redis::start();
    let program = Program::at_new_file().with("REDIS_URL", redis.url());
    program.sql("CREATE TABLE other (x)");
    let began = std::time::Instant::now();
    let run = program.run("user create ada@example.com");
    assert!(!run.err.contains("Redis"), "{run:?}");
    assert!(began.elapsed() < std::time::Duration::from_secs(2), "{:?}", began.elapsed());
    run.fails(1, "run `tower-api-key migrate`");
}

#[test]
fn the_slots_of_a_cluster_are_checked() {
    let program = Program::at_new_file();
    program.run("migrate").ok();
    let cluster = RedisCluster::start();
    let urls = cluster.urls();
    let program = program.with("REDIS_URL", urls.join(","));
    finds(&program.run("doctor"), 0, "ok", &["Redis slots"]);
    let program = program.with("REDIS_URL", urls[0].clone());
    finds(&program.run("doctor"), 1, "error", &["Redis slots", "single server"]);
}

#[test]
fn a_change_deletes_the_entry_in_redis() {
    let redis = Redis::start();
    let program = Program::with_user().with("REDIS_URL", redis.url());
    program.run("key issue --user 1 --name laptop -o id").ok();
    let before = redis.command_counts();
    let revoked = program.run("key revoke 1 --yes");
    assert_eq!(revoked.err, "", "{revoked:?}");
    revoked.ok();
    let writes = |name: &str| redis.command_counts().get(name).copied().unwrap_or(0);
    let scripts = writes("evalsha") + writes("eval");
    let scripts_before: u64 = ["evalsha", "eval"].iter().filter_map(|name| before.get(*name)).sum();
    assert!(scripts > scripts_before, "{:?}", redis.command_counts());
}
