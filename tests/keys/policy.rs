//! What endpoint rules and networks allow. What callers see of them is in `tests/http/restricted_key.rs`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::Method;
use proptest::prelude::*;
use tower_api_key::record::{AllowedNetwork, EndpointRule};

use crate::support::rule;

fn network(text: &str) -> AllowedNetwork {
    text.parse().unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_rule_allows_what_it_names_and_nothing_else() {
    // The rule; what it allows; what it does not.
    let table: &[(&str, &[&str], &[&str])] = &[
        (
            "/v1/chat",
            &["GET /v1/chat", "POST /v1/chat", "PURGE /v1/chat"],
            &["GET /v1/chat/", "GET /v1/cha", "GET /v1/chatx", "GET /V1/chat", "GET /v1", "GET /"],
        ),
        (
            "/v1/*",
            &["GET /v1/chat", "DELETE /v1/a/b/c", "GET /v1/*", "GET /v1/a%20b", "GET /v1/..."],
            &["GET /v1", "GET /v10/chat", "GET /v2/chat", "GET /x/v1/chat", "GET /"],
        ),
        ("POST /v1/chat", &["POST /v1/chat"], &["GET /v1/chat", "post /v1/chat", "POST /v1/"]),
        ("post /v1/*", &["POST /v1/chat"], &["PUT /v1/chat", "HEAD /v1/chat"]),
        ("GET /v1/*", &["GET /v1/a", "HEAD /v1/a"], &["POST /v1/a", "OPTIONS /v1/a"]),
        ("HEAD /v1/a", &["HEAD /v1/a"], &["GET /v1/a"]),
        ("/pkg.Service/Method", &["POST /pkg.Service/Method"], &["POST /pkg.Service/Methods"]),
        ("/pkg.Service/*", &["POST /pkg.Service/Other"], &["POST /pkgxService/Other"]),
        ("/", &["GET /"], &["GET /a"]),
        ("/*", &["GET /", "GET /a", "GET /a/b"], &["GET //", "GET /a//b"]),
        ("*", &["GET /", "POST /a/b"], &["GET /a//b", "GET /a/../b"]),
        ("DELETE *", &["DELETE /a"], &["GET /a"]),
        ("/a%20b", &["GET /a%20b"], &["GET /a b", "GET /a+b"]),
    ];
    for (text, allowed, denied) in table {
        let matches = |request: &str| {
            let (method, path) = request.split_once(' ').unwrap();
            rule(text).matches(&method.parse().unwrap(), path)
        };
        for request in *allowed {
            assert!(matches(request), "{text:?} allows {request:?}");
        }
        for request in *denied {
            assert!(!matches(request), "{text:?} does not allow {request:?}");
        }
    }
}

#[test]
fn a_path_that_servers_read_in_different_ways_matches_no_rule() {
    for path in [
        "/v1/%2f",
        "/v1%2Fa",
        "/v1/a%2fb",
        "/v1/%5ca",
        "/v1/a\\b",
        "/v1//a",
        "/v1/a//",
        "//v1/a",
        "/v1/.",
        "/v1/./a",
        "/v1/..",
        "/v1/../a",
        "/v1/%2e/a",
        "/v1/%2E%2e/a",
        "/v1/.%2E",
        "/v1/%2e.",
        "/v1/%2e%2e%2fa",
        "/v1/%252fa",
        "/v1/%252E%252e/a",
        "/v1/%255ca",
        "/v1/..;/a",
        "/v1/..;x=y/a",
        "/v1/.;",
        "/v1/%2e%2e;a",
        "/v1/..%3bx/a",
        "/v1/%",
        "/v1/%2",
        "/v1/a%zz",
        "/v1/%%32%66",
        "/v1/%00",
        "/v1/a%0ab",
        "/v1/%7f",
        "/v1/\0",
        "/v1/\na",
    ] {
        for text in ["*", "/*", "/v1/*", "GET *"] {
            assert!(!rule(text).matches(&Method::GET, path), "{text:?} {path:?}");
        }
        assert!(path.parse::<EndpointRule>().is_err(), "{path:?}");
    }
    for path in ["/v1/.a", "/v1/..a", "/v1/a..", "/v1/...", "/v1/a;b", "/v1/a%2eb", "/v1/a:b@c,d"] {
        assert!(rule("/v1/*").matches(&Method::GET, path), "{path:?} means one thing");
        assert!(rule(path).matches(&Method::GET, path), "{path:?} means one thing");
    }
}

#[test]
fn a_text_that_is_no_rule_is_rejected_with_a_plain_sentence() {
    for text in [
        "",
        " ",
        "v1/chat",
        "chat",
        "GET",
        "GET /a /b",
        "/a b c",
        "/v1/**",
        "/v1*",
        "/*/chat",
        "/v*/chat",
        "**",
        "*/",
        "G@T /a",
        "GET: /a",
        "/a?b=c",
        "/a#b",
        "/é",
        "/a\u{7f}",
        "/a\0",
        "//",
        "/a//b",
        "/a/../b",
        "/a/./b",
        "/a/..",
        "/a%2fb",
        "/a%5Cb",
        "/a\\b",
        "/a%",
        "/a%zz",
        "/../*",
        "//*",
        "/%2e%2e/*",
        "https://example.com/a",
        "/a\u{200b}",
    ] {
        let error = text.parse::<EndpointRule>().expect_err(text).to_string();
        assert!(error.contains(" is not an endpoint rule: "), "{error}");
        assert!(!error.contains(['\0', '\u{7f}']), "{error:?}");
    }
    let long = "x".repeat(1 << 20).parse::<EndpointRule>().unwrap_err();
    assert!(long.to_string().len() < 1000);
}

#[test]
fn a_network_holds_its_addresses_and_no_other() {
    // The network; how it is shown; an address in it; one outside of it.
    for (text, shown, inside, outside) in [
        ("192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ("192.0.2.1/32", "192.0.2.1", "::ffff:192.0.2.1", "::192.0.2.1"),
        ("10.1.2.3/8", "10.0.0.0/8", "10.255.255.255", "11.0.0.0"),
        ("0.0.0.0/0", "0.0.0.0/0", "255.255.255.255", "::1"),
        ("192.0.2.128/25", "192.0.2.128/25", "192.0.2.128", "192.0.2.127"),
        ("2001:db8::/32", "2001:db8::/32", "2001:db8:ffff::1", "2001:db9::"),
        ("2001:DB8::1", "2001:db8::1", "2001:db8::1", "2001:db8::2"),
        ("::1/128", "::1", "::1", "127.0.0.1"),
        ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8", "10.9.9.9", "11.0.0.0"),
        ("::ffff:a00:1/128", "10.0.0.1", "10.0.0.1", "10.0.0.2"),
        ("::ffff:0:0/96", "0.0.0.0/0", "203.0.113.9", "2001:db8::1"),
    ] {
        let rule = network(text);
        assert_eq!(rule.to_string(), shown);
        assert!(rule.contains(inside.parse().unwrap()), "{text} {inside}");
        assert!(!rule.contains(outside.parse().unwrap()), "{text} {outside}");
    }
}

#[test]
fn a_text_that_is_no_network_is_rejected_with_a_plain_sentence() {
    for text in [
        "",
        " ",
        "x",
        "10",
        "10.0.0",
        "10.0.0.0.0",
        "10.0.0.256",
        "10.0.0.0/",
        "10.0.0.0/33",
        "10.0.0.0/-1",
        "10.0.0.0/8/8",
        "10.0.0.0/8 ",
        " 10.0.0.1",
        "10.0.0.1:80",
        "[::1]",
        "::1/129",
        ":::",
        "fe80::1%eth0",
        "localhost",
        "10.0.0.0/255.0.0.0",
        "1.2.3.4-1.2.3.9",
        "*",
        "10.*",
        "0x0a.0.0.1",
        "10.0.0.1\0",
        "١.0.0.1",
    ] {
        let error = text.parse::<AllowedNetwork>().expect_err(text).to_string();
        assert!(error.contains("neither an IP address nor a CIDR network"), "{error}");
    }
    let long = "1".repeat(1 << 20).parse::<AllowedNetwork>().unwrap_err();
    assert!(long.to_string().len() < 1000);
}

#[test]
fn a_number_with_a_leading_zero_is_rejected_because_it_may_be_octal() {
    for text in ["010.0.0.1", "010.0.0.0/8", "10.0.0.01/32"] {
        assert!(text.parse::<AllowedNetwork>().is_err(), "{text}");
    }
}

/// Path segments that mean one thing.
fn segments() -> impl Strategy<Value = String> {
    prop::collection::vec("[a-zA-Z0-9_~-]{1,8}(%20|%41)?", 1..5).prop_map(|parts| parts.join("/"))
}

fn addresses() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|bits| Ipv4Addr::from(bits).into()),
        any::<u128>().prop_map(|bits| Ipv6Addr::from(bits).into()),
        any::<u32>().prop_map(|bits| Ipv4Addr::from(bits).to_ipv6_mapped().into()),
    ]
}

