//! Scripts: [`Script`].

use std::sync::{Arc, LazyLock};

use deadpool_redis::redis::{self, Cmd, ErrorKind, ServerErrorKind, Value, cmd};

use super::link::{Fault, Link};

/// A script that Redis runs by its digest or, if Redis does not have the script, by its text.
pub(crate) struct Script {
    text: &'static str,
    digest: LazyLock<String>,
}

impl Script {
    /// Creates a script. The digest is computed at first use.
    pub(crate) const fn new(text: &'static str, digest: fn() -> String) -> Self {
        Self { text, digest: LazyLock::new(digest) }
    }

    /// Returns the SHA-1 of the text, by which Redis identifies scripts.
    pub(crate) fn digest_of(text: &str) -> String {
        redis::Script::new(text).get_hash().to_owned()
    }

    /// Runs the script with the arguments that `arguments` adds: the number of keys, the keys, the other arguments.
    pub(crate) async fn run(
        &self,
        link: &Arc<Link>,
        arguments: impl Fn(&mut Cmd),
    ) -> Result<Value, Fault> {
        let mut by_digest = cmd("EVALSHA");
        arguments(by_digest.arg(&*self.digest));
        match link.run(&by_digest).await {
            Err(Fault::Refused(error))
                if matches!(error.kind(), ErrorKind::Server(ServerErrorKind::NoScript)) =>
            {
                let mut by_text = cmd("EVAL");
                arguments(by_text.arg(self.text));
                link.run(&by_text).await
            }
            outcome => outcome,
        }
    }
}
