//! Everything that can be typed: one sentence that says what to do, the exit code, and nothing half done.

use crate::{
    program::Program,
    support::{
        database::{run, url_of_role},
        eventually::eventually,
        servers::Postgres,
    },
};

#[test]
fn wrong_values_are_reported_before_anything_is_done() {
    let program = Program::with_user();
    program.run("key issue --user 1 --name laptop -o id").ok();
    let entries = || program.run("audit --all -o id").ok();
    let before = entries();
    let long_name = "x".repeat(100_000);
    let issue = |options: &[&str]| {
        let words = ["key", "issue", "--user", "1", "--name", "a"];
        program.run_words(&[&words, options].concat(), "")
    };
    issue(&["--expires", "yesterday"]).fails(2, "write a time as 90d");
    issue(&["--expires", "2020-01-01"]).fails(2, "expires_at is in the past");
    issue(&["--expires", "5"]).fails(2, "90d");
    issue(&["--expires", "10d", "--not-before", "20d"])
        .fails(2, "expires_at is not after not_before");
    issue(&["--ip", "10.0.0.0/33"]).fails(2, "CIDR");
    issue(&["--ip", "10.0.0"]).fails(2, "CIDR");
    issue(&["--endpoint", "chat"]).fails(2, "does not start with a slash");
    issue(&["--endpoint", "POST /a/../b"]).fails(2, "dot segment");
    issue(&["--budget", "20.00"]).fails(2, "20.00/month");
    issue(&["--budget", "20.001/month"]).fails(2, "20.00/month");
    issue(&["--limit", "100"]).fails(2, "100/min");
    issue(&["--limit", "100/min", "--limit", "5/min"]).fails(2, "twice");
    issue(&["--limit", "99999999999999999999/min"]).fails(2, "100/min");
    issue(&["--limit", "9999999999999999999/min"]).fails(2, "is more than");
    issue(&["--metadata", "{team}"]).fails(2, "JSON");
    issue(&["--scope", ""]).fails(2, "empty entry");
    issue(&["--description", "a\u{1b}[2J"]).fails(2, "control character");
    program
        .run_words(&["key", "issue", "--user", "1", "--name", &long_name], "")
        .fails(2, "name has more than 255 bytes");
    program.run("key issue --user 99 --name a").fails(3, "no such user");
    program.run("key issue --user ada --name a").fails(2, "e-mail address");
    program.run("key issue --user nobody@example.com --name a").fails(3, "no such user");
    program.run("key issue --user 1 --name a --like 99").fails(3, "no such key");
    program.run("key issue --name a").fails(2, "--user");
    program.run("user create ada@example.com").fails(4, "taken");
    program.run("user create ada").fails(2, "not an e-mail address");
    program
        .run_words(&["user", "create", "b@example.com", "--role", ""], "")
        .fails(2, "role is empty");
    program.run("user update 1").fails(2, "--email");
    program.run("user show 99").fails(3, "no such user");
    for command in
        ["show", "end-grace --yes", "reactivate", "delete --yes", "usage", "rotate", "revoke --yes"]
    {
        program.run(&format!("key {command} 99")).fails(3, "no such key");
    }
    program.run("key update 99 --name a").fails(3, "no such key");
    program.run("key update 1 --name a --if-revision 1").fails(4, "revision");
    program.run("key show abc").fails(2, "abc");
    program.run("key rotate 1 --grace soon").fails(2, "24h");
    program.run("key rotate 1 --grace 0").fails(2, "--yes");
    program.run("key revoke --yes").fails(2, "required");
    program.run("key usage 1 --from 2026-02-01 --to 2026-01-01").fails(2, "--from is after --to");
    program.run("audit --prune-before 1d").fails(2, "--yes");
    program.run("explain --key-id 99 --method GET --path /").fails(3, "no such key");
    program.run("explain --key-id 1 --path /").fails(2, "--method");
    program.run("nonsense").fails(2, "nonsense");
    assert_eq!(entries(), before, "nothing was changed");
}

#[test]
fn wrong_secrets_and_formats_are_reported() {
    let program = Program::with_user();
    let issue = "key issue --user 1 --name a";
    program.run(&format!("{issue} --format acme")).fails(2, "BRAND_ENV");
    program.run(&format!("{issue} --format acme_staging-1")).fails(2, "letters and digits");
    program.run(&format!("{issue} --pepper-file nothing")).fails(2, "nothing can't be read");
    let empty = program.file("empty", "\n");
    program.run(&format!("{issue} --pepper-file {}", empty.display())).fails(2, "no secret");
    let short = program.file("short", "tooshort\n");
    let short = program.run(&format!("{issue} --mint-secret-file {}", short.display()));
    assert!(!short.err.contains("tooshort"), "{short:?}");
    short.fails(2, "16 bytes");
    let pepper = program.file("pepper", "a pepper of 16 bytes or more\n");
    let program = program.with("TOWER_API_KEY_PEPPER_FILE", pepper.to_str().unwrap());
    program.run(&format!("{issue} --format acme_live -o secret")).ok().starts_with("acme_live_");

    program.run_with_input("key inspect", "").fails(2, "empty");
    program.run_with_input("key inspect", "a b").fails(2, "not one key");
    let unknown = program.run_with_input("key inspect", "sk-something-else");
    assert_eq!(unknown.code, 1, "{unknown:?}");
    assert!(!unknown.out.contains("something"), "{unknown:?}");
}

