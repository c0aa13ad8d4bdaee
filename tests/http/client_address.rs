//! Which address counts as the client's. Seen from outside: a key that may be used from one address
//! alone is answered 200 if that is the one, and 403 otherwise.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use axum::extract::ConnectInfo;
use http::HeaderName;
use proptest::prelude::*;
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator,
    middleware::{ClientAddr, TrustedProxies},
    record::AllowedNetwork,
};

use crate::support::{self, Fixture, counted::block_on, fixture, get, send};

const FORWARDED: &str = "forwarded";
const X_FORWARDED_FOR: &str = "x-forwarded-for";
const PROXIES: [&str; 2] = ["10.0.0.0/8", "fd00::/8"];
const UNKNOWN: &str = "unknown";

fn behind(header: &str) -> TrustedProxies {
    match header {
        FORWARDED => TrustedProxies::forwarded(PROXIES).unwrap(),
        _ => TrustedProxies::x_forwarded_for(PROXIES).unwrap(),
    }
}

/// The status of a request with a key that may be used from `networks` alone.
async fn status(
    setting: &Fixture,
    layer: &ApiKeyAuthLayer,
    networks: &[&str],
    peer: Option<&str>,
    fields: &[(&str, &[u8])],
) -> u16 {
    let networks = networks.iter().map(|text| text.parse::<AllowedNetwork>().unwrap());
    let key = setting.issue(|new| new.allowed_ips(networks)).await;
    let mut request = get(fields);
    request.headers_mut().insert("x-api-key", key.expose_secret().parse().unwrap());
    if let Some(peer) = peer {
        request.extensions_mut().insert(ClientAddr(peer.parse().unwrap()));
    }
    send(layer, request).await.status()
}

/// Checks that `client` counts as the client's address, and no other does; `UNKNOWN` that none does.
async fn check(
    setting: &Fixture,
    layer: &ApiKeyAuthLayer,
    peer: Option<&str>,
    fields: &[(&str, &[u8])],
    client: &str,
) {
    let shown: Vec<_> = fields.iter().map(|(n, v)| (n, v.escape_ascii().to_string())).collect();
    let anywhere = status(setting, layer, &["0.0.0.0/0", "::/0"], peer, fields).await;
    if client == UNKNOWN {
        assert_eq!(anywhere, 403, "{shown:?} from {peer:?} says nothing");
        return;
    }
    assert_eq!(anywhere, 200, "{shown:?} from {peer:?} is from somewhere");
    let there = status(setting, layer, &[client], peer, fields).await;
    assert_eq!(there, 200, "{shown:?} from {peer:?} is from {client}");
}

/// Checks each list of values of one header field behind a trusted proxy.
async fn check_table(header: &str, table: &[(&[&str], &str)]) {
    let setting = fixture().await;
    let layer = setting.layer().trusted_proxies(behind(header));
    for (values, client) in table {
        let fields: Vec<_> = values.iter().map(|value| (header, value.as_bytes())).collect();
        check(&setting, &layer, Some("10.0.0.1"), &fields, client).await;
    }
}

#[tokio::test]
async fn the_address_of_the_connection_counts() {
    let setting = fixture().await;
    let layer = setting.layer();
    for (peer, client) in [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("203.0.113.9", "::ffff:203.0.113.9"),
        ("2001:db8::9", "2001:db8::9"),
    ] {
        check(&setting, &layer, Some(peer), &[], client).await;
        assert_eq!(status(&setting, &layer, &["203.0.113.8"], Some(peer), &[]).await, 403);
    }
    check(&setting, &layer, None, &[], UNKNOWN).await;
    let socket = SocketAddr::from(([203, 0, 113, 9], 4711));
    assert_eq!(ClientAddr::from(socket), ClientAddr(socket.ip()));
}

#[tokio::test]
async fn the_address_that_axum_knows_counts_where_no_other_is_given() {
    let setting = fixture().await;
    let key = setting.issue(|new| new.allowed_ips(["203.0.113.9".parse().unwrap()])).await;
    for (axum, extension, status) in [
        ("203.0.113.9:1", None, 200),
        ("[::ffff:203.0.113.9]:1", None, 200),
        ("198.51.100.7:1", None, 403),
        ("198.51.100.7:1", Some("203.0.113.9"), 200),
        ("203.0.113.9:1", Some("198.51.100.7"), 403),
    ] {
        let mut request = get(&[("x-api-key", key.expose_secret().as_bytes())]);
        request.extensions_mut().insert(ConnectInfo(axum.parse::<SocketAddr>().unwrap()));
        if let Some(address) = extension {
            request.extensions_mut().insert(ClientAddr(address.parse().unwrap()));
        }
        assert_eq!(send(&setting.layer(), request).await.status(), status, "{axum} {extension:?}");
    }
}

