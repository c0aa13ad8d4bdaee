//! Keys.

use chrono::Days;
use serde_json::json;
use tower_api_key::{
    NewKey, chrono,
    management::Rotation,
    record::{KeyId, KeyRecord, Revision, User},
    store::{KeyFilter, KeyRepository, ListKeys},
};

use super::{Session, is_one_value, now, rights};
use crate::{
    args::{Form, IssueArgs, KeyCommand, ListArgs, RevokeArgs, RotateArgs, UpdateArgs, UsageArgs},
    failure::Failure,
    output::{count, note},
    prompt::confirm,
    values::When,
};

/// Number of keys per query of a list.
const PAGE: u32 = 1_000;

impl<R: KeyRepository + Clone> Session<R> {
    pub(super) async fn key(&mut self, command: &KeyCommand) -> Result<(), Failure> {
        match command {
            KeyCommand::Issue(args) => self.issue(args).await,
            KeyCommand::List(args) => self.list_keys(args).await,
            KeyCommand::Show { id } => {
                let key = self.manager.find(&(*id).into()).await?;
                self.output.item(&key)
            }
            KeyCommand::Update(args) => self.update_key(args).await,
            KeyCommand::Rotate(args) => self.rotate(args).await,
            KeyCommand::EndGrace { id } => {
                confirm(self.is_confirmed, &format!("end the grace period of key {id}"))?;
                let key = self.manager.end_grace(&(*id).into()).await?;
                self.output.done(&format!("The previous secret of key {id} is rejected."), &key)
            }
            KeyCommand::Revoke(args) => self.revoke(args).await,
            KeyCommand::Reactivate { id } => {
                let key = self.manager.reactivate(&(*id).into()).await?;
                self.output.done(&format!("Key {id} is active."), &key)
            }
            KeyCommand::Delete { id } => {
                confirm(self.is_confirmed, &format!("delete key {id} for good"))?;
                self.manager.delete(&(*id).into()).await?;
                self.output_id(&format!("Key {id} is deleted."), &(*id).into())
            }
            KeyCommand::Import(args) => self.import(args).await,
            KeyCommand::Usage(args) => self.usage(args).await,
            // It needs no database.
            KeyCommand::Inspect => Ok(()),
        }
    }

    async fn issue(&mut self, args: &IssueArgs) -> Result<(), Failure> {
        let owner = self.find_user(&args.user).await?;
        let mut template = match args.like {
            Some(like) => self.manager.find(&like.into()).await?,
            None => KeyRecord::new(0, "", User::new(0, "")),
        };
        rights::apply(&args.rights, &mut template, now())?;
        let new = NewKey::from_template(&template, owner.id, &args.name);
        let issued = self.manager.issue(new).await?;
        self.output.issued(&format!("Key {} is issued", issued.record().id), &issued)
    }

    async fn list_keys(&mut self, args: &ListArgs) -> Result<(), Failure> {
        let mut filter = KeyFilter::default();
        if let Some(owner) = &args.owner {
            filter = filter.owner(self.find_user(owner).await?.id);
        }
        if args.active || args.revoked {
            filter.is_active = Some(args.active);
        }
        filter.expires_before = args.expiring_within.and_then(|it| When::In(it).after(now()));
        filter.unused_since = args.unused_for.map(|it| When::In(it).before_now(now()));
        filter.contains.clone_from(&args.contains);
        filter.scope.clone_from(&args.scope);
        filter.created_by_key = args.created_by_key.map(Into::into);

        let mut left = (!args.all).then_some(args.limit);
        let mut query = ListKeys::default().filter(filter);
        query.after = args.after.map(Into::into);
        let mut list = self.output.list()?;
        loop {
            let page = query.clone().limit(left.unwrap_or(PAGE).min(PAGE));
            let page = self.manager.list(&page).await?;
            // A filter may leave nothing of a page that is not the last one.
            if !page.keys.is_empty() || page.next.is_none() {
                list.page(&page.keys)?;
            }
            for key in &page.unreadable {
                note(format_args!("warning: key {} can't be read: {}", key.id, key.error));
            }
            let listed = page.keys.len() + page.unreadable.len();
            left = left.map(|left| left.saturating_sub(listed.try_into().unwrap_or(left)));
            match page.next {
                None => break,
                Some(next) if left == Some(0) => {
                    note(format_args!("There are more keys: --after {next}, or --all"));
                    break;
                }
                Some(next) => query = query.after(next),
            }
        }
        list.end()
    }

