//! Where variables come from: the environment, and an `.env` file beside it.
//!
//! A value in the file is literal: nothing is expanded, since a `$` is more often part of a
//! password than a variable. Quotes, escapes and comments are otherwise docker compose's
//! (<https://docs.docker.com/compose/how-tos/environment-variables/variable-interpolation/#env-file-syntax>),
//! but a value ends on its line. `run.sh` reads the file too; `tests/env-lines.json` holds both
//! readers to the same results.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::anyhow;

use crate::config::{Config, Faults};
use crate::text_file;

/// The variables of this process, then those of a file.
#[derive(Debug, Default)]
pub struct Environment {
    file: BTreeMap<String, String>,
}

impl Environment {
    /// Includes the file at `path`, if there is one.
    ///
    /// # Errors
    /// All faults of the file, each with the file and line, none with a value.
    pub fn with_file(path: &Path) -> anyhow::Result<Environment> {
        if !path.exists() {
            return Ok(Environment::default());
        }
        let name = path.display();
        let text = text_file::read(path).map_err(|error| anyhow!("{name}: {error:#}"))?;
        match parse(&text) {
            Ok(file) => Ok(Environment { file }),
            Err(faults) => {
                let faults = faults.iter().map(|fault| format!("{name}, {fault}"));
                Err(anyhow!(faults.collect::<Vec<_>>().join("\n")))
            }
        }
    }

    /// A variable's value; the process's goes before the file's.
    pub fn variable(&self, name: &str) -> Option<String> {
        Config::variable(name).or_else(|| self.file.get(name).cloned())
    }

    /// Whether the value in force is the file's.
    pub fn is_from_file(&self, name: &str) -> bool {
        self.file.contains_key(name) && std::env::var_os(name).is_none()
    }

    /// The configuration that it gives.
    ///
    /// # Errors
    /// As [`Config::read`].
    pub fn config(&self) -> Result<Config, Faults> {
        Config::read(&|name| self.variable(name))
    }

    /// A sentence for each unknown variable whose name is almost one that this program reads.
    /// Values are not shown.
    pub fn near_misses(&self) -> Vec<String> {
        let of_process = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        let given: BTreeSet<_> = of_process.chain(self.file.keys().cloned()).collect();
        near_misses(given.iter().map(String::as_str))
    }
}

/// The variables that a file sets, the last one of a name; or its faults.
fn parse(text: &str) -> Result<BTreeMap<String, String>, Vec<String>> {
    let mut variables = BTreeMap::new();
    let mut faults = Vec::new();
    for (number, line) in (1..).zip(text.split('\n')) {
        match parse_line(line.strip_suffix('\r').unwrap_or(line)) {
            Ok(None) => {}
            Ok(Some((name, value))) => {
                variables.insert(name, value);
            }
            Err(fault) => faults.push(format!("line {number}: {fault}")),
        }
    }
    if faults.is_empty() {
        Ok(variables)
    } else {
        Err(faults)
    }
}

const BLANK: [char; 2] = [' ', '\t'];

/// The name and the value on a line, if any. A fault names the variable, unless what stands in its
/// place may be part of a value.
fn parse_line(line: &str) -> Result<Option<(String, String)>, String> {
    const EXPECTED: &str = "expected NAME=value, of a name with letters, digits and _";
    let line = line.trim_start_matches(BLANK);
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (name, value) = line.split_once('=').ok_or(EXPECTED)?;
    let name = match name.strip_prefix("export") {
        Some(rest) if rest.starts_with(BLANK) => rest.trim_matches(BLANK),
        Some(_) | None => name.trim_end_matches(BLANK),
    };
    let is_part = |character: char| character.is_ascii_alphanumeric() || character == '_';
    if !name.starts_with(|first: char| is_part(first) && !first.is_ascii_digit())
        || !name.chars().all(is_part)
    {
        return Err(EXPECTED.to_owned());
    }
    let quoted = value.trim_start_matches(BLANK);
    let value = match quoted.chars().next() {
        Some(quote @ ('\'' | '"')) => {
            unquoted(quote, &quoted[1..]).map_err(|fault| format!("{name}: {fault}"))?
        }
        Some(_) | None => before_comment(value).trim_matches(BLANK).to_owned(),
    };
    if value.contains('\0') {
        return Err(format!("{name}: there is a NUL in it"));
    }
    Ok(Some((name.to_owned(), value)))
}

