//! Each example, run as a user would run it.

mod support;

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use http::uri::PathAndQuery;
use support::servers::Postgres;
use tonic::{Code, metadata::MetadataValue, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_prost::ProstCodec;

/// A running example; ended when it goes out of scope.
struct Example {
    process: Child,
    /// What it printed until it was listening.
    lines: Vec<String>,
}

impl Example {
    fn run(name: &str, folder: &Path, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(path_of(name));
        command.current_dir(folder).env("ADDR", "127.0.0.1:0").stdout(Stdio::piped());
        let mut process = command.envs(variables.iter().copied()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, receiver) = mpsc::channel();
        // Goes on reading, so that the example never waits for somebody to read.
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)));
        });
        let mut example = Self { process, lines: Vec::new() };
        while !example.lines.last().is_some_and(|line| line.starts_with("Listening on ")) {
            let line = receiver.recv_timeout(Duration::from_secs(30));
            example
                .lines
                .push(line.unwrap_or_else(|_| panic!("{name} printed {:?}", example.lines)));
        }
        example
    }

    fn url(&self) -> &str {
        self.lines.last().unwrap().trim_start_matches("Listening on ")
    }

    /// The lines that are nothing but a key.
    fn keys(&self) -> Vec<&str> {
        let keys = self.lines.iter().map(|line| line.trim());
        keys.filter(|line| line.starts_with("tak_live_")).collect()
    }

    /// The curl lines that it printed to be tried.
    fn curl_lines(&self) -> Vec<&str> {
        let lines = self.lines.iter().map(|line| line.trim());
        lines.filter(|line| line.starts_with("curl ")).collect()
    }
}

impl Drop for Example {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a client reads line by line; the client is ended when this goes out of scope.
struct Stream {
    client: Child,
    lines: mpsc::Receiver<String>,
}

impl Stream {
    fn open(line: &str) -> Self {
        // In place of the shell, so that it is the client that is ended.
        let line = format!("exec {line} --silent --show-error");
        let client = Command::new("sh").args(["-c", &line]).stdout(Stdio::piped()).spawn();
        let mut client = client.unwrap();
        let output = BufReader::new(client.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = output.lines().map_while(Result::ok).filter(|line| !line.is_empty());
            lines.for_each(|line| drop(sender.send(line)));
        });
        Self { client, lines }
    }

