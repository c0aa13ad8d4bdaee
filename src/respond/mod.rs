//! Why a request is refused, and how that looks in HTTP and in gRPC.

mod asker;
mod denial;
mod grpc;
mod presentation;
mod problem;
mod refusal;

pub use denial::{BudgetExceeded, Denial, Forbidden, InvalidKey};
pub use problem::openai_error;
pub use refusal::Refusal;
pub(crate) use {
    asker::Asker,
    grpc::ContentType,
    presentation::{OnDenial, Presentation, Realm},
};
