//! What a key shows offline.

use std::io::{self, Read};

use serde_json::json;
use tower_api_key::key::{InspectedFormat, KeyCheck};
use zeroize::Zeroizing;

use crate::{
    args::Options,
    failure::{Exit, Failure},
    output::Output,
    scheme,
};

/// More than the longest key.
const MAX_BYTES: u64 = 4096;

pub(super) fn run(options: &Options, output: &mut Output) -> Result<(), Failure> {
    let scheme = scheme::scheme(options)?;
    // The full capacity is reserved, because a buffer that grows would leave a copy of the key.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_BYTES as usize + 1));
    io::stdin()
        .take(MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::failed(format!("standard input can't be read: {error}")))?;
    let text = std::str::from_utf8(&bytes).map(str::trim);
    let text = text.map_err(|_| Failure::usage("standard input is not text: give one key"))?;
    let shown = scheme
        .inspect(text)
        .map_err(|error| Failure::usage(format!("standard input is not one key: {error}")))?;

    let (format, brand, environment) = match &shown.format {
        InspectedFormat::Structured { brand, environment } => {
            ("structured".to_owned(), Some(brand), Some(environment))
        }
        InspectedFormat::FirstChars(n) => (format!("first {n} characters"), None, None),
        _ => ("unknown".to_owned(), None, None),
    };
    let (check, minted_under) = match shown.check {
        KeyCheck::None => ("none", "-".to_owned()),
        KeyCheck::Crc32 => ("right", "no secret (CRC-32)".to_owned()),
        KeyCheck::MintSecret => ("right", "the current mint secret".to_owned()),
        KeyCheck::RetiredMintSecret(n) => ("right", format!("retired mint secret {n}")),
        _ => ("wrong", "no known mint secret".to_owned()),
    };
    let is_accepted = shown.accepted.is_ok();
    let accepted = match shown.accepted {
        Ok(()) => "yes".to_owned(),
        Err(reason) => format!("no: {reason}"),
    };
    if output.is_table() {
        let dash = |text: Option<&String>| text.map_or("-".to_owned(), Clone::clone);
        let rows = [
            ("format", format),
            ("brand", dash(brand)),
            ("environment", dash(environment)),
            ("lookup id", dash(shown.lookup_id.as_ref())),
            ("check", check.to_owned()),
            ("minted under", minted_under),
            ("accepted", accepted),
        ];
        output.table(&[], rows.map(|(name, value)| [name.to_owned(), value]))?;
    } else {
        let value = json!({
            "format": format,
            "brand": brand,
            "environment": environment,
            "lookup_id": shown.lookup_id,
            "check": check,
            "minted_under": minted_under,
            "accepted": is_accepted,
        });
        output.value(shown.lookup_id.as_deref().unwrap_or("-"), &value)?;
    }
    if is_accepted { Ok(()) } else { Err(Failure::silent(Exit::Failure)) }
}