#[tokio::test]
async fn the_address_that_a_closure_finds_counts_instead_of_the_connections() {
    let setting = fixture().await;
    let find = HeaderName::from_static("x-real-ip");
    let layer = setting
        .layer()
        .client_ip(move |head| head.headers().get(&find)?.to_str().ok()?.parse().ok());
    let peer = Some("203.0.113.9");
    check(&setting, &layer, peer, &[("x-real-ip", b"198.51.100.7")], "198.51.100.7").await;
    check(&setting, &layer, None, &[("x-real-ip", b"198.51.100.7")], "198.51.100.7").await;
    check(&setting, &layer, peer, &[("x-real-ip", b"::ffff:198.51.100.7")], "198.51.100.7").await;
    check(&setting, &layer, peer, &[("x-real-ip", b"x")], UNKNOWN).await;
    check(&setting, &layer, peer, &[], UNKNOWN).await;

    // It says who the peer is; a trusted one may still name the client.
    let layer = layer.trusted_proxies(behind(X_FORWARDED_FOR));
    let forwarded: (&str, &[u8]) = (X_FORWARDED_FOR, b"192.0.2.5");
    check(&setting, &layer, peer, &[("x-real-ip", b"10.0.0.1"), forwarded], "192.0.2.5").await;
    check(&setting, &layer, peer, &[("x-real-ip", b"198.51.100.7"), forwarded], "198.51.100.7")
        .await;
}

#[tokio::test]
async fn header_fields_are_ignored_without_trusted_proxies_and_from_peers_that_are_none() {
    let setting = fixture().await;
    let fields: &[(&str, &[u8])] = &[
        (X_FORWARDED_FOR, b"198.51.100.7"),
        (FORWARDED, b"for=198.51.100.7"),
        ("x-real-ip", b"198.51.100.7"),
    ];
    check(&setting, &setting.layer(), Some("10.0.0.1"), fields, "10.0.0.1").await;
    check(&setting, &setting.layer(), None, fields, UNKNOWN).await;
    for header in [FORWARDED, X_FORWARDED_FOR] {
        let layer = setting.layer().trusted_proxies(behind(header));
        for peer in ["11.0.0.1", "2001:db8::1", "::ffff:203.0.113.9"] {
            check(&setting, &layer, Some(peer), fields, peer).await;
        }
        check(&setting, &layer, None, fields, UNKNOWN).await;
    }
}

#[tokio::test]
async fn a_trusted_proxy_is_believed_in_the_one_field_that_it_writes() {
    let setting = fixture().await;
    let fields: &[(&str, &[u8])] =
        &[(X_FORWARDED_FOR, b"198.51.100.7"), (FORWARDED, b"for=203.0.113.9")];
    for (header, client) in [(X_FORWARDED_FOR, "198.51.100.7"), (FORWARDED, "203.0.113.9")] {
        let layer = setting.layer().trusted_proxies(behind(header));
        for peer in ["10.0.0.1", "::ffff:10.0.0.1", "fd00::1"] {
            check(&setting, &layer, Some(peer), fields, client).await;
            // Without the field it is the proxy itself that calls: a health check, say.
            check(&setting, &layer, Some(peer), &[("accept", b"*/*")], peer).await;
        }
    }
}