    /// The next line that is not empty; `None` if the stream has ended.
    fn next_line(&self) -> Option<String> {
        match self.lines.recv_timeout(Duration::from_secs(20)) {
            Ok(line) => Some(line),
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("the stream neither goes on nor ends"),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

/// Examples are built with the tests, beside them.
fn path_of(example: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples").join(example)
}

/// Runs a command line and returns what it printed.
fn shell(line: &str) -> String {
    let line = format!("{line} --silent --show-error --max-time 20");
    let output = Command::new("sh").args(["-c", &line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().to_lowercase()
}

#[test]
fn the_quickstart_answers_curl_over_http_1_and_h2c() {
    let folder = tempfile::tempdir().unwrap();
    let example = Example::run("quickstart", folder.path(), &[]);
    let (url, key) = (format!("{}/me", example.url()), example.keys()[0]);

    let lines = example.curl_lines();
    assert_eq!(lines.len(), 3);
    for (protocol, version) in [("--http1.1", "http/1.1"), ("--http2-prior-knowledge", "http/2")] {
        let good = shell(&format!("{} {protocol}", lines[0]));
        assert!(good.starts_with(&format!("{version} 200")), "{good}");
        assert!(good.contains(r#""email":"ada@example.com""#), "{good}");

        let missing = shell(&format!("{} {protocol}", lines[1]));
        assert!(missing.starts_with(&format!("{version} 401")), "{missing}");
        assert!(missing.contains("www-authenticate: bearer realm=\"api\"\r\n"), "{missing}");
        assert!(missing.contains("content-type: application/problem+json\r\n"), "{missing}");
        assert!(missing.contains(r#""status":401"#), "{missing}");

        let wrong = shell(&format!("{} {protocol}", lines[2]));
        assert!(wrong.starts_with(&format!("{version} 401")), "{wrong}");
        assert!(wrong.contains("error=\"invalid_token\""), "{wrong}");

        let two = format!(
            "curl -i {url} -H 'Authorization: Bearer {key}' -H 'x-api-key: tak_live_other'"
        );
        let two = shell(&format!("{two} {protocol}"));
        assert!(two.starts_with(&format!("{version} 400")), "{two}");
        assert!(two.contains("error=\"invalid_request\""), "{two}");

        let head = shell(&format!("curl -I {url} {protocol}"));
        assert!(
            head.starts_with(&format!("{version} 401")) && head.trim_end().lines().count() > 1,
            "{head}"
        );
    }
}

#[test]
fn the_quickstart_shows_its_key_once_and_it_works_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let first = Example::run("quickstart", folder.path(), &[("DATABASE_URL", "mine.db")]);
    let key = first.keys()[0].to_owned();
    drop(first);
    assert!(folder.path().join("mine.db").exists());
    let second = Example::run("quickstart", folder.path(), &[("DATABASE_URL", "mine.db")]);
    assert!(second.keys().is_empty() && !second.lines.concat().contains(&key));
    let answer = shell(&format!("curl -i {}/me -H 'x-api-key: {key}'", second.url()));
    assert!(answer.starts_with("http/1.1 200"), "{answer}");
}

#[test]
fn the_axum_stack_lets_through_what_needs_no_key() {
    let folder = tempfile::tempdir().unwrap();
    let example = Example::run("axum_stack", folder.path(), &[]);
    let url = example.url();
    for (path, body) in [("health", "healthy\n"), ("greeting", "hello, guest!\n")] {
        let answer = shell(&format!("curl -i {url}/{path} -H 'Origin: https://example.com'"));
        assert!(answer.starts_with("http/1.1 200") && answer.ends_with(body), "{answer}");
        assert!(answer.contains("access-control-allow-origin: *\r\n"), "{answer}");
    }
    for path in ["me", "greeting"] {
        let preflight = shell(&format!(
            "curl -i -X OPTIONS {url}/{path} -H 'Origin: https://example.com' \
             -H 'Access-Control-Request-Method: POST' -H 'Access-Control-Request-Headers: authorization'"
        ));
        assert!(preflight.starts_with("http/1.1 200"), "{preflight}");
        assert!(preflight.contains("access-control-allow-headers: authorization"), "{preflight}");
    }
    // What needs a key does, and a page from elsewhere can read that.
    for request in ["me", "greeting -X POST"] {
        let denied = shell(&format!("curl -i {url}/{request} -H 'Origin: https://example.com'"));
        assert!(denied.starts_with("http/1.1 401"), "{denied}");
        assert!(denied.contains("access-control-allow-origin: *\r\n"), "{denied}");
    }
    let wrong = shell(&format!("curl -i {url}/greeting -H 'x-api-key: tak_live_wrong'"));
    assert!(wrong.starts_with("http/1.1 401"), "{wrong}");
}

#[test]
fn the_axum_stack_limits_keys_on_all_routes_together() {
    let folder = tempfile::tempdir().unwrap();
    let example = Example::run("axum_stack", folder.path(), &[]);
    let [everything, local, trial, capped] = example.keys()[..] else {
        panic!("{:?}", example.lines);
    };
    let ask = |request: &str, key: &str| {
        shell(&format!("curl -i {}/{request} -H 'Authorization: Bearer {key}'", example.url()))
    };
    for key in [everything, local] {
        let answer = ask("me", key);
        assert!(
            answer.starts_with("http/1.1 200") && answer.ends_with("ada@example.com\n"),
            "{answer}"
        );
    }
    assert!(ask("greeting", everything).ends_with("hello, ada@example.com!\n"));
    assert!(ask("greeting -X POST", everything).ends_with("changed\n"));
    assert!(ask("greeting -X POST", local).starts_with("http/1.1 403"));

    // A minute may end between two requests: six of them have one more than two minutes allow.
    let denied = std::iter::repeat_with(|| ["me", "greeting"]).flatten().take(6);
    let denied: Vec<_> =
        denied.map(|path| ask(path, trial)).filter(|answer| !answer.contains(" 200 ok")).collect();
    assert!((2..=4).contains(&denied.len()), "{denied:?}");
    for answer in &denied {
        assert!(answer.starts_with("http/1.1 429") && answer.contains("retry-after: "), "{answer}");
    }

    let statuses = ["me", "greeting", "me"].map(|path| ask(path, capped)[9..12].to_owned());
    assert_eq!(statuses, ["200", "200", "429"]);
}

#[tokio::test]
async fn the_tonic_example_protects_one_service_of_two() {
    let folder = tempfile::tempdir().unwrap();
    let example = Example::run("tonic", folder.path(), &[]);
    let channel = Endpoint::new(example.url().to_owned()).unwrap().connect().await.unwrap();
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.unwrap();

    let say_hello = async |header: &'static str, key: Option<String>| {
        let mut request = tonic::Request::new(());
        if let Some(key) = key {
            request.metadata_mut().insert(header, MetadataValue::try_from(key).unwrap());
        }
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.unwrap();
        let path = PathAndQuery::from_static("/example.Greeter/SayHello");
        let answer = client.unary(request, path, ProstCodec::<(), String>::default()).await;
        answer.map(tonic::Response::into_inner).map_err(|status| status.code())
    };
    let keys = example.keys();
    let bearer = |key: &str| Some(format!("Bearer {key}"));
    let hello = Ok("Hello, ada@example.com!".to_owned());
    assert_eq!(say_hello("authorization", bearer(keys[0])).await, hello);
    assert_eq!(say_hello("x-api-key", Some(keys[0].to_owned())).await, hello);
    for (value, code) in [
        (None, Code::Unauthenticated),
        (bearer("tak_live_wrong"), Code::Unauthenticated),
        (bearer(keys[1]), Code::PermissionDenied),
        // By the handler.
        (bearer(keys[2]), Code::PermissionDenied),
        (Some("Bearer".to_owned()), Code::InvalidArgument),
    ] {
        assert_eq!(say_hello("authorization", value).await, Err(code));
    }
}

#[test]
fn the_hyper_example_takes_the_key_as_a_user_name_or_in_a_header() {
    let folder = tempfile::tempdir().unwrap();
    let example = Example::run("hyper", folder.path(), &[]);
    for line in example.curl_lines() {
        for protocol in ["--http1.1", "--http2-prior-knowledge"] {
            let answer = shell(&format!("{line} {protocol}"));
            assert!(
                answer.contains(" 200") && answer.ends_with("hello, ada@example.com!\n"),
                "{answer}"
            );
        }
    }
    let denied = shell(&format!("curl -i {}", example.url()));
    assert!(
        denied.starts_with("http/1.1 401") && denied.contains("basic realm=\"api\""),
        "{denied}"
    );
}

#[test]
fn the_custom_store_checks_keys_from_its_text_and_one_that_it_minted() {
    let folder = tempfile::tempdir().unwrap();
    let example = Example::run("custom_store", folder.path(), &[]);
    let answer = shell(example.curl_lines()[0]);
    assert!(answer.ends_with("hello, ada@example.com!\n"), "{answer}");
    let other = shell(&format!("curl {} -H 'x-api-key: team-two-c9QmXw42'", example.url()));
    assert_eq!(other, "hello, bob@example.com!\n");
    let minted = shell(example.curl_lines()[1]);
    assert!(minted.ends_with("hello, eve@example.com!\n"), "{minted}");
    let wrong = shell(&format!("curl -i {} -H 'x-api-key: team-two-c9QmXw43'", example.url()));
    assert!(wrong.starts_with("http/1.1 401"), "{wrong}");
}

#[test]
fn the_sse_example_ends_its_stream_after_a_revoke() {
    let folder = tempfile::tempdir().unwrap();
    let example = Example::run("sse", folder.path(), &[]);
    let [open, revoke] = example.curl_lines()[..] else { panic!("{:?}", example.lines) };
    let stream = Stream::open(open);
    // It goes on for as long as the key is valid.
    for number in 1..=3 {
        let expected = format!("data: event {number} for ada@example.com");
        assert_eq!(stream.next_line(), Some(expected));
    }
    let revoked = shell(revoke);
    assert!(revoked.starts_with("http/1.1 204"), "{revoked}");
    let last = std::iter::from_fn(|| stream.next_line()).take(10).count();
    assert!(last <= 2, "{last} events after the revoke");
    let again = shell(&format!("{open} -i"));
    assert!(again.starts_with("http/1.1 401"), "{again}");
}

#[test]
fn the_postgres_example_starts_twice_on_one_database() {
    let (folder, server) = (tempfile::tempdir().unwrap(), Postgres::start());
    let url = server.url();
    let first = Example::run("postgres", folder.path(), &[("DATABASE_URL", &url)]);
    let second = Example::run("postgres", folder.path(), &[("DATABASE_URL", &url)]);
    let line = first.curl_lines()[0];
    for example in [&first, &second] {
        let answer = shell(&line.replace(first.url(), example.url()));
        assert!(answer.ends_with("hello, ada@example.com!\n"), "{answer}");
    }
    assert!(second.curl_lines().is_empty());
    let denied = shell(&format!("curl -i {}", first.url()));
    assert!(denied.contains("www-authenticate: bearer realm=\"acme\""), "{denied}");
}

#[test]
fn the_stock_openai_client_talks_to_the_gateway() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/bin/python");
    let mut has_client = Command::new(&python);
    has_client.args(["-c", "import openai"]).stderr(Stdio::null());
    if !has_client.status().is_ok_and(|status| status.success()) {
        println!(
            "SKIPPED: the openai client is not there; tests/run installs it where there is Python 3"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let example = Example::run("llm_gateway", folder.path(), &[]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_client.py");
    let keys = example.keys();
    assert_eq!(keys.len(), 5);
    let output = Command::new(python).arg(script).arg(example.url()).args(keys).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "all is well");
}
