//! The entries in Redis and their authentication: [`Entry`].
//!
//! A value is an ASCII header of fixed width, so that a script can compare revisions, a body, and HMAC-SHA-256 over the
//! name of the entry and all of that:
//!
//! ```text
//! tak1 kind secret-id key-revision owner-revision as-of-µs expires-µs body mac
//!    4    1        20           20             20       20         20    …  32   bytes
//! ```

use std::time::{Duration, SystemTime};

use crate::{key::equal, record::Revision, store::CacheSecret};

const MAGIC: &str = "tak1";
const NUMBER: usize = 20;
pub(super) const HEADER: usize = MAGIC.len() + 1 + 5 * NUMBER;
pub(super) const MAC: usize = 32;
/// Maximum size of an entry, in bytes. A larger value was not written by this crate.
pub(super) const MAX_BYTES: usize = 256 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The keys under a lookup id.
    Keys,
    /// A tombstone: the keys have changed, and a value that was read before must not be written any more.
    Tombstone,
    /// A presented key has matched a hash.
    Verified,
}

impl Kind {
    /// The letter of `Keys` is the version of its body. It changes with the fields of
    /// [`KeyRecord`](crate::record::KeyRecord): a version that does not know a field must not read an entry that has it,
    /// and an absent field must not be read as "no restriction". Earlier letters: `k`, without `not_before`; `n`, without
    /// rotation; `r`, in JSON.
    const LETTERS: [(u8, Self); 3] =
        [(b's', Self::Keys), (b't', Self::Tombstone), (b'v', Self::Verified)];
}

/// An entry. A decoded entry was authenticated with its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) kind: Kind,
    pub(super) key_revision: Revision,
    /// The highest of the owners' revisions.
    pub(super) owner_revision: Revision,
    /// Time of the database at the read behind the entry.
    pub(super) as_of: SystemTime,
    pub(super) expires_at: SystemTime,
    pub(super) body: &'a [u8],
}

/// The reason why a value is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// It was written under a secret that this node does not have, or no longer has.
    UnknownSecret,
    /// It was written under a secret that is older than the valid ones, or was never valid. The next write replaces it.
    Retired,
    /// It was written by another version of this crate. The next write of a newer answer replaces it.
    OtherVersion,
    /// It is not an entry, or belongs to another name. The next write replaces it.
    Forged,
}

impl<'a> Entry<'a> {
    pub(super) fn encode(&self, name: &str, secret: &CacheSecret) -> Vec<u8> {
        let kind = Kind::LETTERS.iter().find(|(_, kind)| *kind == self.kind);
        let letter = kind.map_or('?', |(letter, _)| char::from(*letter));
        let numbers = [
            secret.id(),
            self.key_revision.0,
            self.owner_revision.0,
            micros(self.as_of),
            micros(self.expires_at),
        ];
        let [a, b, c, d, e] = numbers;
        let mut value = format!("{MAGIC}{letter}{a:020}{b:020}{c:020}{d:020}{e:020}").into_bytes();
        value.reserve_exact(self.body.len() + MAC);
        value.extend_from_slice(self.body);
        let mac = mac(name, &value, secret);
        value.extend_from_slice(&mac);
        value
    }