/// Strips a trailing comment, which begins with a `#` after a blank.
fn before_comment(value: &str) -> &str {
    let comment = BLANK
        .iter()
        .filter_map(|blank| value.find(&format!("{blank}#")));
    comment.min().map_or(value, |start| &value[..start])
}

/// The text between quotes; `text` is everything after the opening one.
fn unquoted(quote: char, text: &str) -> Result<String, &'static str> {
    let mut value = String::new();
    let mut rest = text.chars();
    while let Some(character) = rest.next() {
        if character == quote {
            let more = rest.as_str().trim_start_matches(BLANK);
            return if more.is_empty() || more.starts_with('#') {
                Ok(value)
            } else {
                Err("something follows the closing quote")
            };
        }
        if character != '\\' {
            value.push(character);
            continue;
        }
        match (rest.next(), quote) {
            (Some('\''), '\'') => value.push('\''),
            (Some('n'), '"') => value.push('\n'),
            (Some('r'), '"') => value.push('\r'),
            (Some('t'), '"') => value.push('\t'),
            (Some(itself @ ('\\' | '"' | '$')), '"') => value.push(itself),
            (Some(other), _) => value.extend(['\\', other]),
            (None, _) => break,
        }
    }
    Err("its quote is not closed on the line")
}

/// The edit distance that still counts as a near miss.
fn tolerance(name: &str) -> usize {
    // Other programs have short names that differ by two letters.
    if name.len() < 10 { 1 } else { 2 }
}

