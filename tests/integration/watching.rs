//! `jobs watch` on a terminal of its own.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};

use omotes_orchestrator::wire::job_result::ResultType;
use rstest::rstest;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, eventually};
use crate::harness::peers::{Client, Worker, running_job};

const ENTER_SCREEN: &str = "\u{1b}[?1049h";
const LEAVE_SCREEN: &str = "\u{1b}[?1049l";
const SHOW_CURSOR: &str = "\u{1b}[?25h";

struct Terminal {
    child: Child,
    typed: ChildStdin,
    seen: PathBuf,
    id: PathBuf,
}

impl Terminal {
    /// Of 100 columns and so many rows.
    fn new(deployment: &Deployment, rows: u16, arguments: &str) -> Terminal {
        let command = deployment.command(&[]);
        let program = command.get_program().display().to_string();
        let (seen, id) = (
            deployment.folder.join("terminal"),
            deployment.folder.join("id"),
        );
        let line = format!(
            "stty cols 100 rows {rows}; echo $$ >{}; exec {program} jobs watch {arguments}",
            id.display()
        );
        let variables = command
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?)));
        let mut child = Command::new("script")
            .args(["-qefc", &line, "/dev/null"])
            .envs(variables)
            .stdin(Stdio::piped())
            .stdout(File::create(&seen).unwrap())
            .spawn()
            .unwrap();
        let typed = child.stdin.take().unwrap();
        Terminal {
            child,
            typed,
            seen,
            id,
        }
    }

    fn seen(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.seen).unwrap()).into_owned()
    }

    /// Waits until something new has this text; returns all that is new.
    fn shows(&self, after: usize, text: &str) -> usize {
        eventually(&format!("{text:?} on the terminal"), || {
            let seen = self.seen();
            seen[after..].contains(text).then_some(seen.len())
        })
    }

    fn types(&mut self, keys: &str) -> usize {
        let before = self.seen().len();
        self.typed.write_all(keys.as_bytes()).unwrap();
        before
    }

    fn code(&mut self) -> Option<i32> {
        eventually("it ends", || self.child.try_wait().unwrap()).code()
    }

    /// The terminal is as it was.
    fn is_restored(&self) {
        let seen = self.seen();
        let last = seen.rsplit(ENTER_SCREEN).next().unwrap();
        assert!(
            last.contains(LEAVE_SCREEN) && last.contains(SHOW_CURSOR),
            "{seen:?}"
        );
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn submit(client: &Client, reference: &str) -> Uuid {
    let (job, mut submission) = client.submission("workflow_1");
    submission.job_reference = Some(reference.to_owned());
    client.listen(job);
    client.send(&submission);
    client.status(job);
    job
}

#[test]
fn jobs_are_watched_narrowed_down_and_cancelled() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let client = Client::new(&deployment);
    let mut terminal = Terminal::new(&deployment, 24, "");
    terminal.shows(0, "q quit");
    terminal.shows(0, "no job waits or runs");
    let (one, other) = (
        submit(&client, "first of two"),
        submit(&client, "second of two"),
    );
    let place = terminal.shows(0, "second of two");
    terminal.shows(0, &one.to_string()[..8]);
    // A filter that leaves one.
    let before = terminal.types("/second\r");
    terminal.shows(before, "1/1 jobs");
    assert!(place <= before);
    // It is asked for, and not at once.
    let before = terminal.types("c");
    terminal.shows(
        before,
        &format!("cancel job {other} second of two? y cancels it"),
    );
    let before = terminal.types("n");
    terminal.shows(before, "nothing was cancelled");
    let before = terminal.types("c");
    terminal.shows(before, "y cancels it");
    let before = terminal.types("y");
    terminal.shows(before, &format!("job {other} is asked to end"));
    assert_eq!(client.outcome(other).0, ResultType::Cancelled);
    // Back to all, and one of them in full.
    let before = terminal.types("/\u{1b}");
    terminal.shows(before, "first of two");
    let before = terminal.types("\r");
    terminal.shows(before, "any key leads back");
    terminal.shows(before, &one.to_string());
    terminal.types("x");
    // Those that have ended.
    let before = terminal.types("f");
    terminal.shows(before, "1/1 jobs ended");
    let before = terminal.types("c");
    terminal.shows(before, "have ended already");
    terminal.types("q");
    assert_eq!(terminal.code(), Some(0));
    terminal.is_restored();
}

#[test]
fn a_long_list_is_scrolled() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let running = running_job(&client, &worker, None);
    for number in 1..=9 {
        submit(&client, &format!("job number {number}"));
    }
    // A title, a heading, four jobs, and the keys.
    let mut terminal = Terminal::new(&deployment, 7, "--workflow workflow_1");
    terminal.shows(0, "1/10 jobs");
    terminal.shows(0, &running.job.to_string()[..8]);
    assert!(!terminal.seen().contains("job number 9"));
    let before = terminal.types("jjjj");
    terminal.shows(before, "5/10 jobs");
    let before = terminal.types("G");
    terminal.shows(before, "10/10 jobs");
    terminal.shows(before, "job number 9");
    let before = terminal.types("g");
    terminal.shows(before, "1/10 jobs");
    terminal.types("\u{3}");
    assert_eq!(terminal.code(), Some(0));
    terminal.is_restored();
}

#[rstest]
#[case::asked_to_end("-TERM", 143)]
#[case::interrupted("-INT", 0)]
fn a_signal_leaves_the_terminal_as_it_was(#[case] signal: &str, #[case] code: i32) {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let mut terminal = Terminal::new(&deployment, 24, "");
    terminal.shows(0, "q quit");
    let id = fs::read_to_string(&terminal.id).unwrap();
    let sent = Command::new("kill")
        .args([signal, id.trim()])
        .status()
        .unwrap();
    assert!(sent.success());
    assert_eq!(terminal.code(), Some(code));
    terminal.is_restored();
}

#[test]
fn an_outage_is_shown_and_holds_up_no_key() {
    let deployment = Deployment::new();
    let mut terminal = Terminal::new(&deployment, 24, "");
    // Its tables are not there yet.
    terminal.shows(0, "job");
    terminal.types("q");
    assert_eq!(terminal.code(), Some(0));
    terminal.is_restored();
}

#[test]
fn without_a_terminal_the_list_is_printed() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let client = Client::new(&deployment);
    submit(&client, "one to watch");
    let seen = deployment.folder.join("paper");
    let mut command = deployment.command(&["jobs", "watch"]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(File::create(&seen).unwrap())
        .spawn()
        .unwrap();
    eventually("the list twice", || {
        let text = fs::read_to_string(&seen).unwrap();
        (text.matches("one to watch").count() >= 2).then_some(())
    });
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &id])
            .status()
            .unwrap()
            .success()
    );
    assert!(child.wait().unwrap().success());
    assert!(!fs::read_to_string(&seen).unwrap().contains('\u{1b}'));
}
