//! The command line of `tower-api-key`: users, keys, their audit, and the state of the servers.
//!
//! It uses only the public API of the crate. [`args`] declares what can be typed, [`values`] reads values as people write
//! them, [`connect`] opens the store, [`commands`] has one file per topic, and [`output`] prints.

#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod args;
mod commands;
mod connect;
mod failure;
mod output;
mod prompt;
mod scheme;
mod values;

use std::process::ExitCode;

use clap::Parser;

use self::{args::Args, failure::Failure};

fn main() -> ExitCode {
    let args = Args::parse();
    // The worker stores a batch of an import while this thread reads the next one.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(commands::run(args)),
        Err(error) => Err(Failure::failed(format!("the runtime can't be started: {error}"))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
