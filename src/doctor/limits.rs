//! RabbitMQ's own limits, which only its rabbitmqctl tells.

use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use crossbeam_channel::bounded;
use jiff::SignedDuration;

use super::cause::Kind;
use super::{Finding, Findings, Severity};
use crate::domain::overview::spoken;
use crate::telemetry::report::one_line;

/// How long rabbitmqctl may take, which starts a virtual machine, perhaps in a container.
const TOOL_DEADLINE: Duration = Duration::from_secs(60);
/// RabbitMQ's default.
const DEFAULT_CONSUMER_TIMEOUT_MS: i64 = 30 * 60 * 1000;

/// `longest` is the longest job in milliseconds, with what says so.
pub(super) fn limits(
    rabbitmqctl: Option<&str>,
    longest: Option<(i64, &'static str)>,
    retention: Duration,
    findings: &mut Findings,
) {
    const PART: &str = "RabbitMQ";
    let Some(command) = rabbitmqctl else {
        findings.add(
            PART,
            Severity::Note,
            "its consumer_timeout and how many files it may open are not known, for AMQP does not tell",
            "Run this with --rabbitmqctl, such as --rabbitmqctl \"docker compose exec -T rabbitmq rabbitmqctl\".",
        );
        findings.is(Kind::NotLookedAt);
        return;
    };
    let unknown = |what: &str, error: &anyhow::Error| {
        let found = format!("{what} not known: {}", one_line(&format!("{error:#}")));
        let remedy = "Put --rabbitmqctl right: the command has to work in a shell on this machine.";
        Finding::new(PART, Severity::Note, found, remedy)
    };
    let timeout = evaluate(command, CONSUMER_TIMEOUT).and_then(|text| parse_timeout(&text));
    findings.0.push(match timeout {
        Ok(timeout) => judge_consumer_timeout(timeout, longest, retention),
        Err(error) => unknown("its consumer_timeout is", &error),
    });
    let files = evaluate(command, FILES_AND_QUEUES).and_then(|text| parse_pair(&text));
    findings.0.push(match files {
        Ok((files, queues)) => judge_files(files, queues),
        Err(error) => unknown("how many files it may open is", &error),
    });
}

/// An Erlang expression for the shortest consumer timeout of a task queue: these are the queues with
/// priorities, which no quorum queue takes as workers want them; and since RabbitMQ 4.3 a classic queue
/// has no timeout. Since 3.12 a policy may set it. The texts are "4.3", "consumer-timeout" and
/// "x-max-priority", without quotes that a shell could take away.
const CONSUMER_TIMEOUT: &str = "\
    Set = application:get_env(rabbit, consumer_timeout), \
    Timeouts = [case rabbit_policy:get(<<99,111,110,115,117,109,101,114,45,116,105,109,101,111,117,116>>, Q) of \
            undefined -> Set; Timeout -> {ok, Timeout} end \
        || Q <- rabbit_amqqueue:list(), \
           lists:keymember(<<120,45,109,97,120,45,112,114,105,111,114,105,116,121>>, 1, amqqueue:get_arguments(Q))], \
    case rabbit_misc:version_compare(rabbit_misc:version(), [52,46,51], lt) of \
        false -> {ok, classic}; \
        true when Timeouts =:= [] -> Set; \
        true -> lists:min(Timeouts) end.";
/// An Erlang expression for how many files RabbitMQ may open, and how many queues it has in all
/// vhosts.
const FILES_AND_QUEUES: &str = "{proplists:get_value(max_fds, lists:flatten(erlang:system_info(check_io))), \
                                length(rabbit_amqqueue:list_names())}.";
/// Files that RabbitMQ needs for other things than queues.
const RESERVED_FILES: u64 = 100;
/// What RabbitMQ's own packages and documents ask for.
const ENOUGH_FILES: u64 = 65_536;

/// A RabbitMQ that may open fewer files than it has durable queues never comes up again: on
/// recovery it opens the files of each queue, and waits for ever for one more (seen with 3.10).
fn judge_files(files: u64, queues: u64) -> Finding {
    const REMEDY: &str = "Allow it 65,536: `ulimits: {nofile: 65536}` in a compose file, LimitNOFILE=65536 in its systemd \
         unit, `ulimit -n 65536` before it starts. Each job has up to three queues, for as long as its client \
         is away.";
    let found = format!("it has {queues} queues, and may open {files} files");
    let (severity, more) = if queues.saturating_add(RESERVED_FILES) >= files {
        (Severity::Error, ": its next start would hang")
    } else if queues.saturating_mul(2) >= files {
        (
            Severity::Warning,
            ", without which its next start would hang",
        )
    } else if files < ENOUGH_FILES {
        (
            Severity::Note,
            "; with more queues than that, a start hangs",
        )
    } else {
        (Severity::Ok, "")
    };
    let remedy = if severity == Severity::Ok { "" } else { REMEDY };
    Finding::new("RabbitMQ", severity, found + more, remedy)
}

/// Reads Erlang's `{1024,7}`.
fn parse_pair(text: &str) -> anyhow::Result<(u64, u64)> {
    let pair = text
        .trim()
        .strip_prefix('{')
        .and_then(|text| text.strip_suffix('}'))
        .and_then(|text| text.split_once(','));
    match pair.map(|(first, second)| (first.trim().parse(), second.trim().parse())) {
        Some((Ok(first), Ok(second))) => Ok((first, second)),
        Some(_) | None => bail!("{text:?} is no pair of numbers"),
    }
}

/// How long RabbitMQ waits for a worker to acknowledge its task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Timeout {
    Milliseconds(i64),
    /// Switched off.
    None,
    /// Not for queues of their type.
    NotForTasks,
    Default,
}