#[tokio::test]
async fn the_right_most_untrusted_address_of_x_forwarded_for_is_the_client() {
    check_table(
        X_FORWARDED_FOR,
        &[
            (&["203.0.113.9"], "203.0.113.9"),
            (&[" 203.0.113.9\t"], "203.0.113.9"),
            (&["203.0.113.9:4711"], "203.0.113.9"),
            (&["2001:db8::9"], "2001:db8::9"),
            (&["[2001:db8::9]"], "2001:db8::9"),
            (&["[2001:db8::9]:4711"], "2001:db8::9"),
            (&["::ffff:203.0.113.9"], "203.0.113.9"),
            (&["203.0.113.9,10.0.0.2 ,\tfd00::5"], "203.0.113.9"),
            (&["203.0.113.9, ::ffff:10.0.0.2"], "203.0.113.9"),
            // What the client wrote itself stands on the left.
            (&["198.51.100.7, 203.0.113.9"], "203.0.113.9"),
            (&["10.0.0.7, 203.0.113.9, 10.0.0.2"], "203.0.113.9"),
            (&["unknown, 203.0.113.9"], "203.0.113.9"),
            (&["\", <script>, 999, 203.0.113.9"], "203.0.113.9"),
            // Several fields are one list.
            (&["198.51.100.7", "203.0.113.9"], "203.0.113.9"),
            (&["203.0.113.9", "10.0.0.2"], "203.0.113.9"),
            (&["198.51.100.7, 203.0.113.9", "10.0.0.3, 10.0.0.2", "10.0.0.4"], "203.0.113.9"),
            (&["garbage", "203.0.113.9"], "203.0.113.9"),
            // Nobody but proxies: the one that is furthest away.
            (&["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ],
    )
    .await;
}

#[tokio::test]
async fn an_x_forwarded_for_that_cannot_be_read_up_to_the_client_leaves_the_address_unknown() {
    check_table(
        X_FORWARDED_FOR,
        &[
            (&[""], UNKNOWN),
            (&["unknown"], UNKNOWN),
            (&["203.0.113.9, unknown"], UNKNOWN),
            (&["203.0.113.9, unknown, 10.0.0.2"], UNKNOWN),
            (&["203.0.113.9", "garbage"], UNKNOWN),
            (&["203.0.113.9", "garbage", "10.0.0.2"], UNKNOWN),
            (&["203.0.113"], UNKNOWN),
            (&["203.0.113.9.1"], UNKNOWN),
            (&["203.0.113.256"], UNKNOWN),
            (&["0xcb.0.113.9"], UNKNOWN),
            (&["203.0.113.9:99999"], UNKNOWN),
            (&["203.0.113.9:x"], UNKNOWN),
            (&["203.0.113.9 198.51.100.7"], UNKNOWN),
            (&["203.0.113.9;198.51.100.7"], UNKNOWN),
            (&["203.0.113.0/24"], UNKNOWN),
            (&["[2001:db8::9"], UNKNOWN),
            (&["2001:db8::9]"], UNKNOWN),
            (&["2001:db8:::9"], UNKNOWN),
            (&["for=203.0.113.9"], UNKNOWN),
            (&["example.com"], UNKNOWN),
            (&["２03.0.113.9"], UNKNOWN),
        ],
    )
    .await;
}

#[tokio::test]
async fn the_right_most_untrusted_address_of_forwarded_is_the_client() {
    check_table(
        FORWARDED,
        &[
            (&["for=203.0.113.9"], "203.0.113.9"),
            (&["FOR=203.0.113.9"], "203.0.113.9"),
            (&["for=\"203.0.113.9\""], "203.0.113.9"),
            (&["for=\"203.0.113.9:4711\""], "203.0.113.9"),
            (&["For=\"[2001:db8::9]\""], "2001:db8::9"),
            (&["for=\"[2001:db8::9]:4711\""], "2001:db8::9"),
            (&["for=\"[::ffff:203.0.113.9]\""], "203.0.113.9"),
            (&["proto=https;for=203.0.113.9;by=10.0.0.1"], "203.0.113.9"),
            (&["by=198.51.100.7;for=203.0.113.9;host=example.com"], "203.0.113.9"),
            (&["xfor=198.51.100.7;for=203.0.113.9"], "203.0.113.9"),
            (&["for=198.51.100.7, for=203.0.113.9;proto=http , for=10.0.0.2"], "203.0.113.9"),
            (&["for=unknown, for=203.0.113.9"], "203.0.113.9"),
            (&["for=_hidden, for=\"_x:_y\", for=203.0.113.9"], "203.0.113.9"),
            // Separators in a quoted string are none.
            (&["for=203.0.113.9;host=\"a, for=198.51.100.7\""], "203.0.113.9"),
            (&["host=\"a;for=198.51.100.7\";for=203.0.113.9"], "203.0.113.9"),
            (&["for=203.0.113.9;host=\"a\\\", for=198.51.100.7\""], "203.0.113.9"),
            (&["for=203.0.113.9;host=\"\\\\\", for=10.0.0.2"], "203.0.113.9"),
            (&["for=198.51.100.7", "for=203.0.113.9", "for=10.0.0.2"], "203.0.113.9"),
            (&["garbage", "for=203.0.113.9"], "203.0.113.9"),
            (&["for=10.0.0.3, for=10.0.0.2"], "10.0.0.3"),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_forwarded_that_cannot_be_read_up_to_the_client_leaves_the_address_unknown() {
    check_table(
        FORWARDED,
        &[
            (&[""], UNKNOWN),
            (&["203.0.113.9"], UNKNOWN),
            (&["for="], UNKNOWN),
            (&["for=\"\""], UNKNOWN),
            (&["for=unknown"], UNKNOWN),
            (&["for=\"unknown\""], UNKNOWN),
            (&["for=_hidden"], UNKNOWN),
            (&["for=203.0.113.9, for=unknown"], UNKNOWN),
            (&["for=203.0.113.9, for=_hidden, for=10.0.0.2"], UNKNOWN),
            (&["proto=https"], UNKNOWN),
            (&["for=203.0.113.9, by=10.0.0.1;proto=https"], UNKNOWN),
            (&["by=203.0.113.9"], UNKNOWN),
            (&["for=\"203.0.113.9"], UNKNOWN),
            (&["for=203.0.113.9\""], UNKNOWN),
            (&["for=\"203.0.113.9\"x"], UNKNOWN),
            (&["for=\"203.0.113\\.9\"x"], UNKNOWN),
            (&["for='203.0.113.9'"], UNKNOWN),
            (&["for=203.0.113.9;host=\"a", "for=10.0.0.2"], UNKNOWN),
            (&["for=203.0.113.9, garbage"], UNKNOWN),
            (&["for=203.0.113.9", "garbage"], UNKNOWN),
            (&["for=\"[2001:db8::9\""], UNKNOWN),
            (&["for=203.0.113.9é"], UNKNOWN),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_forwarded_element_that_names_two_clients_leaves_the_address_unknown() {
    // RFC 7239 §4: each parameter must not occur more than once per element.
    check_table(
        FORWARDED,
        &[
            (&["for=203.0.113.9;for=198.51.100.7"], UNKNOWN),
            (&["for=unknown;for=203.0.113.9"], UNKNOWN),
            (&["for=198.51.100.7;proto=http;For=203.0.113.9"], UNKNOWN),
        ],
    )
    .await;
}

#[test]
fn proxies_that_are_no_networks_are_a_typed_error() {
    for text in ["", "proxy.example.com", "10.0.0.0/33", "*"] {
        for made in
            [TrustedProxies::forwarded([text]), TrustedProxies::x_forwarded_for(["::1", text])]
        {
            let error = made.unwrap_err().to_string();
            assert!(error.contains("neither an IP address nor a CIDR network"), "{error}");
        }
    }
}

/// A value that any of the two fields may hold: noise, or something that is close to real.
fn header_text() -> impl Strategy<Value = Vec<u8>> {
    let noise =
        prop::collection::vec(prop_oneof![Just(b'\t'), 0x20..0x7f_u8, 0x80..=0xff_u8], 0..80);
    let near = "((for=|by=|FOR=)?\"?\\[?(198\\.51\\.100\\.7|10\\.0\\.0\\.2|::1|unknown|_x)\\]?(:[0-9]{1,6})?[\"\\\\]?[,; ]{0,2}){0,5}";
    prop_oneof![noise, near.prop_map(String::into_bytes)]
}

fn fields() -> impl Strategy<Value = Vec<(&'static str, Vec<u8>)>> {
    let name = prop::sample::select(vec![FORWARDED, X_FORWARDED_FOR]);
    prop::collection::vec((name, header_text()), 0..5)
}

/// Addresses that are no trusted proxy's.
fn untrusted() -> impl Strategy<Value = IpAddr> {
    let v4 = any::<u32>().prop_map(|bits| IpAddr::from(Ipv4Addr::from(bits)));
    let v6 = any::<u128>().prop_map(|bits| IpAddr::from(bits.to_be_bytes()));
    prop_oneof![v4, v6].prop_filter("a proxy's", |address| {
        !PROXIES.iter().any(|p| p.parse::<AllowedNetwork>().unwrap().contains(*address))
    })
}

fn as_slices<'a>(fields: &'a [(&'static str, Vec<u8>)]) -> Vec<(&'a str, &'a [u8])> {
    fields.iter().map(|(name, value)| (*name, &value[..])).collect()
}

proptest! {
    #[test]
    fn no_header_text_behind_a_proxy_makes_the_layer_panic(fields in fields()) {
        block_on(async {
            let setting = fixture().await;
            for header in [FORWARDED, X_FORWARDED_FOR] {
                let layer = setting.layer().trusted_proxies(behind(header));
                let fields = as_slices(&fields);
                let anywhere = &["0.0.0.0/0", "::/0"];
                let answer = status(&setting, &layer, anywhere, Some("10.0.0.1"), &fields).await;
                assert!(matches!(answer, 200 | 403), "{answer}");
                // Whatever stands there, nobody can name an address that does not stand there.
                let answer = status(&setting, &layer, &["192.0.2.1"], Some("10.0.0.1"), &fields).await;
                assert_eq!(answer, 403);
            }
        });
    }

    #[test]
    fn the_own_address_of_an_untrusted_peer_counts_whatever_it_writes(
        peer in untrusted(), fields in fields(),
    ) {
        block_on(async {
            let setting = fixture().await;
            let (peer, fields) = (peer.to_string(), as_slices(&fields));
            for header in [FORWARDED, X_FORWARDED_FOR] {
                let layer = setting.layer().trusted_proxies(behind(header));
                check(&setting, &layer, Some(&peer), &fields, &peer).await;
                let elsewhere = status(&setting, &layer, &["198.51.100.7"], Some(&peer), &fields);
                assert_eq!(elsewhere.await == 200, peer.ends_with("198.51.100.7"));
            }
        });
    }

    #[test]
    fn the_client_is_the_first_address_from_the_right_that_is_no_proxys(
        spoofed in prop::collection::vec(untrusted(), 0..3),
        client in untrusted(),
        proxies in prop::collection::vec("10\\.[0-9]\\.1[0-9]\\.7|fd00::[a-f]{1,4}", 0..4),
        fields in 1..3_usize,
    ) {
        block_on(async {
            let setting = fixture().await;
            let spoofed = spoofed.iter().map(ToString::to_string);
            let hops: Vec<_> = spoofed.chain([client.to_string()]).chain(proxies).collect();
            let client = client.to_string();
            for header in [FORWARDED, X_FORWARDED_FOR] {
                let layer = setting.layer().trusted_proxies(behind(header));
                let show = |hop: &String| match header {
                    FORWARDED if hop.contains(':') => format!("for=\"[{hop}]:1\";proto=http"),
                    FORWARDED => format!("by=10.0.0.1;for={hop}"),
                    _ => hop.clone(),
                };
                let shown: Vec<_> = hops.iter().map(show).collect();
                let lists = shown.chunks(hops.len().div_ceil(fields)).map(|part| part.join(", "));
                let fields: Vec<_> = lists.map(|list| (header, list.into_bytes())).collect();
                let fields: Vec<_> = fields.iter().map(|(name, v)| (*name, &v[..])).collect();
                check(&setting, &layer, Some("10.0.0.1"), &fields, &client).await;
            }
        });
    }
}

#[tokio::test]
async fn an_unknown_address_is_one_warning_that_names_what_makes_it_known() {
    let setting = fixture().await;
    let (log, _guard) = support::log::capture();
    let warnings = || {
        let lines = log.lines().into_iter();
        lines.filter(|line| line.contains("WARN")).collect::<Vec<_>>()
    };
    let layer = setting.layer();
    // A restriction of another kind, and an address that is known, need no warning.
    status(&setting, &layer, &["203.0.113.9"], Some("203.0.113.8"), &[]).await;
    assert_eq!(warnings().len(), 0, "{}", log.text());
    for _ in 0..3 {
        assert_eq!(status(&setting, &layer, &["203.0.113.9"], None, &[]).await, 403);
    }
    let [warning] = &warnings()[..] else { panic!("{}", log.text()) };
    for name in ["allowed_ips", "into_make_service_with_connect_info", "ClientAddr", "client_ip"] {
        assert!(warning.contains(name), "{warning}");
    }

    log.take();
    let authenticator = Authenticator::new(setting.store.clone());
    let key = setting.issue(|new| new.allowed_ips(["203.0.113.9".parse().unwrap()])).await;
    for _ in 0..2 {
        assert!(authenticator.authenticate(key.expose_secret()).await.is_err());
    }
    let [warning] = &warnings()[..] else { panic!("{}", log.text()) };
    assert!(warning.contains("authenticate_from"), "{warning}");
}
