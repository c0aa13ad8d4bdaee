//! nginx sends a subrequest for each request to a service with the layer (`auth_request`), and serves a file and
//! another service only after a 2xx status.

use axum::{Router, http::StatusCode, routing::any};

use super::{METHODS, borrowed, denied_fields};
use crate::support::{
    Fixture, fixture,
    servers::Nginx,
    wire::{VERSIONS, exchange, request, serve},
};

const SECRET: &str = "for holders of a key";
const PATHS: [&str; 2] = ["/secret.txt", "/app"];

/// nginx with a file and another service behind the subrequest to `/auth`, which these directives are for.
async fn protected(fixture: &Fixture, http_only: bool, directives: &str) -> Nginx {
    let layer = fixture.layer();
    let layer = if http_only { layer.http_only() } else { layer };
    let auth = any(|| async { StatusCode::NO_CONTENT });
    let auth = serve(Router::new().route("/auth", auth).layer(layer)).await;
    let app = serve(Router::new().fallback(|| async { SECRET })).await;
    let server = format!(
        "location = /auth {{ internal; proxy_pass http://{auth}; proxy_pass_request_body off;
             proxy_set_header Content-Length \"\"; {directives} }}
         location = /secret.txt {{ auth_request /auth; }}
         location /app {{ auth_request /auth; proxy_pass http://{app}; }}"
    );
    Nginx::with_files(&[("secret.txt", SECRET)], "", &server)
}

/// Sends every kind of request that is to be denied, and some with a valid key.
async fn assert_protected(fixture: &Fixture, nginx: &Nginx) {
    let mut opened = Vec::new();
    for version in VERSIONS {
        let address = nginx.address(version);
        for method in METHODS {
            for fields in denied_fields() {
                for path in PATHS {
                    let fields = borrowed(&fields);
                    let answer = exchange(address, request(version, &method, path, &fields)).await;
                    if answer.status() != 401 || answer.body.contains(SECRET) {
                        opened.push(format!(
                            "{} for {version:?} {method} {path} {fields:?}",
                            answer.status()
                        ));
                    }
                }
            }
        }
        let authorization = format!("Bearer {}", fixture.key);
        for content_type in ["application/json", "application/grpc", "application/grpc-web"] {
            let fields = [("content-type", content_type), ("authorization", &*authorization)];
            for path in PATHS {
                let request = request(version, &http::Method::GET, path, &fields);
                let answer = exchange(address, request).await;
                assert_eq!((answer.status(), &*answer.body), (200, SECRET), "{version:?} {path}");
            }
        }
    }
    assert!(
        opened.is_empty(),
        "{} opened, the first: {:#?}",
        opened.len(),
        &opened[..opened.len().min(5)]
    );
}

#[tokio::test]
async fn a_subrequest_by_get_opens_nothing_to_a_denied_request() {
    let fixture = fixture().await;
    // What nginx does by default: GET over HTTP/1.0.
    assert_protected(&fixture, &protected(&fixture, false, "").await).await;
    assert_protected(&fixture, &protected(&fixture, false, "proxy_http_version 1.1;").await).await;
}

#[tokio::test]
async fn a_subrequest_by_the_method_of_the_request_opens_nothing_to_a_denied_request() {
    let fixture = fixture().await;
    for method in ["POST", "$request_method"] {
        for version in ["1.0", "1.1"] {
            let directives = format!("proxy_method {method}; proxy_http_version {version};");
            assert_protected(&fixture, &protected(&fixture, true, &directives).await).await;
        }
    }
}
