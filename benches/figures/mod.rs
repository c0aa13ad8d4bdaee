//! Figures of many runs.

#![allow(dead_code, unreachable_pub, reason = "each program uses some of it")]

pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Of the ratios of what was measured in one round.
pub fn median_ratio(values: &[f64], over: &[f64]) -> f64 {
    let ratios: Vec<_> = values.iter().zip(over).map(|(value, over)| value / over).collect();
    median(&ratios)
}

/// The smallest value that this share of all does not exceed.
pub fn percentile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * share).ceil() as usize).clamp(1, values.len()) - 1]
}

/// Runs all of them, in another order each round.
pub fn take_turns<const N: usize>(round: usize, contenders: [&mut dyn FnMut(); N]) {
    for at in 0..N {
        contenders[(at + round) % N]();
    }
}
