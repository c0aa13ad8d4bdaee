//! What callers see over HTTP and gRPC, behind the layer, the guards and stock proxies.

mod client_address;
mod credential;
mod denials;
mod discarded_body;
mod extract;
mod grpc;
mod guards;
mod key_header;
mod nesting;
mod proxies;
mod restricted_key;
mod service;
mod stack;
#[path = "../support/mod.rs"]
mod support;
