//! Stock proxies and stock clients in front of the layer: a denial is what HTTP or gRPC calls for, whatever the
//! request looks like, and reaches the caller.

mod auth_request;
mod cache;
mod grpc;
mod pass;
mod programs;
mod uploads;

use http::Method;

use crate::support::unknown_key;

const CONTENT_TYPES: [Option<&str>; 7] = [
    None,
    Some("application/json"),
    Some("application/grpc"),
    Some("application/grpc+proto"),
    Some("application/grpc-web"),
    Some("application/grpc-web+proto"),
    Some("application/grpc-web-text"),
];

const METHODS: [Method; 7] = [
    Method::GET,
    Method::HEAD,
    Method::POST,
    Method::PUT,
    Method::DELETE,
    Method::OPTIONS,
    Method::PATCH,
];

/// The header fields of each request that is to be denied: without a key and with a wrong one, in every content type.
fn denied_fields() -> Vec<Vec<(&'static str, String)>> {
    let wrong = format!("Bearer {}", unknown_key());
    let mut requests = Vec::new();
    for content_type in CONTENT_TYPES {
        for authorization in [None, Some(&wrong)] {
            let content_type = content_type.map(|value| ("content-type", value.to_owned()));
            let authorization = authorization.map(|value| ("authorization", value.clone()));
            requests.push(content_type.into_iter().chain(authorization).collect());
        }
    }
    requests
}

/// The same with borrowed values.
fn borrowed<'a>(fields: &'a [(&'static str, String)]) -> Vec<(&'static str, &'a str)> {
    fields.iter().map(|(name, value)| (*name, &**value)).collect()
}
