//! What src/README.md says of the architecture, held against the sources.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// All source files below `src`, by their path there.
fn sources() -> Vec<(String, String)> {
    fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&root, &mut files);
    files
        .into_iter()
        .map(|path| {
            let name = path
                .strip_prefix(&root)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned();
            // Tests may do what the code may not.
            let text = fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap().to_owned();
            (name, code)
        })
        .filter(|(name, _)| !name.ends_with("tests.rs"))
        .collect()
}

/// Whether a file is `place`, or is below it: `broker` is `broker.rs` and what is in `broker/`.
fn is_in(name: &str, place: &str) -> bool {
    name.strip_prefix(place)
        .is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

/// Asserts that no file but those in `allowed` places has one of `words` in its code.
fn only(allowed: &[&str], words: &[&str]) {
    for (name, code) in sources() {
        for (number, line) in code.lines().enumerate() {
            let is_comment = line.trim_start().starts_with("//");
            let is_allowed = allowed.iter().any(|place| is_in(&name, place));
            for word in words {
                assert!(
                    is_comment || is_allowed || !line.contains(word),
                    "src/{name}:{}: {word} belongs into {allowed:?}",
                    number + 1
                );
            }
        }
    }
}

/// The floors of the house, from the ground up: whoever is on one imports only what is below it.
const FLOORS: &[&[&str]] = &[
    &["proto", "tls", "text_file", "threads", "fault_point"],
    &["domain"],
    &["config", "wire"],
    &["broker", "store", "influx", "webhook", "healthcheck"],
    &["telemetry"],
    &["service"],
    &["doctor", "actions"],
    &["http"],
    &["app"],
    &["cli"],
    &["main"],
];

fn floor(place: &str) -> Option<usize> {
    FLOORS.iter().position(|places| places.contains(&place))
}

/// What a line names of this crate, as the library or the program does.
fn named(line: &str) -> impl Iterator<Item = &str> {
    let after = line.split("omotes_orchestrator::").skip(1);
    let after = after.chain(line.split("crate::").skip(1));
    after.map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        &rest[..end.unwrap_or(rest.len())]
    })
}

#[test]
fn imports_go_down_only() {
    for (name, code) in sources() {
        let place = name.split(['/', '.']).next().unwrap();
        if place == "lib" {
            continue;
        }
        let own = floor(place).unwrap_or_else(|| panic!("src/{name} is on no floor"));
        let lines = code.lines().filter(|line| !line.trim().starts_with("//"));
        for other in lines.flat_map(named).filter(|other| *other != place) {
            assert!(!other.is_empty(), "src/{name} imports several at once");
            // What is on no floor is an item of the place's own.
            let below = floor(other).is_none_or(|floor| floor < own);
            assert!(below, "src/{name} imports {other}, which is not below it");
        }
    }
}

/// The file that a path of modules leads to: the longest part of it that is one.
fn file_of(path: &[String], files: &BTreeSet<String>) -> Option<String> {
    (1..=path.len())
        .rev()
        .map(|length| path[..length].join("/"))
        .find(|name| files.contains(name))
}

/// Which files each file names in its imports. What a module hands on of its children's is not told
/// from its own, so a file and the folder of its name are no circle.
fn imports() -> BTreeMap<String, BTreeSet<String>> {
    let sources = sources();
    let module = |name: &str| name.strip_suffix(".rs").unwrap().to_owned();
    let files: BTreeSet<_> = sources.iter().map(|(name, _)| module(name)).collect();
    let mut imports = BTreeMap::new();
    for (name, code) in &sources {
        let own = module(name);
        let here: Vec<_> = own.split('/').map(str::to_owned).collect();
        let mut found = BTreeSet::new();
        let lines = code.lines().filter(|line| !line.trim().starts_with("//"));
        for line in lines {
            for (start, mut path) in [
                ("crate::", Vec::new()),
                ("super::", here[..here.len() - 1].to_vec()),
                ("self::", here.clone()),
            ] {
                for rest in line.split(start).skip(1) {
                    let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"_:".contains(c));
                    let words = rest[..end.unwrap_or(rest.len())].split("::");
                    let before = path.len();
                    path.extend(words.map(str::to_owned));
                    found.extend(file_of(&path, &files));
                    path.truncate(before);
                }
            }
        }
        found.retain(|other| {
            let family =
                |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.starts_with('/'));
            *other != own && !family(other, &own) && !family(&own, other)
        });
        imports.insert(own, found);
    }
    imports
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let mut left = imports();
    assert!(
        left["broker/publisher"].contains("broker/link"),
        "{left:#?}"
    );
    assert!(left["service/handler/pipeline"].contains("domain/batch"));
    // Whoever imports nothing that is left is in no circle.
    loop {
        let names: BTreeSet<_> = left.keys().cloned().collect();
        let before = left.len();
        left.retain(|_, others| others.iter().any(|other| names.contains(other)));
        if left.len() == before {
            break;
        }
    }
    assert!(left.is_empty(), "in circles, or above them: {left:#?}");
}

#[test]
fn the_pure_files_know_no_outside_world() {
    let pure = ["domain", "wire", "proto", "http/page"];
    let outside = [
        "amiquip",
        "postgres",
        "r2d2",
        "crossbeam",
        "std::env",
        "std::fs",
        "std::net",
        "std::thread",
        "std::time::Instant",
        "SystemTime",
        "::now()",
        "new_v4",
        "fastrand",
        "log::",
        "crate::tls",
    ];
    for (name, code) in sources() {
        if pure.iter().any(|place| is_in(&name, place)) {
            for word in outside {
                assert!(
                    !code.contains(word),
                    "src/{name} is pure and must not know {word}"
                );
            }
        }
    }
}

#[test]
fn one_folder_names_the_broker_library() {
    only(&["broker"], &["amiquip"]);
}

#[test]
fn one_place_holds_tls() {
    only(
        &["tls", "broker/tls_stream"],
        &["rustls::", "rustls_native_certs"],
    );
}

#[test]
fn one_folder_holds_sql() {
    only(
        &["store"],
        &["SELECT ", "INSERT ", "UPDATE ", "DELETE FROM"],
    );
}

#[test]
fn no_async_runtime_and_no_bare_sleep() {
    only(&[], &["tokio", "async fn", ".await", "thread::sleep"]);
}

#[test]
fn the_image_is_built_with_a_file_for_each_target() {
    let read =
        |name: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap();
    let manifest = read("Cargo.toml");
    let named: Vec<_> = manifest
        .split("[[bench]]\nname = \"")
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    assert_eq!(named.len(), manifest.matches("\n[[").count(), "{named:?}");
    for name in named {
        assert!(read("Dockerfile").contains(&format!("benches/{name}.rs")));
    }
}
