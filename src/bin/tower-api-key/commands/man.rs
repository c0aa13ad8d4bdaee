//! The man pages.

use clap::CommandFactory;
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

use crate::{
    args::Args,
    failure::{EXIT_CODES, Failure},
};

/// Returns the man page of the program, or of one of its commands.
pub(super) fn page(words: &[String]) -> Result<Vec<u8>, Failure> {
    let mut command = Args::command();
    // The options of every command are added to each command.
    command.build();
    let mut name = command.get_name().to_owned();
    for word in words {
        let found = command.find_subcommand(word).cloned();
        command = found.ok_or_else(|| Failure::usage(format!("{name} has no command {word}")))?;
        name = format!("{name}-{word}");
    }
    let command = command.name(name).after_help("").disable_help_subcommand(true);
    let man = Man::new(command.clone());
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    if command.get_arguments().next().is_some() {
        man.render_options_section(&mut page)?;
    }
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let mut codes = Roff::new();
    codes.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in EXIT_CODES {
        codes.control("TP", []);
        codes.text([bold(code.to_string())]);
        codes.text([roman(meaning)]);
    }
    codes.to_writer(&mut page)?;
    Ok(page)
}
