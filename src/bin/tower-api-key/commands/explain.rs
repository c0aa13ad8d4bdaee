//! Why a request is allowed or denied.

use serde_json::json;
use tower_api_key::{management::ExplainedRequest, store::KeyRepository};

use super::Session;
use crate::{
    args::ExplainArgs,
    failure::{Exit, Failure},
};

impl<R: KeyRepository + Clone> Session<R> {
    pub(super) async fn explain(&mut self, args: &ExplainArgs) -> Result<(), Failure> {
        let mut request = ExplainedRequest::default();
        request.endpoint = args.method.clone().zip(args.path.clone());
        request.address = args.ip;
        request.model.clone_from(&args.model);
        request.scopes.clone_from(&args.scope);
        request.at = args.at;
        let shown = self.manager.explain(&args.key_id.into(), &request).await?;
        let denial = shown.denial();
        if self.output.is_table() {
            let rows = shown.rules.iter().map(|rule| {
                let outcome = if rule.denial.is_some() { "denied" } else { "ok" };
                [rule.rule.to_owned(), outcome.to_owned(), rule.detail.clone()]
            });
            self.output.table(&["RULE", "OUTCOME", "DETAIL"], rows)?;
            self.output.line("")?;
            self.output.line(&match denial {
                None => "Allowed.".to_owned(),
                Some(denial) => {
                    format!("Denied with status {}: {denial}.", denial.status().as_u16())
                }
            })?;
        } else {
            let rules: Vec<_> = shown
                .rules
                .iter()
                .map(|rule| {
                    json!({
                        "rule": rule.rule,
                        "allowed": rule.denial.is_none(),
                        "denial": rule.denial.as_ref().map(ToString::to_string),
                        "detail": rule.detail,
                    })
                })
                .collect();
            let value = json!({
                "key_id": shown.key.id,
                "at": shown.at,
                "allowed": denial.is_none(),
                "status": denial.map(|denial| denial.status().as_u16()),
                "denial": denial.map(ToString::to_string),
                "rules": rules,
            });
            self.output.value(&shown.key.id.to_string(), &value)?;
        }
        match denial {
            None => Ok(()),
            Some(_) => Err(Failure::silent(Exit::NotPermitted)),
        }
    }
}
