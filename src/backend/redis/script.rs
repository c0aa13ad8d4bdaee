//! The script that writes entries. It never replaces an entry of a higher revision by one of a lower revision.

use std::{sync::Arc, time::Duration};

use deadpool_redis::redis::{Cmd, Value};

use crate::redis::{Fault, Link, Script};

/// `KEYS[1]` is the entry of the lookup id and `KEYS[2]`, if given, the one of the verified key, which is in the same
/// slot. `ARGV`: the value and its lifetime in ms; the last bytes of a value that was rejected, which is always
/// replaced; the verified value and its lifetime.
///
/// An entry is newer if the revision of the key is higher and that of the owner is not lower; with equal revisions, if
/// it was read later. All numbers are digits of fixed width, so that they compare as text, and large ones keep their
/// precision.
const TEXT: &str = r"
        local function number(value, at) return string.sub(value, 6 + at * 20, 25 + at * 20) end
        local now, new = redis.pcall('GET', KEYS[1]), ARGV[1]
        local is_newer = true
        if type(now) == 'string' and #now >= 137 and #now <= 262144
            and string.sub(now, 1, 4) == 'tak1' and string.sub(now, -32) ~= ARGV[3]
        then
            if number(new, 1) ~= number(now, 1) then
                is_newer = number(new, 1) > number(now, 1)
            else
                is_newer = number(new, 3) > number(now, 3)
            end
            if string.sub(new, 5, 5) ~= 't' then
                is_newer = is_newer and number(new, 2) >= number(now, 2)
            end
        end
        if is_newer then redis.call('SET', KEYS[1], new, 'PX', ARGV[2]) end
        if KEYS[2] then redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[5]) end
        return is_newer and 1 or 0";

static PUT: Script = Script::new(TEXT, || Script::digest_of(TEXT));

/// A value to write.
pub(super) struct Put<'a> {
    pub(super) name: &'a str,
    pub(super) value: &'a [u8],
    pub(super) lifetime: Duration,
    /// The last bytes of a value that was read under the name and rejected.
    pub(super) rejected_tail: &'a [u8],
    /// Name, value and lifetime of a verified key.
    pub(super) verified: Option<(&'a str, &'a [u8], Duration)>,
}

impl Put<'_> {
    /// Runs the script. Returns whether it has written the value.
    pub(super) async fn run(&self, link: &Arc<Link>) -> Result<bool, Fault> {
        let outcome = PUT.run(link, |command| self.arguments(command)).await;
        outcome.map(|value| value == Value::Int(1))
    }

    fn arguments(&self, command: &mut Cmd) {
        let millis = |lifetime: Duration| lifetime.as_millis().max(1) as u64;
        command.arg(if self.verified.is_some() { 2 } else { 1 }).arg(self.name);
        if let Some((name, ..)) = self.verified {
            command.arg(name);
        }
        command.arg(self.value).arg(millis(self.lifetime)).arg(self.rejected_tail);
        if let Some((_, value, lifetime)) = self.verified {
            command.arg(value).arg(millis(lifetime));
        }
    }
}
