//! The commands for users.

use clap::Subcommand;

use crate::values::{self, UserRef};

#[derive(Debug, Subcommand)]
pub(crate) enum UserCommand {
    /// Creates a user
    Create {
        /// E-mail address
        email: String,
        /// Role, as the service defines it
        #[arg(long, default_value = "user")]
        role: String,
    },
    /// Lists users, ordered by id
    List {
        /// Only users after this id, for the next page
        #[arg(long, value_name = "ID")]
        after: Option<i64>,
        /// Maximum number of users
        #[arg(long, default_value_t = 100, value_name = "N")]
        limit: u32,
        /// Lists every user
        #[arg(long, conflicts_with = "limit")]
        all: bool,
    },
    /// Shows a user
    Show {
        /// Id or e-mail address
        #[arg(value_parser = values::user)]
        user: UserRef,
    },
    /// Changes the e-mail address or the role of a user
    Update(UserUpdateArgs),
    /// Deactivates a user: all keys of the user are denied
    Deactivate {
        /// Id or e-mail address
        #[arg(value_parser = values::user)]
        user: UserRef,
    },
    /// Activates a deactivated user
    Reactivate {
        /// Id or e-mail address
        #[arg(value_parser = values::user)]
        user: UserRef,
    },
    /// Deletes a user who owns no keys
    Delete {
        /// Id or e-mail address
        #[arg(value_parser = values::user)]
        user: UserRef,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct UserUpdateArgs {
    /// Id or e-mail address
    #[arg(value_parser = values::user)]
    pub(crate) user: UserRef,
    /// New e-mail address
    #[arg(long)]
    pub(crate) email: Option<String>,
    /// New role
    #[arg(long)]
    pub(crate) role: Option<String>,
}
