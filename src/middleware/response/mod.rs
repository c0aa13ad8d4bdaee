//! Why a request is refused, and how that looks in HTTP and in gRPC.

mod asker;
mod grpc;
mod presentation;
mod problem;
mod rate_limit_fields;
mod refusal;

pub(super) use self::{
    asker::Asker,
    grpc::ContentType,
    presentation::{OnDenial, Presentation, Realm},
    rate_limit_fields::RateFields,
};
pub use self::{problem::openai_error, refusal::Refusal};
