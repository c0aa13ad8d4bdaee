//! The structure of the source, and the messages of the compiler for usual mistakes.

mod diagnostics;
mod imports;
mod metrics;
