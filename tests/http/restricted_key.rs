//! What callers see whose key is for some endpoints or addresses alone.

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tower_api_key::{Denial, denial::Forbidden, middleware::ClientAddr, record::AllowedNetwork};

use crate::support::{self, fixture, rule, send};

fn network(text: &str) -> AllowedNetwork {
    text.parse().unwrap()
}

fn request(method: &str, path: &str, key: &str, peer: Option<&str>) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(path).header("x-api-key", key);
    if let Some(peer) = peer {
        request = request.extension(ClientAddr(peer.parse().unwrap()));
    }
    request.body(Full::default()).unwrap()
}

#[tokio::test]
async fn a_key_with_endpoint_rules_is_denied_everywhere_else() {
    let setting = fixture().await;
    let rules = [rule("POST /v1/chat"), rule("GET /files/*")];
    let key = setting.issue(|new| new.allowed_endpoints(rules)).await;
    for (method, path, status) in [
        ("POST", "/v1/chat", 200),
        ("POST", "/v1/chat?stream=true", 200),
        ("GET", "/files/a/b", 200),
        ("HEAD", "/files/a", 200),
        ("GET", "/v1/chat", 403),
        ("POST", "/v1/chat/", 403),
        ("POST", "/v1/cha%74", 403),
        ("POST", "/v1//chat", 403),
        ("POST", "//v1/chat", 403),
        ("GET", "/files", 403),
        ("GET", "/files/../admin", 403),
        ("GET", "/files/%2e%2e/admin", 403),
        ("GET", "/files/..%2fadmin", 403),
        ("GET", "/files//admin", 403),
        ("GET", "/other?x=/files/a", 403),
    ] {
        let answer = send(&setting.layer(), request(method, path, key.expose_secret(), None)).await;
        assert_eq!(answer.status(), status, "{method} {path}");
        let denial = answer.response.extensions().get::<Denial>();
        let is_endpoint = matches!(denial, Some(Denial::Forbidden(Forbidden::Endpoint)));
        assert_eq!(is_endpoint, status == 403);
        if status == 403 {
            assert_eq!(answer.header("content-type"), Some("application/problem+json"));
            assert!(answer.body.contains("the API key may not call this endpoint"));
        }
    }
    let anything = send(&setting.layer(), request("GET", "/files//..", &setting.key, None)).await;
    assert_eq!(anything.status(), 200, "a key without rules may go anywhere");
}

#[tokio::test]
async fn a_key_for_one_grpc_method_is_denied_the_others_in_the_protocols_own_way() {
    let setting = fixture().await;
    let key = setting.issue(|new| new.allowed_endpoints([rule("/pkg.Service/Method")])).await;
    for (path, status) in [("/pkg.Service/Method", None), ("/pkg.Service/Other", Some("7"))] {
        let request =
            support::grpc(request("POST", path, key.expose_secret(), None), "application/grpc");
        let answer = send(&setting.layer(), request).await;
        assert_eq!((answer.status(), answer.header("grpc-status")), (200, status));
    }
}

#[tokio::test]
async fn a_key_with_address_rules_is_denied_from_anywhere_else_and_from_nowhere() {
    let setting = fixture().await;
    let rules = ["192.0.2.0/24", "2001:db8::/48", "198.51.100.7"].map(network);
    let key = setting.issue(|new| new.allowed_ips(rules)).await;
    for (peer, status) in [
        (Some("192.0.2.9"), 200),
        (Some("::ffff:192.0.2.9"), 200),
        (Some("2001:db8::5"), 200),
        (Some("198.51.100.7"), 200),
        (Some("198.51.100.8"), 403),
        (Some("192.0.3.1"), 403),
        (Some("::ffff:192.0.3.1"), 403),
        (Some("::192.0.2.9"), 403),
        (Some("2001:db8:1::5"), 403),
        (None, 403),
    ] {
        let answer = send(&setting.layer(), request("GET", "/", key.expose_secret(), peer)).await;
        assert_eq!(answer.status(), status, "{peer:?}");
        if status == 403 {
            assert!(answer.body.contains("may not be used from this address"), "{}", answer.body);
            let denial = answer.response.extensions().get::<Denial>();
            assert!(matches!(denial, Some(Denial::Forbidden(Forbidden::Address))));
        }
    }
    for rules in [["0.0.0.0/0"], ["::/0"]] {
        let key = setting.issue(|new| new.allowed_ips(rules.map(network))).await;
        let unknown = send(&setting.layer(), request("GET", "/", key.expose_secret(), None)).await;
        assert_eq!(unknown.status(), 403, "an unknown address is in no network");
    }
    let free = send(&setting.layer(), request("GET", "/", &setting.key, None)).await;
    assert_eq!(free.status(), 200, "a key without rules needs no address");
}