fn judge_consumer_timeout(
    timeout: Timeout,
    longest: Option<(i64, &'static str)>,
    retention: Duration,
) -> Finding {
    const REMEDY: &str = "Raise consumer_timeout in rabbitmq.conf above the longest job, or consumer-timeout in a policy \
         for the task queues where there is one. A worker acknowledges its task when that is done; past the timeout \
         it loses the task, which starts again.";
    let retention = i64::try_from(retention.as_millis()).unwrap_or(i64::MAX);
    let (timeout, no_timeout) = match timeout {
        Timeout::Milliseconds(timeout) => (Some(timeout), ""),
        Timeout::Default => (Some(DEFAULT_CONSUMER_TIMEOUT_MS), ""),
        Timeout::None => (None, "there is no consumer_timeout"),
        Timeout::NotForTasks => (
            None,
            "it has no consumer_timeout for task queues, which are classic ones",
        ),
    };
    let text = |time| spoken(SignedDuration::from_millis(time));
    let finding =
        |severity, found: String, remedy: &str| Finding::new("RabbitMQ", severity, found, remedy);
    match (timeout, longest) {
        (None, _) => finding(Severity::Ok, no_timeout.to_owned(), ""),
        (Some(timeout), Some((longest, what))) if longest >= timeout => finding(
            Severity::Warning,
            format!(
                "consumer_timeout is {}, and {what} {}",
                text(timeout),
                text(longest)
            ),
            REMEDY,
        ),
        (Some(timeout), _) if retention > timeout => finding(
            Severity::Note,
            format!(
                "consumer_timeout is {}, longer than any job so far; one without a timeout may run for {}",
                text(timeout),
                text(retention)
            ),
            REMEDY,
        ),
        (Some(timeout), _) => finding(
            Severity::Ok,
            format!("consumer_timeout is {}, longer than any job", text(timeout)),
            "",
        ),
    }
}

/// RabbitMQ's answer to an Erlang expression.
pub(super) fn evaluate(command: &str, expression: &str) -> anyhow::Result<String> {
    rabbitmqctl(command, &format!("eval '{expression}'"))
}

/// What rabbitmqctl prints; the arguments are as in a shell.
pub(super) fn rabbitmqctl(command: &str, arguments: &str) -> anyhow::Result<String> {
    let script = format!("{command} {arguments}");
    let (answer, answered) = bounded(1);
    let run = move || {
        let output = Command::new("sh")
            .arg("-c")
            .arg(script)
            .stdin(Stdio::null())
            .output();
        // The caller may have given up.
        let _ = answer.send(output);
    };
    thread::Builder::new()
        .name("rabbitmqctl".to_owned())
        .spawn(run)?;
    let output = answered
        .recv_timeout(TOOL_DEADLINE)
        .map_err(|_| anyhow::anyhow!("no answer within {TOOL_DEADLINE:?}"))?
        .context("sh")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!(
            "{} {}",
            text.trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(text)
}

/// Reads Erlang's `{ok,1800000}` or `undefined`.
fn parse_timeout(text: &str) -> anyhow::Result<Timeout> {
    let text = text.trim();
    let value = text
        .strip_prefix("{ok,")
        .and_then(|text| text.strip_suffix('}'));
    match value {
        None if text == "undefined" => Ok(Timeout::Default),
        None => bail!("{text:?} is no setting"),
        Some("undefined" | "infinity" | "false") => Ok(Timeout::None),
        Some("classic") => Ok(Timeout::NotForTasks),
        Some(number) => Ok(Timeout::Milliseconds(
            number.parse().context(number.to_owned())?,
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("{ok,1800000}\n", Some(Timeout::Milliseconds(1_800_000)))]
    #[case("undefined", Some(Timeout::Default))]
    #[case("{ok,undefined}", Some(Timeout::None))]
    #[case("{ok,classic}", Some(Timeout::NotForTasks))]
    #[case("Error: unable to perform an operation", None)]
    #[case("{ok,soon}", None)]
    fn timeouts_are_read_as_erlang_writes_them(#[case] text: &str, #[case] value: Option<Timeout>) {
        assert_eq!(parse_timeout(text).ok(), value);
    }

    #[rstest]
    #[case::not_for_tasks(Timeout::NotForTasks, Some(i64::MAX), 6, Severity::Ok)]
    #[case::none(Timeout::None, Some(i64::MAX), 6, Severity::Ok)]
    #[case::longer_than_all(Timeout::Milliseconds(5000), Some(4999), 5, Severity::Ok)]
    #[case::longer_than_all_so_far(Timeout::Milliseconds(5000), Some(4999), 6, Severity::Note)]
    #[case::as_long(Timeout::Milliseconds(5000), Some(5000), 6, Severity::Warning)]
    #[case::default(Timeout::Default, Some(1_800_001), 6, Severity::Warning)]
    #[case::no_jobs(Timeout::Default, None, 1801, Severity::Note)]
    fn a_consumer_timeout_is_held_against_the_longest_job(
        #[case] timeout: Timeout,
        #[case] longest: Option<i64>,
        #[case] retention: u64,
        #[case] severity: Severity,
    ) {
        let longest = longest.map(|longest| (longest, "a job that has run for so long"));
        let finding = judge_consumer_timeout(timeout, longest, Duration::from_secs(retention));
        assert_eq!(finding.severity, severity);
    }

    #[rstest]
    #[case::as_debian_starts_it(1024, 12, Severity::Note)]
    #[case::half(1024, 512, Severity::Warning)]
    #[case::all_but_what_is_reserved(1024, 923, Severity::Warning)]
    #[case::all(1024, 924, Severity::Error)]
    #[case::more(1024, 3000, Severity::Error)]
    #[case::enough(65_536, 30_000, Severity::Ok)]
    #[case::not_enough(65_536, 32_768, Severity::Warning)]
    fn files_are_held_against_queues(
        #[case] files: u64,
        #[case] queues: u64,
        #[case] severity: Severity,
    ) {
        let finding = judge_files(files, queues);
        assert_eq!(finding.severity, severity);
        assert_eq!(finding.remedy.is_empty(), severity == Severity::Ok);
    }

    #[rstest]
    #[case("{1024,7}\n", Some((1024, 7)))]
    #[case("{1048576, 0}", Some((1_048_576, 0)))]
    #[case("{undefined,7}", None)]
    #[case("Error:", None)]
    fn pairs_are_read_as_erlang_writes_them(#[case] text: &str, #[case] pair: Option<(u64, u64)>) {
        assert_eq!(parse_pair(text).ok(), pair);
    }
}
