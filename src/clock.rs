//! The source of time of the crate, and a clock for tests.

pub use crate::runtime::{Clock, ManualClock, SystemClock};
