//! The log on standard error: a line for each record, as text for people or as JSON for machines. Its
//! level can be changed while the service runs.

use std::backtrace::Backtrace;
use std::io::Write;
use std::{panic, thread};

use jiff::Timestamp;
use log::kv::{self, Key, Value, VisitSource};
use log::{LevelFilter, Record, info};
use serde_json::Map;

use crate::broker;
use crate::config::LogFormat;

/// Starts logging. Panics are logged with their location.
pub fn start(level: LevelFilter, format: LogFormat) {
    let mut builder = env_logger::Builder::new();
    // Messages of other crates below a warning are of no use to an operator. All of ours pass here,
    // since the level can change.
    builder
        .filter_level(LevelFilter::Warn)
        .filter_module(env!("CARGO_CRATE_NAME"), LevelFilter::Debug)
        // It warns of what it reports to its caller as well, such as a queue that does not exist.
        .filter_module(broker::LIBRARY, LevelFilter::Error);
    match format {
        LogFormat::Text => builder.format(|out, record| {
            let style = out.default_level_style(record.level());
            writeln!(
                out,
                "{:.3} {style}{:<5}{style:#} {} {}",
                Timestamp::now(),
                record.level(),
                thread::current().name().unwrap_or("-"),
                record.args()
            )
        }),
        LogFormat::Json => builder.format(|out, record| {
            let thread = thread::current();
            let name = thread.name().unwrap_or("-");
            writeln!(out, "{}", json(record, name, Timestamp::now()))
        }),
    };
    builder.init();
    log::set_max_level(level);
    panic::set_hook(Box::new(|panic| {
        log::error!("{panic}\n{}", Backtrace::force_capture());
    }));
}

/// Makes the log more verbose, up to DEBUG, or less, down to ERROR.
pub fn change_level(more: bool) {
    let before = log::max_level();
    let after = match (before, more) {
        (LevelFilter::Off | LevelFilter::Error, true) => LevelFilter::Warn,
        (LevelFilter::Warn, true) => LevelFilter::Info,
        (LevelFilter::Info | LevelFilter::Debug | LevelFilter::Trace, true) => LevelFilter::Debug,
        (LevelFilter::Debug | LevelFilter::Trace, false) => LevelFilter::Info,
        (LevelFilter::Info, false) => LevelFilter::Warn,
        (LevelFilter::Warn | LevelFilter::Error | LevelFilter::Off, false) => LevelFilter::Error,
    };
    // Logged at the more verbose of the two levels, so that it is seen either way.
    log::set_max_level(before.max(after));
    info!("the log's level is {after} now");
    log::set_max_level(after);
}

fn json(record: &Record<'_>, thread: &str, now: Timestamp) -> serde_json::Value {
    let mut fields = Fields(Map::new());
    // Only a source that fails itself would fail here, and none of ours does.
    let _ = record.key_values().visit(&mut fields);
    let Fields(mut line) = fields;
    line.insert("time".to_owned(), format!("{now:.3}").into());
    line.insert("level".to_owned(), record.level().as_str().into());
    line.insert("thread".to_owned(), thread.into());
    line.insert("message".to_owned(), record.args().to_string().into());
    line.into()
}

struct Fields(Map<String, serde_json::Value>);

impl<'kvs> VisitSource<'kvs> for Fields {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), kv::Error> {
        let text = value.to_string();
        if !text.is_empty() {
            self.0.insert(key.to_string(), text.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use log::Level;
    use serde_json::json;

    #[test]
    fn a_line_of_json_has_what_is_known() {
        let known = [
            ("job", "1-2-3"),
            ("reference", "a \"name\"\n"),
            ("task", ""),
        ];
        let record = Record::builder()
            .args(format_args!("job 1-2-3: running"))
            .level(Level::Info)
            .key_values(&known)
            .build();
        let line = json(&record, "handler-1", Timestamp::UNIX_EPOCH);
        assert_eq!(
            line,
            json!({"time": "1970-01-01T00:00:00.000Z", "level": "INFO", "thread": "handler-1",
                   "message": "job 1-2-3: running", "job": "1-2-3", "reference": "a \"name\"\n"})
        );
        assert!(!line.to_string().contains('\n'));
    }
}
