//! The one script that writes: it never lets something older replace something newer.

use std::{sync::Arc, time::Duration};

use deadpool_redis::redis::{Cmd, Value};

use crate::redis::{Fault, Link, Script};

/// `KEYS[1]` is the entry of the prefix and `KEYS[2]`, if given, the one of the verified key, which lies in
/// the same slot. `ARGV`: the value and its lifetime in ms; the last bytes of a value that was read and
/// could not be believed, which is replaced whatever it says; the verified value and its lifetime.
///
/// Newer is a higher revision of the key and no lower one of the owner; with equal ones a later read. All
/// numbers are digits of fixed width, so that comparing text compares them, and large ones lose nothing.
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

/// What is to be written.
pub(super) struct Put<'a> {
    pub(super) name: &'a str,
    pub(super) value: &'a [u8],
    pub(super) lifetime: Duration,
    /// The end of a value that was read under the name and could not be believed.
    pub(super) unbelieved: &'a [u8],
    /// Name, value and lifetime of a verified key.
    pub(super) verified: Option<(&'a str, &'a [u8], Duration)>,
}

impl Put<'_> {
    /// Returns whether it wrote.
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
        command.arg(self.value).arg(millis(self.lifetime)).arg(self.unbelieved);
        if let Some((_, value, lifetime)) = self.verified {
            command.arg(value).arg(millis(lifetime));
        }
    }
}
