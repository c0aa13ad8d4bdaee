//! Stock clients that send a large body with a request that is denied: each reads the denial, and none a broken pipe.

use std::{fs, path::PathBuf};

use axum::{Router, body::Bytes, extract::DefaultBodyLimit, routing::post};
use serde_json::Value;
use tempfile::NamedTempFile;
use tokio::process::Command;
use tower::ServiceBuilder;
use tower_api_key::{
    RateLimitLayer, RequireLayer, rate_limit::LocalRateLimiter, record::RateLimits,
};

use super::programs::{in_crate, is_there, lines, python};
use crate::support::{Fixture, fixture, servers::Nginx, unknown_key, wire::serve};

const SIZES: [usize; 2] = [500_000, 5_000_000];
const TIMES: usize = 30;

/// By default, curl expects a `100 Continue` before a body of more than 1 MB.
const PLAIN: &[&str] = &["-H", "expect:"];
/// Without `Content-Length`.
const CHUNKED: &[&str] = &["-H", "expect:", "-H", "transfer-encoding: chunked"];
/// A stream that is reset after its response makes curl 7.88 exit with 92.
const HTTP_2: &[&str] = &["-H", "expect:", "--http2-prior-knowledge"];
/// The response, or a `100 Continue`, comes before the body is sent.
const EXPECTING: &[&str] = &["-H", "expect: 100-continue"];

/// A program that sends the same upload several times.
#[derive(Debug, Clone, Copy)]
enum Client {
    /// With these options.
    Curl(&'static [&'static str]),
    Node(&'static str),
    Python(&'static str),
    Go,
}

impl Client {
    /// Sends `times` uploads of `bytes` to a URL. Returns a line for each: the status, and the one that the body names.
    async fn upload(self, url: &str, key: &str, bytes: usize, times: usize) -> Vec<String> {
        let (bytes_text, times_text) = (bytes.to_string(), times.to_string());
        let arguments = [url, key, &bytes_text, &times_text];
        match self {
            Self::Curl(options) => curl(options, url, key, bytes, times).await,
            Self::Node(client) => {
                lines(Command::new("node").arg(script("upload.mjs")).arg(client).args(arguments))
                    .await
            }
            Self::Python(client) => {
                lines(Command::new(python()).arg(script("upload.py")).arg(client).args(arguments))
                    .await
            }
            Self::Go => lines(Command::new(go_program()).args(arguments)).await,
        }
    }

    /// Uploads without a key and with a wrong one, of each size: a `401` each time.
    async fn assert_reads_every_401(self, url: &str) {
        for bytes in SIZES {
            for key in ["", &unknown_key()] {
                let read = self.upload(url, key, bytes, TIMES).await;
                let has_key = !key.is_empty();
                assert_eq!(
                    read, ["401 401"; TIMES],
                    "{self:?}, {bytes} bytes, with a key: {has_key}"
                );
            }
        }
    }
}

/// Each of the clients reads each denial, from the service and from nginx in front of it.
async fn assert_each_reads_every_401(clients: &[Client]) {
    let url = uploads(&fixture().await).await;
    let nginx = Nginx::start("", &format!("location / {{ proxy_pass {url}; {LIMIT} }}"));
    let behind_nginx = format!("http://{}", nginx.address(http::Version::HTTP_11));
    for client in clients {
        client.assert_reads_every_401(&format!("{url}/upload")).await;
        client.assert_reads_every_401(&format!("{behind_nginx}/upload")).await;
    }
}

async fn curl(options: &[&str], url: &str, key: &str, bytes: usize, times: usize) -> Vec<String> {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), vec![b'x'; bytes]).unwrap();
    let mut command = Command::new("curl");
    command.args(["--silent", "--max-time", "20", "--write-out", "\n=%{http_code} %{exitcode}\n"]);
    command.args(options).args(["-H", "content-type: application/octet-stream"]);
    if !key.is_empty() {
        command.args(["-H", &format!("x-api-key: {key}")]);
    }
    command.arg("--data-binary").arg(format!("@{}", file.path().display()));
    // One process for all of them, which uses a connection again where the server leaves it open.
    let (mut read, mut body) = (Vec::new(), String::new());
    for line in lines(command.arg(format!("{url}?[1-{times}]"))).await {
        let Some((status, exit_code)) = line.strip_prefix('=').and_then(|end| end.split_once(' '))
        else {
            body += &line;
            continue;
        };
        let named = serde_json::from_str::<Value>(&body).unwrap_or_default();
        body.clear();
        read.push(match exit_code {
            "0" => format!("{status} {}", named["status"]),
            _ => format!("failed: {exit_code}"),
        });
    }
    read
}

fn script(name: &str) -> PathBuf {
    in_crate("tests/clients").join(name)
}

fn go_program() -> PathBuf {
    in_crate("target/go/upload")
}

