//! Messages of the compiler for usual mistakes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What the snippets use.
const IMPORTS: &str = "use tower_api_key::{backend::*, rate_limit::*, record::*, store::*, *};";

/// The messages of the compiler to `code`, which does not compile.
fn errors(code: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mistake.rs");
    fs::write(&file, format!("{IMPORTS}\n{code}")).unwrap();
    // Beside this test lie the crates that it was built with.
    let test = std::env::current_exe().unwrap();
    let deps = test.parent().unwrap();
    let rustc = Path::new(env!("CARGO")).with_file_name("rustc");
    let output = Command::new(rustc)
        .args(["--edition", "2024", "--crate-type", "lib", "--emit", "metadata"])
        .arg("-o")
        .arg(folder.path().join("mistake.rmeta"))
        .arg("-L")
        .arg(format!("dependency={}", deps.display()))
        .arg("--extern")
        .arg(format!("tower_api_key={}", library(deps).display()))
        .arg(&file)
        .output()
        .unwrap();
    let messages = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{code} compiles");
    // Not that the library could not be loaded.
    assert!(!messages.contains("E0432") && !messages.contains("E0463"), "{messages}");
    messages
}

/// The library as it was built last.
fn library(deps: &Path) -> PathBuf {
    let files = fs::read_dir(deps).unwrap().map(|entry| entry.unwrap().path());
    let is_library = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("libtower_api_key-") && name.ends_with(".rlib")
    };
    let built = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();
    files.filter(is_library).max_by_key(built).expect("the test was built with it")
}

fn assert_messages(code: &str, texts: &[&str]) {
    let messages = errors(code);
    for text in texts {
        assert!(messages.contains(text), "{text:?} is missing:\n{messages}");
    }
}

#[test]
fn a_boxed_store_is_answered_with_the_type_that_does_it() {
    let code =
        "pub fn f(store: Box<dyn KeyStore>) -> ApiKeyAuthLayer { ApiKeyAuthLayer::new(store) }";
    let note = "a store whose type is chosen at run time is a `DynKeyStore`";
    assert_messages(code, &[note, "`DynKeyStore::new(store)`"]);
}

#[test]
fn a_store_behind_a_pointer_is_answered_with_the_line_that_names_the_type_that_does_it() {
    let arc = "std::sync::Arc<dyn KeyStore>";
    for code in [
        format!("pub struct State {{ pub store: {arc} }}"),
        format!("pub fn f(store: {arc}) -> Authenticator {{ Authenticator::new(store) }}"),
        "pub fn f(store: &dyn KeyStore) {}".to_owned(),
    ] {
        assert_messages(&code, &["is not dyn compatible", "use `DynKeyStore`"]);
    }
}

#[test]
fn what_is_not_a_store_yet_is_answered_with_how_to_make_it_one() {
    for what in [
        "&'static str",
        "SqliteStoreBuilder",
        "RedisCacheBuilder<MemoryStore>",
        "Result<SqliteStore, StoreError>",
    ] {
        let code =
            format!("pub fn f(store: {what}) -> ApiKeyAuthLayer {{ ApiKeyAuthLayer::new(store) }}");
        assert_messages(&code, &["is not a key store", "`SqliteStore::open(path)?`", "`build()`"]);
    }
}

#[test]
fn a_store_that_keys_can_not_be_written_to_is_answered_with_what_can() {
    let code = "pub fn f(store: DynKeyStore) { KeyManager::new(store); }";
    let written = "keys can't be written to";
    assert_messages(code, &[written, "before the type is erased", "`KeyScheme::mint`"]);
}

#[test]
fn what_is_not_a_rate_limiter_is_answered_with_one_that_is() {
    let code = "pub fn f(limits: RateLimits) -> RateLimitLayer { RateLimitLayer::new(limits) }";
    assert_messages(code, &["is not a rate limiter", "`LocalRateLimiter::new()`"]);
}
