//! nginx caches responses (`proxy_cache`): no denial gets into the cache, and none comes out of it.

use axum::{Router, routing::any};
use http::{Method, Version};

use super::{METHODS, borrowed, denied_fields};
use crate::support::{
    Answer, Fixture, fixture,
    servers::Nginx,
    wire::{VERSIONS, exchange, request, serve},
};

const MINE: &str = "for the holder of this key";

/// A cache in front of the layer; the directives select what it stores. The service permits caching
/// of its responses under `/stored`, and of no others.
async fn cached(fixture: &Fixture, directives: &str) -> Nginx {
    let answers = Router::new()
        .route("/stored/{name}", any(|| async { MINE }))
        .fallback(|| async { ([("cache-control", "private")], MINE) })
        .layer(fixture.layer());
    let service = serve(answers).await;
    let server = format!(
        "location / {{ proxy_cache answers; proxy_cache_methods GET HEAD POST; {directives}
             add_header x-cache $upstream_cache_status always; proxy_pass http://{service}; }}"
    );
    Nginx::start("proxy_cache_path cache keys_zone=answers:1m;", &server)
}

async fn get(nginx: &Nginx, path: &str, key: Option<&str>) -> Answer {
    let authorization = key.map(|key| format!("Bearer {key}"));
    let fields: Vec<_> = authorization.iter().map(|value| ("authorization", &**value)).collect();
    let request = request(Version::HTTP_11, &Method::GET, path, &fields);
    exchange(nginx.address(Version::HTTP_11), request).await
}

#[tokio::test]
async fn no_denial_is_stored_under_a_key_that_all_callers_share() {
    let fixture = fixture().await;
    for valid in ["200 1m", "any 1m"] {
        let nginx =
            cached(&fixture, &format!("proxy_cache_key $uri; proxy_cache_valid {valid};")).await;
        // The cache works: it stores what it may.
        for cache in ["MISS", "HIT"] {
            let stored = get(&nginx, "/stored/by-the-cache", Some(&fixture.key)).await;
            assert_eq!((stored.status(), stored.header("x-cache")), (200, Some(cache)));
        }
        let mut poisoned = Vec::new();
        for (round, version) in VERSIONS.into_iter().enumerate() {
            for method in METHODS {
                for (number, fields) in denied_fields().iter().enumerate() {
                    let path = format!("/{round}-{method}-{number}");
                    let denied = request(version, &method, &path, &borrowed(fields));
                    exchange(nginx.address(version), denied).await;
                    let good = get(&nginx, &path, Some(&fixture.key)).await;
                    let denied = get(&nginx, &path, None).await;
                    if (good.status(), &*good.body, denied.status()) != (200, MINE, 401) {
                        let what = format!("{version:?} {method} {fields:?}");
                        poisoned.push(format!(
                            "{} and {} after {what}",
                            good.status(),
                            denied.status()
                        ));
                    }
                }
            }
        }
        let first = &poisoned[..poisoned.len().min(5)];
        assert!(poisoned.is_empty(), "{valid}: {} poisoned, the first: {first:#?}", poisoned.len());
    }
}

#[tokio::test]
async fn answers_that_are_stored_for_each_key_reach_no_other_caller() {
    let fixture = fixture().await;
    let key = "proxy_cache_key \"$uri $http_authorization\"; proxy_cache_valid any 1m;";
    let nginx = cached(&fixture, key).await;
    for round in ["MISS", "HIT", "HIT"] {
        let good = get(&nginx, "/stored/answer", Some(&fixture.key)).await;
        let got = (good.status(), &*good.body, good.header("x-cache"));
        assert_eq!(got, (200, MINE, Some(round)));
        for key in [None, Some(&*crate::support::unknown_key())] {
            let denied = get(&nginx, "/stored/answer", key).await;
            assert_eq!((denied.status(), denied.header("x-cache")), (401, Some("MISS")));
            assert_eq!(denied.header("cache-control"), Some("no-store"));
        }
    }
}
