//! The audit.

use serde_json::json;
use tower_api_key::store::{KeyRepository, ListAudit};

use super::{Session, now};
use crate::{
    args::AuditArgs,
    failure::Failure,
    output::{count, note},
    prompt::confirm,
};

/// Number of entries per query of a list.
const PAGE: u32 = 1_000;

impl<R: KeyRepository + Clone> Session<R> {
    pub(super) async fn audit(&mut self, args: &AuditArgs) -> Result<(), Failure> {
        if let Some(before) = args.prune_before {
            let before = before.before_now(now());
            let what =
                format!("delete the entries of the audit from before {}", before.format("%FT%TZ"));
            confirm(self.is_confirmed, &what)?;
            let deleted = self.manager.prune_audit(before).await?;
            return match self.output.is_table() {
                true => self
                    .output
                    .line(&format!("Deleted from the audit: {}.", count(deleted, "change"))),
                false => self.output.value(&deleted.to_string(), &json!({ "deleted": deleted })),
            };
        }
        let mut query = ListAudit::default();
        query.key = args.key.map(Into::into);
        if let Some(user) = &args.user {
            query.user = Some(match user {
                // A deleted user still has entries.
                crate::values::UserRef::Id(id) => id.clone(),
                user => self.find_user(user).await?.id,
            });
        }
        query.actor.clone_from(&args.by);
        query.since = args.since.map(|it| it.before_now(now()));
        query.until = args.until.map(|it| it.before_now(now()));
        query.before = args.before;
        let mut left = (!args.all).then_some(args.limit);
        let mut list = self.output.list()?;
        loop {
            let page = query.clone().limit(left.unwrap_or(PAGE).min(PAGE));
            let page = self.manager.audit(&page).await?;
            list.page(&page.entries)?;
            let listed = page.entries.len();
            left = left.map(|left| left.saturating_sub(listed.try_into().unwrap_or(left)));
            match page.next {
                None => break,
                Some(next) if left == Some(0) => {
                    note(format_args!("There are more entries: --before {next}, or --all"));
                    break;
                }
                Some(next) => query = query.before(next),
            }
        }
        list.end()
    }
}
