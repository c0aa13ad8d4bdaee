//! Confirmation of what can't be undone.

use std::io::{self, IsTerminal, Write};

use crate::failure::Failure;

/// Asks on the terminal whether to do `what`. With `--yes` nothing is asked, and without a terminal it is an error.
pub(crate) fn confirm(is_confirmed: bool, what: &str) -> Result<(), Failure> {
    if is_confirmed {
        return Ok(());
    }
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(Failure::usage(format!(
            "nothing was done: without a terminal, confirm with --yes that you want to {what}"
        )));
    }
    let _ = write!(io::stderr(), "Do you want to {what}? [y/N] ");
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    match answer.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Failure::failed("nothing was done")),
    }
}