#[test]
fn a_database_that_can_not_be_used_is_reported() {
    let program = Program::at_new_file();
    program.run("key list").fails(6, "run `tower-api-key migrate` first");
    assert!(!program.database().exists(), "no file was created");
    program.sql("CREATE TABLE other (x)");
    program.run("key list").fails(1, "run `tower-api-key migrate`");
    program.run("user create ada@example.com").fails(1, "run `tower-api-key migrate`");
    program.run("migrate").ok();
    // One version behind: a column and its trigger are missing.
    program.sql("DROP TRIGGER api_key_note; DROP TABLE api_key_audit;");
    program.run("key issue --user 1 --name a").fails(3, "no such user");
    program.run("user create ada@example.com").fails(1, "run `tower-api-key migrate`");
    assert_eq!(program.run("migrate --check").code, 1);
    program.run("migrate").ok();
    program.run("user create ada@example.com").ok();

    let text = program.file("text.db", &"this is not a database ".repeat(100));
    Program::at(&format!("sqlite:{}", text.display())).run("user list").fails(1, "not a database");
    Program::at("").run("key list").fails(2, "DATABASE_URL");
    let mysql = Program::at("mysql://ada:verysecret@localhost/x").run("key list");
    assert!(!mysql.err.contains("verysecret"), "{mysql:?}");
    mysql.fails(2, "sqlite:");
    let closed = Program::at("postgres://ada:verysecret@127.0.0.1:1/x").run("key list");
    assert!(!closed.err.contains("verysecret"), "{closed:?}");
    closed.fails(6, "can't be reached");
    let malformed = Program::at("postgres://ada:verysecret@localhost:port/x").run("key list");
    assert!(!malformed.err.contains("verysecret"), "{malformed:?}");
    malformed.fails(2, "can't be parsed");
}

#[tokio::test]
async fn a_standby_is_read_and_not_written() {
    let server = Postgres::start();
    let program = Program::at(&server.url());
    program.run("migrate").ok();
    program.run("user create ada@example.com").ok();
    let standby = Postgres::standby(&server, server.port());
    let standby = Program::at(&standby.url());
    eventually("the standby has the user", async || standby.run("user list -o id").out == "1\n")
        .await;
    assert_eq!(standby.run("migrate --check").ok(), "The schema is up to date.\n");
    for line in ["user create bob@example.com", "key issue --user 1 --name a -o secret"] {
        standby.run(line).fails(6, "read-only");
    }
    let doctor = standby.run("doctor");
    assert_eq!(doctor.code, 0, "{doctor:?}");
    assert!(doctor.out.contains("read-only, as a standby is"), "{doctor:?}");
}

#[tokio::test]
async fn a_wrong_password_and_a_missing_right_are_reported() {
    let mut server = Postgres::start();
    let program = Program::at(&server.url());
    program.run("key list").fails(1, "run `tower-api-key migrate`");
    program.run("migrate").ok();
    let admin = server.client().await;
    run(&admin, "CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        .await;
    let reader = Program::at(&url_of_role(&server.url(), "reader"));
    assert_eq!(reader.run("user list -o json").ok(), "[]\n");
    reader.run("user create ada@example.com").fails(5, "INSERT on users");
    run(&admin, "DROP TRIGGER api_key_note ON api_keys").await;
    reader.run("migrate").fails(5, "owner");
    program.run("migrate").ok();

    run(&admin, "ALTER DATABASE postgres SET default_transaction_read_only = on").await;
    program.run("user create ada@example.com").fails(6, "read-only");
    run(&admin, "SET default_transaction_read_only = off; ALTER DATABASE postgres RESET ALL").await;

    run(&admin, "COMMENT ON TABLE api_key_changes IS 'tower-api-key 99 abc'").await;
    program.run("user create ada@example.com").ok();
    let migrated = program.run("migrate").ok();
    assert!(migrated.contains("newer version"), "{migrated}");
    let newer = program.run("doctor");
    assert!(newer.out.contains("newer version"), "{newer:?}");
    drop(admin);

    let folder = server.folder().join("data/pg_hba.conf");
    let rules = "local all all scram-sha-256\nhost all all 127.0.0.1/32 scram-sha-256\n";
    let client = server.client().await;
    run(&client, "ALTER ROLE app PASSWORD 'right'").await;
    drop(client);
    std::fs::write(folder, rules).unwrap();
    server.stop();
    server.start_again();
    let url = server.tcp_url("").replace("app@", "app:verysecret@");
    for line in ["key list", "doctor", "migrate"] {
        let wrong = Program::at(&url).run(line);
        assert!(!format!("{}{}", wrong.out, wrong.err).contains("verysecret"), "{wrong:?}");
        assert_eq!(wrong.code, 6, "{wrong:?}");
    }
}