/// A service that reads uploads behind the layer and, on two routes, a guard.
async fn uploads(fixture: &Fixture) -> String {
    let upload = || post(|body: Bytes| async move { body.len().to_string() });
    let limited = ServiceBuilder::new().layer(RateLimitLayer::new(LocalRateLimiter::new()));
    let app = Router::new()
        .route("/upload", upload())
        .route("/scope", upload().layer(RequireLayer::scope("files:write")))
        .route("/limited", upload().layer(limited))
        .layer(DefaultBodyLimit::disable())
        .layer(fixture.layer());
    format!("http://{}", serve(app).await)
}

#[tokio::test]
async fn curl_reads_why_its_upload_is_denied() {
    let url = uploads(&fixture().await).await + "/upload";
    for options in [PLAIN, CHUNKED, EXPECTING] {
        Client::Curl(options).assert_reads_every_401(&url).await;
    }
}

#[tokio::test]
async fn curl_over_http_2_reads_why_its_upload_is_denied() {
    let url = uploads(&fixture().await).await + "/upload";
    for bytes in SIZES {
        for _ in 0..TIMES {
            // A process for each: curl 7.88 can't use such a connection again, whatever the response is.
            let read = Client::Curl(HTTP_2).upload(&url, &unknown_key(), bytes, 1).await;
            assert_eq!(read, ["401 401"], "{bytes} bytes");
        }
    }
}

#[tokio::test]
async fn node_reads_why_its_upload_is_denied() {
    if !is_there("node", &["--eval", "fetch"]).await {
        return;
    }
    assert_each_reads_every_401(&["http", "fetch"].map(Client::Node)).await;
}

#[tokio::test]
async fn python_reads_why_its_upload_is_denied() {
    if !is_there(python(), &["--version"]).await {
        return;
    }
    let mut clients = ["http.client", "urllib"].map(Client::Python).to_vec();
    if is_there(python(), &["-c", "import requests"]).await {
        clients.push(Client::Python("requests"));
    }
    assert_each_reads_every_401(&clients).await;
}

#[tokio::test]
async fn go_reads_why_its_upload_is_denied() {
    if !is_there("go", &["version"]).await {
        return;
    }
    let mut build = Command::new("go");
    build.env("CGO_ENABLED", "0").env("GOCACHE", in_crate("target/go/cache"));
    build.args(["build", "-o"]).arg(go_program()).arg(script("upload.go"));
    assert!(build.status().await.unwrap().success(), "{build:?}");
    assert_each_reads_every_401(&[Client::Go]).await;
}

#[tokio::test]
async fn a_guards_denial_of_an_upload_is_read_as_well() {
    let fixture = fixture().await;
    let url = uploads(&fixture).await;
    let mut none = RateLimits::default();
    none.per_minute = Some(0);
    let limited = fixture.issue(|key| key.rate_limits(none)).await;
    let mut clients = vec![Client::Curl(PLAIN), Client::Curl(EXPECTING)];
    if is_there("node", &["--eval", "fetch"]).await {
        clients.extend([Client::Node("http"), Client::Node("fetch")]);
    }
    if is_there(python(), &["--version"]).await {
        clients.extend([Client::Python("http.client"), Client::Python("urllib")]);
    }
    let bytes = SIZES[1];
    for client in clients {
        let read = client.upload(&format!("{url}/scope"), &fixture.key, bytes, 3).await;
        assert_eq!(read, ["403 403"; 3], "{client:?}");
        let key = limited.expose_secret();
        let read = client.upload(&format!("{url}/limited"), key, bytes, 3).await;
        assert_eq!(read, ["429 429"; 3], "{client:?}");
    }
    // What is let in arrives whole.
    let read = Client::Curl(PLAIN).upload(&format!("{url}/upload"), &fixture.key, bytes, 1).await;
    assert_eq!(read, ["200 null"]);
}

/// By default, nginx takes bodies of at most 1 MB.
const LIMIT: &str = "client_max_body_size 10m;";

async fn assert_nginx_passes_every_denial_on(directives: &str) {
    let fixture = fixture().await;
    let url = uploads(&fixture).await;
    let server = format!("location / {{ proxy_pass {url}; {LIMIT} {directives} }}");
    let nginx = Nginx::start("", &server);
    let url = format!("http://{}", nginx.address(http::Version::HTTP_11));
    Client::Curl(PLAIN).assert_reads_every_401(&format!("{url}/upload")).await;
    for bytes in SIZES {
        let read =
            Client::Curl(PLAIN).upload(&format!("{url}/scope"), &fixture.key, bytes, TIMES).await;
        assert_eq!(read, ["403 403"; TIMES], "{bytes} bytes\n{}", nginx.log());
    }
}

#[tokio::test]
async fn nginx_passes_the_denial_of_an_upload_on() {
    assert_nginx_passes_every_denial_on("").await;
}

#[tokio::test]
async fn nginx_passes_the_denial_of_an_upload_on_that_it_does_not_buffer() {
    assert_nginx_passes_every_denial_on("proxy_request_buffering off;").await;
    assert_nginx_passes_every_denial_on("proxy_request_buffering off; proxy_http_version 1.1;")
        .await;
}
