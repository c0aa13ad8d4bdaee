//! Time, deadlines and background tasks.

mod background;
mod clock;
mod deadline;
mod hex;
mod moment;
mod recent;

#[cfg(feature = "_sql")]
pub(crate) use self::deadline::later;
#[cfg(feature = "redis")]
pub(crate) use self::hex::push_hex;
pub(crate) use self::{
    background::Background,
    deadline::{timer, within},
    hex::{hex, hex_in, unhex},
    recent::RecentMap,
};
pub use self::{
    clock::{Clock, ManualClock, SystemClock},
    moment::Moment,
};
