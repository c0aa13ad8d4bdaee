//! From nothing to a working, rotated and revoked key, with the program alone.

use serde_json::Value;
use tower_api_key::{
    Authenticator, KeyScheme, PostgresStore, SqliteStore, key::KeyFormat, store::KeyStore,
};

use crate::{program::Program, support::servers::Postgres};

/// What the service at the same database says about a key.
async fn works(store: impl KeyStore, key: &str) -> bool {
    Authenticator::new(store).authenticate(key).await.is_ok()
}

async fn life<S: KeyStore>(program: &Program, store: impl Fn() -> S) {
    let check = program.run("migrate --check");
    assert_eq!(check.code, 1, "{check:?}");
    assert!(check.out.contains("table api_keys"), "{check:?}");
    program.run("migrate --dry-run").ok();
    assert_eq!(program.run("migrate --check").code, 1, "a dry run changes nothing");
    program.run("migrate").ok();
    program.run("migrate").ok();
    assert_eq!(program.run("migrate --check").ok(), "The schema is up to date.\n");

    let user = program.run("user create ada@example.com --role admin -o json").json();
    assert!(user["id"].is_i64(), "{user}");
    assert_eq!(user["role"], "admin");
    let user = user["id"].to_string();

    let issue = format!(
        "key issue --user {user} --name laptop --scope chat:write --expires 90d --limit 100/min -o secret"
    );
    let issued = program.run(&issue);
    let first = issued.out.trim_end().to_owned();
    assert_eq!(issued.out, format!("{first}\n"), "the secret is alone on standard output");
    assert!(first.starts_with("tak_live_"), "{issued:?}");
    assert!(!issued.err.contains(&first), "{issued:?}");
    assert!(works(store(), &first).await);

    let inspected = program.run_with_input("key inspect -o json", &format!("{first}\n")).json();
    assert_eq!(inspected["check"], "right");
    assert_eq!(inspected["accepted"], true);
    let keys = program.run("key list -o json").json();
    assert_eq!(keys[0]["prefix"], inspected["lookup_id"]);
    assert_eq!(keys[0]["rate_limits"]["per_minute"], 100);
    assert_eq!(keys[0]["scopes"], serde_json::json!(["chat:write"]));
    let id = keys[0]["id"].to_string();

    let second = program.run(&format!("key rotate {id} --grace 24h -o secret")).ok();
    let second = second.trim_end();
    assert_ne!(first, second);
    assert!(works(store(), &first).await, "the previous secret works in its grace period");
    assert!(works(store(), second).await);
    program.run(&format!("key rotate {id} -o secret")).fails(4, "grace period");

    program.run(&format!("key revoke {id} --reason lost")).fails(2, "--yes");
    assert!(works(store(), second).await, "nothing was done without a confirmation");
    program.run(&format!("key revoke {id} --reason lost --yes")).ok();
    assert!(!works(store(), &first).await);
    assert!(!works(store(), second).await);
    let shown = program.run(&format!("key show {id} -o json")).json();
    assert_eq!(shown["revoke_reason"], "lost");
    assert_eq!(shown["revoked_by"], "cli:tester");

    let explained =
        program.run(&format!("explain --key-id {id} --method POST --path /v1/chat --ip 1.2.3.4"));
    assert_eq!(explained.code, 5, "{explained:?}");
    assert!(explained.out.contains("Denied with status 401: the API key was revoked"));

    let audit = program.run("audit -o jsonl").ok();
    for secret in [first.as_str(), second] {
        assert!(!audit.contains(&secret[20..]), "no secret is in the audit");
    }
    assert!(!audit.contains("sha256$"));
    let entries: Vec<Value> =
        audit.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let actions: Vec<_> = entries.iter().map(|entry| entry["action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["revoke", "rotate", "issue", "create_user"]);
    assert!(entries.iter().all(|entry| entry["actor"] == "cli:tester"), "{audit}");
    assert_eq!(entries[0]["reason"], "lost");

    let doctor = program.run("doctor");
    assert_eq!(doctor.code, 0, "{doctor:?}");
    assert!(doctor.out.contains("an event came back after"), "{doctor:?}");
}

#[tokio::test]
async fn a_key_lives_and_ends_in_sqlite() {
    let program = Program::at_new_file();
    life(&program, || SqliteStore::open(program.database()).unwrap()).await;
}

#[tokio::test]
async fn a_key_lives_and_ends_in_postgres() {
    let server = Postgres::start();
    let url = server.url();
    life(&Program::at(&url), || PostgresStore::new(&url).unwrap()).await;
}

#[tokio::test]
async fn pepper_and_mint_secret_come_from_the_environment_or_from_files() {
    let program = Program::with_user();
    let (pepper, mint) = ("a pepper of 16 bytes or more", "a mint secret of 16 bytes");
    let file = program.file("pepper", &format!("{pepper}\n"));
    let program = program
        .with("TOWER_API_KEY_FORMAT", "acme_test")
        .with("TOWER_API_KEY_MINT_SECRET", mint)
        .with("TOWER_API_KEY_PEPPER_FILE", file.to_str().unwrap());
    let key = program.run("key issue --user 1 --name laptop -o secret").ok();
    assert!(key.starts_with("acme_test_"), "{key}");
    let format = KeyFormat::structured("acme", "test").unwrap().with_mint_secret(mint).unwrap();
    let scheme = KeyScheme::builder().format(format).pepper(pepper).build().unwrap();
    let store = SqliteStore::open(program.database()).unwrap();
    let node = Authenticator::builder(store).scheme(scheme).build();
    assert!(node.authenticate(key.trim_end()).await.is_ok());

    let inspect = |program: &Program, options: &str| {
        let inspected = program.run_with_input(&format!("key inspect -o json{options}"), &key);
        let shown: Value = serde_json::from_str(&inspected.out).unwrap();
        (inspected.code, shown["minted_under"].as_str().unwrap().to_owned())
    };
    assert_eq!(inspect(&program, ""), (0, "the current mint secret".to_owned()));
    let retired = program.file("retired", mint);
    let program = program.with("TOWER_API_KEY_MINT_SECRET", "another secret of 16 bytes");
    assert_eq!(inspect(&program, ""), (1, "no known mint secret".to_owned()));
    let options = format!(" --retired-mint-secret-file {}", retired.display());
    assert_eq!(inspect(&program, &options), (0, "retired mint secret 1".to_owned()));
}

#[test]
fn the_printed_sql_makes_the_schema() {
    let program = Program::at_new_file();
    let sql = program.run("migrate --dry-run").ok();
    assert!(!program.database().exists(), "a dry run creates no file");
    program.sql(&sql);
    assert_eq!(program.run("migrate --check").ok(), "The schema is up to date.\n");
    assert_eq!(program.run("migrate --dry-run").ok(), "-- The schema is up to date.\n");

    let server = Postgres::start();
    let program = Program::at(&server.url());
    let sql = program.run("migrate --dry-run").ok();
    server.program("psql", &["-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres"], &sql);
    assert_eq!(program.run("migrate --check").ok(), "The schema is up to date.\n");
    program.run("user create ada@example.com").ok();
}

#[test]
fn adopted_tables_are_reviewed() {
    let program = Program::at_new_file();
    program.sql(
        "CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT);
        CREATE TABLE api_keys (id INTEGER PRIMARY KEY, user_id INTEGER, key_prefix TEXT, key_hash TEXT);
        INSERT INTO users VALUES (1, 'ada@example.com');
        INSERT INTO api_keys VALUES (1, 1, 'abc', 'no hash');",
    );
    let check = program.run("migrate --check");
    assert!(check.out.contains("column api_keys.scopes"), "{check:?}");
    program.sql(&program.run("migrate --dry-run").ok());
    assert_eq!(program.run("migrate --check").ok(), "The schema is up to date.\n");
    let listed = program.run("key list");
    assert!(listed.err.contains("key 1 can't be read"), "{listed:?}");
    assert!(!listed.err.contains("no hash"), "{listed:?}");
    program.run("key revoke 1 --yes").ok();

    let foreign = Program::at_new_file();
    foreign.sql("CREATE TABLE users (id INTEGER PRIMARY KEY); CREATE TABLE api_keys (id INTEGER PRIMARY KEY);");
    for line in ["migrate", "migrate --check", "migrate --dry-run"] {
        foreign.run(line).fails(1, "users.email");
    }
    let doctor = foreign.run("doctor");
    assert_eq!(doctor.code, 1, "{doctor:?}");
    assert!(doctor.out.contains("users.email"), "{doctor:?}");
}

#[tokio::test]
async fn every_field_of_a_key_can_be_set_changed_copied_and_cleared() {
    let program = Program::with_user();
    let words = [
        "key",
        "issue",
        "--user",
        "ada@example.com",
        "--name",
        "gate",
        "--description",
        "of the gate",
        "--scope",
        "chat:write",
        "--scope",
        "read:*",
        "--permission",
        "open",
        "--model",
        "small",
        "--endpoint",
        "POST /v1/chat",
        "--ip",
        "10.0.0.0/8",
        "--limit",
        "100/min",
        "--limit",
        "1000/day",
        "--budget",
        "20.00/month",
        "--not-before",
        "2026-01-01",
        "--expires",
        "2090-01-01",
        "--metadata",
        r#"{"team":7}"#,
        "-o",
        "json",
    ];
    let key: Value = serde_json::from_str(&program.run_words(&words, "").ok()).unwrap();
    assert_eq!(key["budget"], serde_json::json!({ "limit_cents": 2000, "period": "monthly" }));
    assert_eq!(key["allowed_endpoints"][0], "POST /v1/chat");
    assert_eq!(key["expires_at"], "2090-01-01T00:00:00Z");
    assert!(key["secret"].as_str().unwrap().starts_with("tak_live_"));
    let revision = key["revision"].to_string();

    let copy = program.run("key issue --user 1 --name copy --like 1 --limit 5/min -o json").json();
    for field in [
        "scopes",
        "permissions",
        "allowed_models",
        "allowed_ips",
        "budget",
        "metadata",
        "expires_at",
    ] {
        assert_eq!(copy[field], key[field], "{field}");
    }
    assert_eq!(
        copy["rate_limits"],
        serde_json::json!({ "per_minute": 5, "per_hour": null, "per_day": 1000 })
    );

    let update = format!(
        "key update 1 --name door --clear models --clear limit-per-day --if-revision {revision} -o json"
    );
    let changed = program.run(&update).json();
    assert_eq!((&changed["name"], &changed["scopes"]), (&Value::from("door"), &key["scopes"]));
    assert_eq!(changed["allowed_models"], serde_json::json!([]));
    assert_eq!(changed["rate_limits"]["per_minute"], 100);
    assert_eq!(changed["rate_limits"]["per_day"], Value::Null);
    program.run(&update).fails(4, "its revision is now");
    let changed = program.run("key update 1 --clear budget --expires never -o json").json();
    assert_eq!((&changed["budget"], &changed["expires_at"]), (&Value::Null, &Value::Null));
    program.run("key update 1").fails(2, "nothing to change");
}

#[tokio::test]
async fn keys_are_listed_by_filters_and_in_pages() {
    let program = Program::with_user();
    program.run("user create bob@example.com").ok();
    for n in 0..5 {
        let owner = if n % 2 == 0 { "1" } else { "bob@example.com" };
        program.run(&format!("key issue --user {owner} --name key-{n} --scope s:{n} -o id")).ok();
    }
    program.run("key revoke 2 --yes").ok();
    let ids = |line: &str| program.run(&format!("key list -o id {line}")).ok().replace('\n', " ");
    assert_eq!(ids("--owner 1"), "1 3 5 ");
    assert_eq!(ids("--owner bob@example.com --active"), "4 ");
    assert_eq!(ids("--revoked"), "2 ");
    assert_eq!(ids("--contains EY-3"), "4 ");
    assert_eq!(ids("--scope s:4"), "5 ");
    assert_eq!(ids("--expiring-within 30d"), "");
    assert_eq!(ids("--unused-for 1d"), "1 2 3 4 5 ");
    let page = program.run("key list -o id --limit 2");
    assert_eq!(page.out, "1\n2\n");
    assert!(page.err.contains("--after 2"), "{page:?}");
    assert_eq!(ids("--limit 2 --after 2"), "3 4 ");
    assert_eq!(program.run("key list -o jsonl --all").ok().lines().count(), 5);

    program.run("key revoke --owner 1 --reason left").fails(2, "--yes");
    assert_eq!(
        program.run("key revoke --owner 1 --reason left --yes -o json").json(),
        serde_json::json!([1, 3, 5])
    );
    assert_eq!(ids("--active"), "4 ");
    program.run("user delete 1 --yes").fails(4, "owns keys");
    program.run("user deactivate bob@example.com").ok();
    assert!(program.run("key show 4").ok().contains("owner inactive"));
    program.run("user reactivate 2").ok();
    program.run("key reactivate 2").ok();
    program.run("key delete 4").fails(2, "--yes");
    program.run("key delete 4 --yes").ok();
    program.run("key show 4").fails(3, "no such key");
    assert_eq!(program.run("audit --key 4 -o jsonl").ok().lines().count(), 2);
}
