//! The direction of imports between the top-level modules, as ARCHITECTURE.md lists them.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

/// An import of a module that is not below the one that imports it.
#[derive(Debug, PartialEq)]
struct Violation {
    file: PathBuf,
    line: usize,
    from: String,
    to: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, from, to } = self;
        write!(f, "{}:{line}: `{from}` imports `{to}`, which is not below it", file.display())
    }
}

/// The modules from top to bottom: the first column of the first table of ARCHITECTURE.md.
fn order(page: &str) -> Vec<String> {
    let rows = page.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.filter_map(|row| Some(row.split('`').nth(1)?.to_owned())).collect()
}

pub(crate) fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|it| it == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The source with comments blanked out, so that lines keep their numbers. Documentation may link upwards.
pub(crate) fn without_comments(source: &str) -> String {
    let code = source.lines().map(|line| line.split("//").next().unwrap_or_default());
    code.collect::<Vec<_>>().join("\n")
}

/// The names that follow each path to the root of the crate, in expressions and in the trees of `use` declarations, with
/// the line of each. In a module of this depth, that many `super::` lead to the root as well.
fn imports(source: &str, depth: usize) -> Vec<(usize, String)> {
    let code = without_comments(source);
    let mut found = Vec::new();
    for root in ["crate::".to_owned(), "super::".repeat(depth)] {
        found.extend(imports_after(&root, &code));
    }
    found
}

fn imports_after(root: &str, code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices(root) {
        let path = &code[at + root.len()..];
        let starts = match path.strip_prefix('{') {
            Some(tree) => branches(tree).into_iter().map(|start| start + 1).collect(),
            None => vec![0],
        };
        for start in starts {
            let name: String =
                path[start..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let line = code[..at + root.len() + start].matches('\n').count() + 1;
            // A glob is that of a test for its own module.
            if !name.is_empty() {
                found.push((line, name));
            }
        }
    }
    found
}

/// Where the branches of a tree begin, up to its closing brace.
fn branches(tree: &str) -> Vec<usize> {
    let (mut starts, mut depth, mut is_start) = (Vec::new(), 0, true);
    for (at, c) in tree.char_indices() {
        if is_start && !c.is_whitespace() && c != '}' {
            starts.push(at);
            is_start = false;
        }
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => is_start = true,
            _ => {}
        }
    }
    starts
}

/// The imports in a file of the module `from` that do not go downwards.
fn violations(file: &Path, from: &str, source: &str, order: &[String]) -> Vec<Violation> {
    let place = |module: &str| order.iter().position(|it| it == module);
    let above = |to: &str| place(to).is_none_or(|to| Some(to) < place(from));
    let is_root_of_its_module = file.ends_with("mod.rs");
    let depth = file.components().count() - 1 - usize::from(is_root_of_its_module);
    let imports = imports(source, depth).into_iter().filter(|(_, to)| above(to));
    let violation =
        |(line, to)| Violation { file: file.to_owned(), line, from: from.to_owned(), to };
    imports.map(violation).collect()
}

#[test]
fn each_module_imports_only_modules_below_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let order = order(&fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap());
    let mut modules = Vec::new();
    let mut found = Vec::new();
    for file in rust_files(&root.join("src")) {
        let path = file.strip_prefix(root.join("src")).unwrap().with_extension("");
        let module = path.iter().next().unwrap().to_str().unwrap().to_owned();
        // The program is a crate of its own: it can use only what is public.
        if module == "lib" || module == "bin" {
            continue;
        }
        let source = fs::read_to_string(&file).unwrap();
        found.extend(violations(file.strip_prefix(root).unwrap(), &module, &source, &order));
        modules.push(module);
    }
    assert!(found.is_empty(), "{}", found.iter().map(|it| format!("\n{it}")).collect::<String>());
    modules.sort();
    modules.dedup();
    let mut listed = order;
    listed.sort();
    assert_eq!(modules, listed, "ARCHITECTURE.md lists the modules of src/");
}

#[test]
fn an_import_upwards_is_found_in_every_form() {
    let order = ["top", "middle", "bottom"].map(str::to_owned);
    let source = "\
//! Links to [`crate::top::Thing`].
use crate::bottom::Fine;
use crate::{
    bottom::{self, Fine},
    middle::Own,
    top::Wrong,
};
fn f() { crate::top::wrong(); crate::Root::wrong(); }
pub(in crate::middle) use self::Fine;
use super::super::{bottom::Fine, top};
use super::beside;
";
    let found = violations(Path::new("src/middle/a.rs"), "middle", source, &order);
    let found: Vec<_> = found.iter().map(|it| (it.line, &*it.to)).collect();
    assert_eq!(found, [(6, "top"), (8, "top"), (8, "Root"), (10, "top")]);
    let shown = violations(Path::new("src/middle/a.rs"), "middle", source, &order)[0].to_string();
    assert_eq!(shown, "src/middle/a.rs:6: `middle` imports `top`, which is not below it");
}