fn near_misses<'a>(given: impl Iterator<Item = &'a str>) -> Vec<String> {
    let settings = Config::settings(&|_| None);
    let known: BTreeSet<_> = settings.iter().map(|one| one.name.as_str()).collect();
    given
        // Those with POSTGRES are of the database's image, and of other services of OMOTES.
        .filter(|name| !known.contains(name) && !name.starts_with("POSTGRES_"))
        .filter_map(|name| {
            let distance = |known: &&str| strsim::osa_distance(&name.to_uppercase(), known);
            let nearest = known.iter().copied().min_by_key(distance)?;
            (distance(&nearest) <= tolerance(nearest))
                .then(|| format!("{name} is set, and nobody reads it: did you mean {nearest}?"))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::Value;

    #[test]
    fn a_line_is_read_as_docker_compose_does_but_for_variables_in_it() {
        let table: Vec<(String, Value)> =
            serde_json::from_str(include_str!("../../tests/env-lines.json")).unwrap();
        for (line, expected) in table {
            // The mark is the file's.
            let text = line.strip_prefix('\u{feff}').unwrap_or(&line);
            let found = match parse(text) {
                Ok(variables) => variables
                    .get("NAME")
                    .map_or(Value::Null, |value| Value::from(value.as_str())),
                Err(faults) => {
                    let fault = faults.join("\n");
                    assert!(fault.starts_with("line 1: "), "{fault}");
                    assert!(
                        !fault.contains("val") || fault.contains("NAME=val"),
                        "{fault}"
                    );
                    assert!(!fault.contains("hunter2"), "{fault}");
                    Value::from(false)
                }
            };
            assert_eq!(found, expected, "{line:?}");
        }
    }

    #[test]
    fn all_faults_of_a_file_are_told_with_their_lines_and_without_values() {
        let text = "A=1\n\nPASSWORD='hunter2\nhunter2\nB=2\r\nA=\"hunter2\" hunter2\nA=3";
        assert_eq!(
            parse(text).unwrap_err(),
            [
                "line 3: PASSWORD: its quote is not closed on the line",
                "line 4: expected NAME=value, of a name with letters, digits and _",
                "line 6: A: something follows the closing quote",
            ]
        );
        let variables = parse("A=1\r\nB=2\r\nA=3").unwrap();
        assert_eq!(variables["A"], "3");
        assert_eq!(variables["B"], "2");
    }

    #[rstest]
    #[case("JOB_RETENTON_SEC", Some("JOB_RETENTION_SEC"))]
    #[case("JOB_RETENTION_SECS", Some("JOB_RETENTION_SEC"))]
    #[case("job_retention_sec", Some("JOB_RETENTION_SEC"))]
    #[case("SDK_RABBITMQ_PASWORD", Some("SDK_RABBITMQ_PASSWORD"))]
    #[case("SDK_RABITMQ_PASSWORD_FIEL", Some("SDK_RABBITMQ_PASSWORD_FILE"))]
    #[case("POSTGRESSQL_HOST", Some("POSTGRESQL_HOST"))]
    #[case(
        "TIMEOUT_JOB_MANGER_START_BUFFER_SEC",
        Some("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC")
    )]
    #[case("LOG_LEVL", Some("LOG_LEVEL"))]
    #[case("HTPP_BIND", Some("HTTP_BIND"))]
    #[case("JOB_RETENTION_SEC", None)]
    #[case("POSTGRESQL_PASSWORD_FILE", None)]
    #[case("CELERY_RABBITMQ_TLS_CERT_FILE", None)]
    fn a_name_that_is_almost_one_is_told(#[case] name: &str, #[case] meant: Option<&str>) {
        let expected =
            meant.map(|meant| format!("{name} is set, and nobody reads it: did you mean {meant}?"));
        let found = near_misses([name].into_iter());
        assert_eq!(found, Vec::from_iter(expected));
    }

    #[test]
    fn names_of_others_are_no_misses() {
        let others = "
            PATH HOME HOSTNAME LANG LC_ALL USER SHELL TERM PWD TZ HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy
            LOG_FILE LOG_DIR HTTP_HOST HTTP_PORT PORT HOST RUST_LOG RUST_BACKTRACE RUST_MIN_STACK
            POSTGRES_USER POSTGRES_PASSWORD POSTGRES_PASSWORD_FILE POSTGRES_DB POSTGRES_HOST POSTGRES_PORT
            POSTGRES_ROOT_USER POSTGRES_ROOT_PASSWORD POSTGRES_ORCHESTRATOR_USER_NAME POSTGRES_USERNAME
            POSTGRES_ORCHESTRATOR_USER_PASSWORD POSTGRES_DEV_PORT POSTGRES_DATABASE PGHOST PGPORT
            PGPASSWORD RABBITMQ_HOST RABBITMQ_HOSTNAME RABBITMQ_PORT RABBITMQ_USERNAME RABBITMQ_PASSWORD
            RABBITMQ_VIRTUALHOST RABBITMQ_ROOT_USER RABBITMQ_OMOTES_USER_NAME RABBITMQ_OMOTES_USER_PASSWORD
            RABBITMQ_CELERY_USER_NAME RABBITMQ_DEFAULT_USER RABBITMQ_DEFAULT_PASS RABBITMQ_EXCHANGE
            INFLUXDB_ADMIN_USER INFLUXDB_ADMIN_PASSWORD INFLUXDB_DB INFLUXDB_USER INFLUXDB_HTTP_AUTH_ENABLED
            INFLUXDB_FRONTEND_USER INFLUXDB_WRITE_USER INFLUXDB_HOSTNAME
            POSTGRESQL_SERVICE_HOST POSTGRESQL_SERVICE_PORT POSTGRESQL_PORT_5432_TCP
            POSTGRESQL_PORT_5432_TCP_ADDR RABBITMQ_SERVICE_HOST RABBITMQ_PORT_5672_TCP_PORT
            KUBERNETES_SERVICE_HOST KUBERNETES_PORT TASK_TYPE CELERY_BROKER_URL SDK_HOME";
        let found = near_misses(others.split_whitespace());
        assert_eq!(found, Vec::<String>::new());
    }
}