    async fn update_key(&mut self, args: &UpdateArgs) -> Result<(), Failure> {
        let patch = rights::patch(args, now())?;
        let expected = args.if_revision.map(Revision);
        let key = self.manager.update(&args.id.into(), &patch, expected).await?;
        self.output.done(&format!("Key {} is changed.", key.id), &key)
    }

    async fn rotate(&mut self, args: &RotateArgs) -> Result<(), Failure> {
        let id = args.id;
        if args.grace.is_zero() {
            confirm(self.is_confirmed, &format!("end the current secret of key {id} at once"))?;
        } else if args.end_previous {
            let what = format!("end the grace period of the last rotation of key {id}");
            confirm(self.is_confirmed, &what)?;
        }
        let mut how = Rotation::default().grace(args.grace);
        if args.end_previous {
            how = how.end_previous();
        }
        let issued = self.manager.rotate(&id.into(), how).await?;
        let until = match issued.grace() {
            Some(grace) => {
                format!("; the previous secret works until {}", grace.ends_at.format("%FT%TZ"))
            }
            None => String::new(),
        };
        self.output.issued(&format!("Key {id} is rotated{until}"), &issued)
    }

    async fn revoke(&mut self, args: &RevokeArgs) -> Result<(), Failure> {
        if let Some(id) = args.id {
            confirm(self.is_confirmed, &format!("revoke key {id}"))?;
            self.manager.revoke(&id.into()).await?;
            let what = format!("Key {id} is revoked.");
            // A key that can't be read is revoked all the same.
            return match self.manager.find(&id.into()).await {
                Ok(key) => self.output.done(&what, &key),
                Err(_) => self.output_id(&what, &id.into()),
            };
        }
        let mut filter = KeyFilter::default();
        if let Some(owner) = &args.owner {
            filter = filter.owner(self.find_user(owner).await?.id);
        }
        filter.created_by_key = args.created_by_key.map(Into::into);
        filter.prefix.clone_from(&args.prefix);
        filter.created_before = args.created_before.map(|it| it.before_now(now()));
        confirm(self.is_confirmed, "revoke every active key that the options select")?;
        let ids = self.manager.revoke_all(&filter).await?;
        match self.output.form() {
            None => self.output.line(&format!("{} revoked.", count(ids.len() as u64, "key"))),
            form if is_one_value(form) => self.output.line(&json!(ids).to_string()),
            _ => ids.iter().try_for_each(|id| self.output.line(&id.to_string())),
        }
    }

    async fn usage(&mut self, args: &UsageArgs) -> Result<(), Failure> {
        let to = args.to.unwrap_or_else(|| now().date_naive());
        let from = args.from.or_else(|| to.checked_sub_days(Days::new(29))).unwrap_or(to);
        if to < from {
            return Err(Failure::usage("--from is after --to"));
        }
        let days = self.manager.usage(&args.id.into(), from, to).await?;
        if days.is_empty() {
            // Distinguishes a key without usage from one that does not exist. A deleted key may have usage.
            self.manager.find(&args.id.into()).await?;
        }
        let mut list = self.output.list()?;
        list.page(&days)?;
        list.end()
    }

    fn output_id(&mut self, what: &str, id: &KeyId) -> Result<(), Failure> {
        match self.output.form() {
            None => self.output.line(what),
            Some(Form::Id) => self.output.line(&id.to_string()),
            Some(_) => self.output.value(&id.to_string(), &json!({ "id": id })),
        }
    }
}
