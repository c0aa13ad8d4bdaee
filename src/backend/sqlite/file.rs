//! Creation of a database file before SQLite opens it.

use std::{
    fs::{OpenOptions, read_link},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use percent_encoding::percent_decode_str;

/// Creates the file if it does not exist, readable only by its owner, because it contains hashes and the cache secret.
/// The files with `-wal` and `-shm` in their names get the same mode from SQLite. An existing file is not even opened:
/// closing it would release the locks that this process has on it.
pub(super) fn create(database: &str) {
    if let Some(path) = path(database) {
        // If this fails, SQLite fails too and returns the better error, or the file exists.
        let _ = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target(path));
    }
}

/// Returns the path in the name of a database that SQLite opens: a path, or a URI (<https://sqlite.org/uri.html>).
/// `None` if SQLite would not create a file there.
fn path(database: &str) -> Option<PathBuf> {
    let Some(uri) = database.strip_prefix("file:") else { return Some(database.into()) };
    let uri = uri.split('#').next().unwrap_or(uri);
    let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
    let path = match path.strip_prefix("//") {
        Some(with_host) => &with_host[with_host.find('/')?..],
        None => path,
    };
    let is_not_created = |parameter: &str| {
        parameter.strip_prefix("mode=").is_some_and(|mode| mode != "rwc")
            || parameter == "vfs=memdb"
    };
    let path = percent_decode_str(path).decode_utf8().ok()?;
    let is_file = !path.is_empty() && path != ":memory:";
    (is_file && !query.split('&').any(is_not_created)).then(|| Path::new(path.as_ref()).into())
}

/// Returns the target of a symbolic link, even if the target does not exist yet.
fn target(mut path: PathBuf) -> PathBuf {
    // Linux follows the same number of links.
    for _ in 0..40 {
        let Ok(link) = read_link(&path) else { break };
        path = path.parent().map_or_else(|| link.clone(), |folder| folder.join(&link));
    }
    path
}
