//! The program `tower-api-key`, run as a user runs it.

mod bad_input;
mod doctor;
mod import;
mod life;
mod output;
mod program;
mod secrecy;
#[path = "../support/mod.rs"]
mod support;
