//! The structure of the source, and the messages of the compiler for usual mistakes.

mod clock;
mod diagnostics;
mod imports;
mod metrics;