proptest! {
    #[test]
    fn no_text_makes_a_rule_panic_and_a_rule_is_read_back_as_it_is_shown(
        text in prop_oneof![
            any::<String>(),
            "(GET |post |\\PC{1,4} )?/?[a-z.*%/2ef;]{0,12}(/\\*)?",
            segments().prop_map(|path| format!("POST /{path}/*")),
        ],
        path in prop_oneof![any::<String>(), "/[a-z.%/2ef;\\\\]{0,12}"],
    ) {
        if let Ok(rule) = text.parse::<EndpointRule>() {
            let shown = rule.to_string();
            prop_assert_eq!(shown.parse::<EndpointRule>().unwrap(), rule.clone());
            let _ = rule.matches(&Method::GET, &path);
        }
        let _ = rule("*").matches(&Method::GET, &path);
    }

    #[test]
    fn a_folder_rule_allows_all_that_is_below_and_nothing_beside(
        folder in segments(), below in segments(), other in segments(),
    ) {
        let rule = rule(&format!("/{folder}/*"));
        let allows = |path: String| rule.matches(&Method::GET, &path);
        let (deep, beside, bare) =
            (format!("/{folder}/{below}"), format!("/{folder}x/{below}"), format!("/{folder}"));
        prop_assert!(allows(deep));
        prop_assert!(!allows(beside));
        prop_assert!(!allows(bare));
        let is_below = other.starts_with(&format!("{folder}/"));
        prop_assert_eq!(allows(format!("/{other}")), is_below);
    }

    #[test]
    fn an_exact_rule_allows_that_path_alone(path in segments(), other in segments()) {
        let rule = rule(&format!("/{path}"));
        let allows = |path: String| rule.matches(&Method::PUT, &path);
        let (same, deeper, another) =
            (format!("/{path}"), format!("/{path}/{other}"), format!("/{other}"));
        prop_assert!(allows(same));
        prop_assert!(!allows(deeper));
        prop_assert_eq!(allows(another), path == other);
    }

    #[test]
    fn a_slash_or_a_dot_segment_in_disguise_never_matches(
        before in segments(),
        after in segments(),
        trick in prop::sample::select(vec![
            "%2f", "%2F", "//", "///", "/./", "/../", "/%2e/", "/%2E%2e/", "/.%2e/", "\\", "%5c", "/..;/", "%",
        ]),
    ) {
        let path = format!("/{before}{trick}{after}");
        // A lone `%` before two hex digits is an escape like any other.
        prop_assume!(trick != "%" || !after.as_bytes()[..after.len().min(2)].iter().all(u8::is_ascii_hexdigit));
        for text in ["*".to_owned(), "/*".to_owned(), format!("/{before}/*")] {
            prop_assert!(!rule(&text).matches(&Method::GET, &path), "{:?} {:?}", text, path);
        }
        prop_assert!(path.parse::<EndpointRule>().is_err());
    }

    #[test]
    fn no_text_makes_a_network_panic_and_a_network_is_read_back_as_it_is_shown(
        text in prop_oneof![
            any::<String>(),
            "[0-9a-f:./]{0,24}",
            (addresses(), 0..=140_u8).prop_map(|(address, bits)| format!("{address}/{bits}")),
        ],
    ) {
        if let Ok(network) = text.parse::<AllowedNetwork>() {
            prop_assert_eq!(network.to_string().parse::<AllowedNetwork>().unwrap(), network);
        }
    }

    #[test]
    fn a_network_holds_exactly_the_addresses_that_share_its_first_bits(
        base in any::<u32>(), bits in 0..=32_u32, other in any::<u32>(), near in 0..32_u32,
    ) {
        let cidr = format!("{}/{bits}", Ipv4Addr::from(base));
        let mapped = format!("{}/{}", Ipv4Addr::from(base).to_ipv6_mapped(), bits + 96);
        for other in [other, base, base ^ 1 << near] {
            let shares = u64::from(base ^ other) >> (32 - bits) == 0;
            let address = Ipv4Addr::from(other);
            for network in [network(&cidr), network(&mapped)] {
                prop_assert_eq!(network.contains(address.into()), shares);
                prop_assert_eq!(network.contains(address.to_ipv6_mapped().into()), shares);
            }
        }
    }

    #[test]
    fn an_address_is_a_network_of_its_own(address in addresses(), other in addresses()) {
        let rule = AllowedNetwork::from(address);
        prop_assert_eq!(rule, network(&address.to_string()));
        prop_assert!(rule.contains(address));
        prop_assert_eq!(rule.contains(other), address.to_canonical() == other.to_canonical());
    }
}
