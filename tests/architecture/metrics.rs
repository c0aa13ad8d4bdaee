//! The metrics that the documentation of `telemetry` lists are those that the code records.

use std::{collections::BTreeSet, fs, path::Path};

use super::imports::rust_files;

/// The names in calls of `count` and `gauge`.
fn recorded(source: &str) -> BTreeSet<String> {
    let is_name = |text: &&str| {
        let gauges = ["api_key_feed_", "api_key_replica_"];
        let is_gauge = gauges.iter().any(|gauge| text.starts_with(gauge));
        let is_metric = text.ends_with("_total") || is_gauge;
        text.starts_with("api_key_") && (is_metric || *text == "api_key_redis_up")
    };
    source.split('"').filter(is_name).map(str::to_owned).collect()
}

/// The first column of the rows whose second column is the type of a metric.
fn listed(page: &str) -> BTreeSet<String> {
    let rows = page.lines().filter(|row| row.contains("| counter |") || row.contains("| gauge |"));
    rows.filter_map(|row| Some(row.split('`').nth(1)?.to_owned())).collect()
}

#[test]
fn the_documentation_lists_every_metric_and_no_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names = BTreeSet::new();
    for file in rust_files(&root.join("src")) {
        names.extend(recorded(&fs::read_to_string(file).unwrap()));
    }
    assert!(names.len() > 10, "{names:?}");
    assert_eq!(names, listed(&fs::read_to_string(root.join("src/telemetry.rs")).unwrap()));
}
