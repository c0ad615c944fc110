//! The workflow definitions: what parameters a job may have, and what happens when they change.

use std::fs;
use std::path::PathBuf;

use amiquip::FieldTable;
use omotes_orchestrator::wire::{
    self, AVAILABLE_WORKFLOWS_KEY, AvailableWorkflows, JobSubmission, OMOTES_EXCHANGE,
    job_result::ResultType,
};
use prost::Message;
use serde_json::{Value, json};

use crate::harness::deployment::{Deployment, Service};
use crate::harness::peers::{Client, Worker};

fn write_workflows(deployment: &Deployment, workflows: Value) -> PathBuf {
    let file = deployment.folder.join("workflows.json");
    fs::write(&file, workflows.to_string()).unwrap();
    file
}

fn start(deployment: &Deployment, workflows: Value, variables: &[(&str, &str)]) -> Service {
    let file = write_workflows(deployment, workflows);
    let file = [("WORKFLOW_CONFIG_PATH", file.to_str().unwrap())];
    deployment.start_with(&[&file, variables].concat())
}

fn workflow(name: &str) -> Value {
    json!({"workflow_type_name": name, "workflow_type_description_name": name})
}

fn workflow_with_parameters() -> Value {
    let mut workflow = workflow("workflow_1");
    workflow["workflow_parameters"] = json!([
        {"parameter_type": "integer", "key_name": "pipes", "minimum": 1},
        {"parameter_type": "datetime", "key_name": "start",
         "constraints": [{"other_key_name": "end", "relation": "smaller"}]},
        {"parameter_type": "datetime", "key_name": "end"},
        {"parameter_type": "boolean", "key_name": "fast"},
        {"parameter_type": "string", "key_name": "solver", "default": "highs"},
    ]);
    json!([workflow])
}

const FAULTS: &str = "pipes is 0.0, expected a whole number from 1; start is 2.0, expected less \
                      than end, which is 1.0; fast is missing";

/// A submission with parameters that have all kinds of faults.
fn faulty(client: &Client) -> (uuid::Uuid, JobSubmission) {
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    let params = json!({"pipes": 0, "start": 2, "end": 1, "undefined": [true]});
    let submission = JobSubmission {
        params_dict: Some(wire::protobuf_struct(params.as_object().unwrap())),
        ..submission
    };
    (job, submission)
}

#[test]
fn parameters_that_do_not_fit_are_logged_and_passed_on() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = start(&deployment, workflow_with_parameters(), &[]);
    let (job, submission) = faulty(&client);
    client.send(&submission);
    let task = worker.take();
    assert_eq!(task.job, job);
    let warning = service.logged("do not fit workflow_1");
    assert!(warning.contains(&job.to_string()), "{warning}");
    assert!(warning.ends_with(FAULTS), "{warning}");
}

#[test]
fn parameters_that_do_not_fit_are_refused_where_asked_for() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let reject = [("REJECT_INVALID_PARAMS", "true")];
    let service = start(&deployment, workflow_with_parameters(), &reject);
    let (job, mut submission) = faulty(&client);
    client.send(&submission);
    let logs = format!("The parameters do not fit the workflow workflow_1: {FAULTS}.");
    let line = service.logged(&format!("refused: {logs}"));
    assert!(line.contains(&job.to_string()), "{line}");
    assert_eq!(client.outcome(job), (ResultType::Error, logs));

    let (job, fit) = client.submission("workflow_1");
    client.listen(job);
    let params = json!({"pipes": 1, "start": 1, "end": 2, "fast": true});
    submission = JobSubmission {
        params_dict: Some(wire::protobuf_struct(params.as_object().unwrap())),
        ..fit
    };
    client.send(&submission);
    let task = worker.take();
    assert_eq!(task.job, job);
    worker.succeed(&task, "<e/>");
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
}

/// Its client is told the values, and nobody else.
#[test]
fn what_is_kept_of_a_refusal_has_no_value_that_must_not_be_kept() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let variables = [
        ("REJECT_INVALID_PARAMS", "true"),
        ("KEEP_PARAMETERS", "false"),
    ];
    let _service = start(&deployment, workflow_with_parameters(), &variables);
    let (job, submission) = faulty(&client);
    client.send(&submission);
    let (_, logs) = client.outcome(job);
    assert!(logs.contains(FAULTS), "{logs}");
    deployment.no_jobs_left();
    let mut sql = deployment.sql();
    let kept = "SELECT coalesce(why, '') || coalesce(logs, '') || coalesce(parameters, '') AS text
                FROM job_history JOIN job_story USING (job_id)";
    let text: String = sql.query_one(kept, &[]).unwrap().get("text");
    assert!(
        text.contains("do not fit the workflow workflow_1: "),
        "{text}"
    );
    for fault in FAULTS.split("; ") {
        assert!(!text.contains(fault), "{fault}: {text}");
    }
    assert!(!text.contains(" is "), "{text}");
}

/// The names in the next announcement that a client hears.
fn announced(client: &Client) -> Vec<String> {
    let taken = client.peer.next("a client's workflows");
    let message = AvailableWorkflows::decode(taken.body.as_slice()).unwrap();
    let names = message.workflows.into_iter();
    names.map(|workflow| workflow.type_name).collect()
}

#[test]
fn definitions_are_read_again_on_sighup() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    client.peer.declare("a client's workflows");
    let key = AVAILABLE_WORKFLOWS_KEY;
    let channel = &client.peer.channel;
    channel
        .queue_bind(
            "a client's workflows",
            OMOTES_EXCHANGE,
            key,
            FieldTable::new(),
        )
        .unwrap();
    let service = start(&deployment, json!([workflow("one")]), &[]);
    assert_eq!(announced(&client), ["one"]);
    let refused = client.submit("two");
    assert_eq!(client.outcome(refused).0, ResultType::Error);

    write_workflows(&deployment, json!([workflow("one"), workflow("two")]));
    service.signal("-HUP");
    assert_eq!(announced(&client), ["one", "two"]);
    let worker = Worker::new(&deployment, "two");
    let job = client.submit("two");
    assert_eq!(worker.take().job, job);

    write_workflows(&deployment, json!([workflow("three"), 3]));
    service.signal("-HUP");
    let fault = service.logged("the workflow definitions stay as they were");
    assert!(
        fault.contains("$[1]: found 3, expected an object"),
        "{fault}"
    );
    let job = client.submit("two");
    assert_eq!(worker.take().job, job);
    assert_eq!(client.peer.queue_length("a client's workflows"), 0);

    // A result belongs to its job, also when the workflow is gone.
    let job = client.submit("two");
    let task = worker.take();
    write_workflows(&deployment, json!([]));
    service.signal("-HUP");
    assert_eq!(announced(&client), [""; 0]);
    worker.succeed(&task, "<e/>");
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    assert!(service.stop().success());
}
