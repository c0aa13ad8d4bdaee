//! Users.

use tower_api_key::{
    management::UserPatch,
    store::{KeyRepository, ListUsers},
};

use super::Session;
use crate::{
    args::{UserCommand, UserUpdateArgs},
    failure::Failure,
    output::note,
    prompt::confirm,
};

/// Number of users per query of a list.
const PAGE: u32 = 1_000;

impl<R: KeyRepository + Clone> Session<R> {
    pub(super) async fn user(&mut self, command: &UserCommand) -> Result<(), Failure> {
        match command {
            UserCommand::Create { email, role } => {
                let user = self.manager.create_user(email, role).await?;
                self.output.done(&format!("User {} is created: {}.", user.id, user.email), &user)
            }
            UserCommand::List { after, limit, all } => {
                self.list_users(*after, (!all).then_some(*limit)).await
            }
            UserCommand::Show { user } => {
                let user = self.find_user(user).await?;
                self.output.item(&user)
            }
            UserCommand::Update(args) => self.update_user(args).await,
            UserCommand::Deactivate { user } => {
                let user = self.find_user(user).await?;
                let user = self.manager.deactivate_user(&user.id).await?;
                self.output.done(&format!("User {} is deactivated.", user.id), &user)
            }
            UserCommand::Reactivate { user } => {
                let user = self.find_user(user).await?;
                let user = self.manager.reactivate_user(&user.id).await?;
                self.output.done(&format!("User {} is active.", user.id), &user)
            }
            UserCommand::Delete { user } => {
                let user = self.find_user(user).await?;
                confirm(self.is_confirmed, &format!("delete user {} ({})", user.id, user.email))?;
                self.manager.delete_user(&user.id).await?;
                self.output.done(&format!("User {} is deleted.", user.id), &user)
            }
        }
    }

    async fn update_user(&mut self, args: &UserUpdateArgs) -> Result<(), Failure> {
        let mut patch = UserPatch::default();
        if let Some(email) = &args.email {
            patch = patch.email(email);
        }
        if let Some(role) = &args.role {
            patch = patch.role(role);
        }
        if patch == UserPatch::default() {
            return Err(Failure::usage("nothing to change: give --email or --role"));
        }
        let user = self.find_user(&args.user).await?;
        let user = self.manager.update_user(&user.id, &patch).await?;
        self.output.done(&format!("User {} is changed.", user.id), &user)
    }

    async fn list_users(&mut self, after: Option<i64>, limit: Option<u32>) -> Result<(), Failure> {
        let mut left = limit;
        let mut query = ListUsers::default();
        query.after = after.map(Into::into);
        let mut list = self.output.list()?;
        loop {
            let page = query.clone().limit(left.unwrap_or(PAGE).min(PAGE));
            let page = self.manager.list_users(&page).await?;
            list.page(&page.users)?;
            left =
                left.map(|left| left.saturating_sub(page.users.len().try_into().unwrap_or(left)));
            match page.next {
                None => break,
                Some(next) if left == Some(0) => {
                    note(format_args!("There are more users: --after {next}, or --all"));
                    break;
                }
                Some(next) => query = query.after(next),
            }
        }
        list.end()
    }
}