    /// Authenticates and decodes the value under `name`.
    pub(super) fn decode(
        name: &str,
        value: &'a [u8],
        secret: &CacheSecret,
    ) -> Result<Self, Unreadable> {
        if value.len() < HEADER + MAC
            || value.len() > MAX_BYTES
            || !value.starts_with(MAGIC.as_bytes())
        {
            return Err(Unreadable::Forged);
        }
        let (signed, tag) = value.split_last_chunk().ok_or(Unreadable::Forged)?;
        let secret_id = number(signed, 0).ok_or(Unreadable::Forged)?;
        let oldest = secret.previous().unwrap_or(secret).id();
        let secret = [Some(secret), secret.previous()]
            .into_iter()
            .flatten()
            .find(|secret| secret.id() == secret_id)
            .ok_or(if secret_id < oldest {
                Unreadable::Retired
            } else {
                Unreadable::UnknownSecret
            })?;
        if !equal(&mac(name, signed, secret), tag) {
            return Err(Unreadable::Forged);
        }
        let kind = Kind::LETTERS.iter().find(|(letter, _)| *letter == signed[MAGIC.len()]);
        let (_, kind) = *kind.ok_or(Unreadable::OtherVersion)?;
        let entry = || {
            Some(Self {
                kind,
                key_revision: Revision(number(signed, 1)?),
                owner_revision: Revision(number(signed, 2)?),
                as_of: time(number(signed, 3)?),
                expires_at: time(number(signed, 4)?),
                body: signed.get(HEADER..)?,
            })
        };
        entry().ok_or(Unreadable::Forged)
    }
}

/// Returns the MAC. It starts with the name and its length, so that no entry can be moved to another name.
fn mac(name: &str, signed: &[u8], secret: &CacheSecret) -> [u8; MAC] {
    let length = name.len().to_string();
    let message = [length.as_bytes(), b":", name.as_bytes(), signed];
    secret.mac_of(&message)
}

fn number(value: &[u8], at: usize) -> Option<u64> {
    let start = MAGIC.len() + 1 + at * NUMBER;
    value.get(start..start + NUMBER)?.iter().try_fold(0_u64, |number, byte| {
        let digit = char::from(*byte).to_digit(10)?;
        number.checked_mul(10)?.checked_add(u64::from(digit))
    })
}

fn micros(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn time(micros: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_micros(micros)
}

impl CacheSecret {
    /// Returns the MAC that identifies a presented key in a shared cache, of which 16 bytes are sufficient.
    pub(super) fn mac_of_key(&self, key: &str) -> [u8; 16] {
        let mac = self.mac_of(&[b"key:", key.as_bytes()]);
        std::array::from_fn(|at| mac[at])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{KeyRecord, User};

    fn entry(kind: Kind) -> Entry<'static> {
        let (as_of, body) = (SystemTime::UNIX_EPOCH, b"body".as_slice());
        let expires_at = as_of + Duration::from_secs(1);
        Entry {
            kind,
            key_revision: Revision(1),
            owner_revision: Revision(2),
            as_of,
            expires_at,
            body,
        }
    }

    #[test]
    fn an_entry_of_another_version_is_not_read() {
        let secret = CacheSecret::new(1, [7; 32]);
        let value = entry(Kind::Keys).encode("name", &secret);
        assert_eq!(Entry::decode("name", &value, &secret), Ok(entry(Kind::Keys)));
        for letter in [b'k', b'n', b'r', b'o'] {
            let mut other = value[..value.len() - MAC].to_vec();
            other[MAGIC.len()] = letter;
            other.extend_from_slice(&mac("name", &other, &secret));
            let decoded = Entry::decode("name", &other, &secret);
            assert_eq!(decoded, Err(Unreadable::OtherVersion), "{}", char::from(letter));
        }
    }

    #[test]
    fn the_letter_changes_with_the_fields_of_a_record() {
        let record = KeyRecord::new(1, "a", User::new(2, "b"));
        let Ok(serde_json::Value::Object(record)) = serde_json::to_value(record) else {
            panic!("a record is an object");
        };
        let fields: Vec<_> = record.keys().map(String::as_str).collect();
        let (letter, _) = Kind::LETTERS[0];
        // After a change of the fields, change the letter in `Kind::LETTERS`, too.
        assert_eq!(
            (letter, fields.join(" ")),
            (
                b's',
                "allowed_endpoints allowed_ips allowed_models budget created_at created_by created_by_key description \
                 expires_at grace id is_active is_unlimited last_used_at metadata name not_before permissions prefix \
                 rate_limits revision revoke_reason revoked_at revoked_by scopes updated_at usage user"
                    .to_owned()
            )
        );
    }
}
