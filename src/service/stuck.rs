//! Reports what the process's threads are doing, for the log, when some of them do not end.
//!
//! Stack traces of other threads need a signal handler, and this program has no unsafe code:
//! `pprof` has one. It samples the threads that use the processor. For those that wait, the kernel
//! tells in which call.

use std::fmt::Write;
use std::fs;
use std::thread;
use std::time::Duration;

use crossbeam_channel::bounded;
use log::error;

/// How long the processor is sampled.
#[cfg(unix)]
const SAMPLED: Duration = Duration::from_secs(1);
/// After this long waiting is of no use: a thread is interrupted anywhere, and may hold a lock that
/// is needed to inspect it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Logs what each thread is doing. Only for the end of the process, since finding that out may harm
/// it.
pub(crate) fn log_threads() {
    error!("all threads:{}", states());
    let (done, is_done) = bounded(1);
    let sampler = thread::Builder::new().name("stacks".to_owned());
    let sampler = sampler.spawn(move || {
        let text = stacks().unwrap_or_else(|error| format!(" none, for {error}"));
        // The caller may have given up waiting.
        let _ = done.send(text);
    });
    let text = match sampler {
        Ok(_) => is_done.recv_timeout(PATIENCE).map_err(anyhow::Error::from),
        Err(error) => Err(error.into()),
    };
    match text {
        Ok(text) => error!("stack traces of the threads that use the processor:{text}"),
        Err(error) => error!("no stack traces: {error}"),
    }
}

/// A line for each thread: its name (what the kernel keeps of it), whether it runs or sleeps, in
/// which call of the kernel, and its processor time. Empty where there is no `/proc`.
fn states() -> String {
    let mut text = String::new();
    for task in fs::read_dir("/proc/self/task").into_iter().flatten() {
        let Ok(task) = task.map(|task| task.path()) else {
            continue;
        };
        // Any of them may be gone by now.
        let read = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default();
        let stat = read("stat");
        // What follows the name, which is in parentheses. Times are in hundredths of a second.
        let fields: Vec<_> = stat
            .rsplit_once(')')
            .map_or("", |(_, fields)| fields)
            .split_whitespace()
            .collect();
        let state = match fields.first() {
            Some(&"R") => "runs",
            Some(&"S") => "sleeps",
            Some(&"D") => "waits for the disk",
            Some(other) => other,
            None => continue,
        };
        let ticks = fields.iter().skip(11).take(2);
        let ticks: u64 = ticks.filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
        let processor = Duration::from_millis(ticks * 10);
        let _ = write!(text, "\n  {}: {state}", read("comm").trim());
        match read("wchan").trim() {
            "" | "0" => {}
            call => text.extend([" in ", call]),
        }
        let _ = write!(text, ", {processor:?} of processor time");
    }
    text
}

/// For each thread that uses the processor, where it was most often in a while.
#[cfg(unix)]
fn stacks() -> anyhow::Result<String> {
    use std::collections::HashMap;

    let guard = pprof::ProfilerGuardBuilder::default()
        .frequency(199)
        // A stack that is looked at in the middle of these may not be in order.
        .blocklist(&["libc", "libgcc", "pthread", "vdso"])
        .build()?;
    let _ = crossbeam_channel::after(SAMPLED).recv();
    let report = guard.report().build()?;
    let mut most: HashMap<u64, (&pprof::Frames, isize)> = HashMap::new();
    for (frames, count) in &report.data {
        let place = most.entry(frames.thread_id).or_insert((frames, 0));
        if *count > place.1 {
            *place = (frames, *count);
        }
    }
    let mut text = String::new();
    for (frames, count) in most.values() {
        let _ = write!(
            text,
            "\n  {}, {count} times in {SAMPLED:?}:",
            frames.thread_name
        );
        let symbols: Vec<_> = frames.frames.iter().flatten().collect();
        // The first are those of looking.
        let looking = symbols
            .iter()
            .rposition(|symbol| symbol.name().contains("pprof::"));
        for symbol in &symbols[looking.map_or(0, |last| last + 1)..] {
            let _ = write!(text, "\n    {}", symbol.name());
            if let (Some(_), Some(line)) = (&symbol.filename, symbol.lineno) {
                let _ = write!(text, "\n      at {}:{line}", symbol.filename());
            }
        }
    }
    Ok(text)
}

#[cfg(not(unix))]
fn stacks() -> anyhow::Result<String> {
    anyhow::bail!("this system has no signals")
}
