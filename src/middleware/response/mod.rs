//! Responses to denied requests in HTTP and in gRPC.

mod denied_request;
mod grpc;
mod presentation;
mod problem;
mod rate_limit_fields;
mod request_summary;

pub use self::{denied_request::DeniedRequest, problem::openai_error};
pub(super) use self::{
    grpc::ContentType,
    presentation::{OnDenial, Presentation, Realm},
    rate_limit_fields::RateFields,
    request_summary::RequestSummary,
};
