//! Threads that do not come back, and those that watch over them.

use omotes_orchestrator::wire::{self, job_result::ResultType};
use prost::Message;
use rstest::rstest;
use serde_json::Value;

use crate::crashes::{Held, behind_a_proxy, borrowed, rabbitmq_proxy};
use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::peers::{Client, Worker, kept_its_session};
use crate::harness::proxy::End;

/// A tenth of the time that the watchdog has otherwise.
const HASTE: (&str, &str) = ("OMOTES_FAULT_HASTE", "1");

/// Waits until this part is not well, and says why.
fn unwell(service: &Service, part: &str) -> String {
    eventually(&format!("{part} is not well"), || {
        let (ready, body) = service.readiness()?;
        let part = &body["parts"][part];
        assert!(!ready || part["ok"] == true, "{body}");
        (part["ok"] == Value::Bool(false)).then(|| part["why"].as_str().unwrap().to_owned())
    })
}

/// What it was held in, and with what a thread is called that does not end then.
#[rstest]
#[case::deciding("a reference", false, "handler-")]
#[case::using_the_processor("a reference", true, "handler-")]
#[case::consuming("consumer", false, "consume-submissions")]
#[case::looking_after_connections("pulse", false, "pulse")]
#[case::maintenance("maintenance", false, "maintenance")]
fn a_thread_that_does_not_end_ends_the_process(
    #[case] point: &str,
    #[case] spins: bool,
    #[case] thread: &str,
) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let proxy = rabbitmq_proxy();
    let mut variables = behind_a_proxy(&proxy);
    variables.push(("TIMEOUT_JOB_HANDLER_RERUN_SEC", "1".to_owned()));
    if spins {
        variables.push(("OMOTES_FAULT_SPIN", "1".to_owned()));
    }
    let mut held = Held::at(
        point,
        &deployment,
        &[&borrowed(&variables)[..], &[HASTE]].concat(),
    );
    let job = client.submit("workflow_1");
    held.reached();
    proxy.cut(End::Rst);
    // Before all its threads have ended, which one will not.
    unwell(&held.service, "broker");
    for part in ["handling", "publishing"] {
        let why = unwell(&held.service, part);
        assert_eq!(why, "not known without a session with RabbitMQ");
    }
    assert_eq!(held.service.wait().code(), Some(1));
    let log = held.service.log();
    let line = log
        .lines()
        .find(|line| line.contains("but not all of its threads: "));
    let line = line.unwrap();
    assert!(line.contains(&format!("its threads: {thread}")), "{line}");
    if thread == "handler-" {
        let doing = format!("has been deciding about a submission for job {job} for ");
        assert!(line.contains(&doing), "{line}");
    }
    let (_, threads) = log.split_once("all threads:").unwrap();
    // The kernel keeps fifteen characters of a name.
    let line = threads
        .lines()
        .find(|line| line.contains(&thread[..thread.len().min(15)]));
    assert!(line.is_some_and(|line| line.contains(" of processor time")));
    if spins {
        let (_, traces) = log.split_once("threads that use the processor:").unwrap();
        let (_, trace) = traces.split_once("\n  handler-").unwrap();
        assert!(trace.contains("::transact\n"), "{trace}");
        assert!(trace.contains("/src/fault_point.rs:"), "{trace}");
    }
    held.forget();
    let _next = deployment.start();
    assert_eq!(worker.take().job, job);
}

/// Although it waits for nobody, and no connection is lost.
#[test]
fn a_message_that_is_read_without_end_is_told_and_ends_the_process() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let variables = [HASTE, ("OMOTES_FAULT_SPIN", "1")];
    let mut held = Held::at("the slow one", &deployment, &variables);
    let (job, submission) = client.submission("workflow_1");
    let body = submission.encode_to_vec();
    client
        .peer
        .send_as("job_submissions", &body, "the slow one");
    held.reached();
    let why = unwell(&held.service, "handling");
    let what = format!(
        "has been reading message the slow one of {} bytes from submissions for job {job} for ",
        body.len()
    );
    assert!(why.contains(&what), "{why}");
    assert!(why.starts_with("handler-"), "{why}");
    let cause = held.service.logged("the session with RabbitMQ ends: ");
    assert!(cause.contains(&what), "{cause}");
    assert_eq!(held.service.wait().code(), Some(1));
    held.forget();
}

#[test]
fn a_handler_that_comes_back_is_well_again() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    // Unhurried, it has two minutes.
    let held = Held::at("before publish", &deployment, &[]);
    let job = client.submit("workflow_1");
    held.reached();
    let why = unwell(&held.service, "handling");
    assert!(why.contains("has been handling a batch for "), "{why}");
    let service = held.go_on();
    service.wait_until_ready();
    assert_eq!(worker.take().job, job);
    kept_its_session(&deployment, &service);
}

#[test]
fn a_message_that_makes_its_reader_panic_becomes_a_dead_letter() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start_with(&[
        ("OMOTES_FAULT_POINT", "unreadable"),
        ("HANDLER_THREADS", "1"),
    ]);
    let first = client.submit("workflow_1");
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    let body = submission.encode_to_vec();
    client.peer.send_as("job_submissions", &body, "unreadable");
    let last = client.submit("workflow_1");
    assert_eq!(worker.take().job, first);
    assert_eq!(worker.take().job, last);
    let letter = client.peer.next(wire::DEAD_LETTERS_QUEUE);
    assert_eq!(letter.body, body);
    let headers = format!("{:?}", letter.properties);
    assert!(headers.contains("a fault in the orchestrator"), "{headers}");
    let (result, logs) = client.outcome(job);
    assert_eq!(result, ResultType::Error);
    assert!(logs.contains("a fault in the orchestrator"), "{logs}");
    kept_its_session(&deployment, &service);
    assert_eq!(client.peer.queue_length("job_submissions"), 0);
    assert!(service.stop().success());
    assert_eq!(client.peer.queue_length("job_submissions"), 0);
}
