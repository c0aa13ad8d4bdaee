//! The scope rule: which scopes a key has.

/// Returns whether the scope `held` grants the scope `wanted`.
///
/// | held | grants |
/// |---|---|
/// | `models:read` | that scope alone, byte by byte |
/// | `models:*` | every longer scope that begins with `models:`, at any depth, but not `models` |
/// | `*` | every scope |
///
/// The wildcard is an asterisk at the end of the scope. It is the whole scope, or follows a `:`, `.` or `/`. Anywhere
/// else an asterisk is an ordinary character.
pub(crate) fn grants(held: &str, wanted: &str) -> bool {
    if held == wanted {
        return true;
    }
    let Some(stem) = wildcard(held) else { return false };
    wanted.len() > stem.len() && wanted.starts_with(stem)
}

/// Returns the part before the wildcard, if the scope ends in one.
pub(crate) fn wildcard(held: &str) -> Option<&str> {
    let stem = held.strip_suffix('*')?;
    (stem.is_empty() || stem.ends_with([':', '.', '/'])).then_some(stem)
}

#[cfg(test)]
mod tests {
    use super::grants;

    #[test]
    fn a_wildcard_grants_what_goes_on_behind_it_and_nothing_else() {
        let granted = [
            ("models:read", "models:read"),
            ("models:*", "models:read"),
            ("models:*", "models:read:all"),
            ("models:*", "models:*"),
            ("files.*", "files.a"),
            ("files/*", "files/a"),
            ("*", "anything"),
        ];
        for (held, wanted) in granted {
            assert!(grants(held, wanted), "{held:?} grants {wanted:?}");
        }
        let not_granted = [
            ("models:read", "models:write"),
            ("models:read", "models:read:all"),
            ("models:*", "models"),
            ("models:*", "models:"),
            ("models:*", "Models:read"),
            ("mod*", "models"),
            ("a:*:b", "a:x:b"),
            ("models:read", "models:*"),
            ("", "models"),
            ("*", ""),
            ("models*", "models:read"),
        ];
        for (held, wanted) in not_granted {
            assert!(!grants(held, wanted), "{held:?} does not grant {wanted:?}");
        }
    }
}
