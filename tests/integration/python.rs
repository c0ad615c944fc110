//! End to end with the real SDK and real Celery workers, in the versions that deployments have.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Service, eventually, setting};

pub const PYTHON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python");

/// A service that knows the workflow of the workers here.
pub fn start(deployment: &Deployment) -> Service {
    let workflows = format!("{PYTHON}/workflows.json");
    deployment.start_with(&[("WORKFLOW_CONFIG_PATH", &workflows)])
}

/// A Python program of these tests in the environment of an SDK version.
fn python(deployment: &Deployment, sdk: &str, program: &str) -> Command {
    let python = Path::new(&setting("VENVS")).join(format!("sdk-{sdk}/bin/python"));
    assert!(
        python.exists(),
        "{}: `./run.sh test` makes it",
        python.display()
    );
    let mut command = Command::new(python);
    command
        .arg(format!("{PYTHON}/{program}"))
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .envs(deployment.variables())
        .env("LOG_LEVEL", "INFO")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(&deployment.folder)
        .stdin(Stdio::null());
    command
}

/// A Celery worker with all its child processes, ended when dropped.
pub struct CeleryWorker {
    /// Its host's name.
    pub host: String,
    child: Child,
}

impl CeleryWorker {
    /// Starts one and waits until it takes tasks.
    pub fn new(deployment: &Deployment, sdk: &str) -> CeleryWorker {
        CeleryWorker::with(deployment, sdk, &[])
    }

    /// One with more variables than those of its connection.
    pub fn with(deployment: &Deployment, sdk: &str, variables: &[(&str, &str)]) -> CeleryWorker {
        let host = format!("host-{}", Uuid::new_v4().simple());
        let log = deployment.folder.join(format!("{host}.log"));
        // The worker reads the variables of its own connection.
        let mut command = python(deployment, sdk, "worker.py");
        for (suffix, name) in [
            ("HOSTNAME", "127.0.0.1".to_owned()),
            ("PORT", deployment.rabbitmq_port().to_string()),
            ("USERNAME", setting("RABBITMQ_USER")),
            ("PASSWORD", setting("RABBITMQ_PASSWORD")),
            ("VIRTUALHOST", deployment.celery_vhost()),
        ] {
            command.env(format!("RABBITMQ_{suffix}"), name);
        }
        let child = command
            .env("WORKER_HOST", &host)
            .envs(variables.iter().copied())
            // A group of its own, for it may have to be killed as a whole.
            .process_group(0)
            .stdout(File::create(&log).unwrap())
            .stderr(File::create(log.with_extension("err")).unwrap())
            .spawn()
            .unwrap();
        let worker = CeleryWorker { host, child };
        eventually(
            &format!("a worker that is ready: {}", log.display()),
            || {
                let files = [log.clone(), log.with_extension("err")];
                let said = files.map(|file| fs::read_to_string(file).unwrap());
                said.iter()
                    .any(|said| said.contains(" ready."))
                    .then_some(())
            },
        );
        worker
    }

    /// Ends it with all its children as the kernel does with a container: at once.
    pub fn kill(&mut self) {
        let group = format!("-{}", self.child.id());
        let killed = Command::new("kill").args(["-KILL", "--", &group]).status();
        assert!(killed.unwrap().success());
        self.child.wait().unwrap();
    }

    /// To the main process alone.
    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args([name, &id]).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for CeleryWorker {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_some()) {
            return;
        }
        // QUIT is Celery's cold shutdown, which ends the children too; unless it hangs, as it may
        // when one of them has been killed.
        let id = self.child.id();
        let _ = Command::new("kill")
            .args(["-QUIT", &id.to_string()])
            .status();
        let patience = Instant::now();
        eventually("the worker ends", || {
            if patience.elapsed() > Duration::from_secs(10) {
                let group = format!("-{id}");
                let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
            }
            self.child.try_wait().unwrap()
        });
    }
}

pub struct SdkClient {
    child: Child,
    stories: PathBuf,
}

impl SdkClient {
    pub fn new(deployment: &Deployment, sdk: &str, jobs: &[Value]) -> SdkClient {
        let name = format!("client-{}", Uuid::new_v4());
        let stories = deployment.folder.join(format!("{name}.json"));
        let file =
            |ending| File::create(deployment.folder.join(format!("{name}.{ending}"))).unwrap();
        let child = python(deployment, sdk, "client.py")
            .arg(json!({"jobs": jobs}).to_string())
            .arg(&stories)
            .stdout(file("out"))
            .stderr(file("err"))
            .spawn()
            .unwrap();
        SdkClient { child, stories }
    }

    /// What it has heard of each job.
    pub fn stories(mut self) -> Vec<Value> {
        assert!(self.child.wait().unwrap().success(), "the client failed");
        serde_json::from_slice(&fs::read(self.stories).unwrap()).unwrap()
    }
}

pub fn order(behaviour: &str) -> Value {
    json!({
        "workflow": "steerable",
        "params": {"behaviour": behaviour, "number": 1.5},
        "reference": behaviour,
    })
}

#[rstest]
#[case::sdk_4_1_celery_5_3("4.1")]
#[case::sdk_4_2_celery_5_4("4.2")]
#[case::sdk_4_3_celery_5_7("4.3")]
fn a_client_and_a_worker_cannot_tell_the_difference(#[case] sdk: &str) {
    let deployment = Deployment::new();
    let service = start(&deployment);
    let worker = CeleryWorker::new(&deployment, sdk);
    let mut cancelled = order("sleep");
    cancelled["cancel_on"] = "RUNNING".into();
    let mut unknown = order("succeed");
    unknown["workflow"] = "no_such_workflow".into();
    let jobs = [
        order("succeed"),
        order("fail"),
        order("raise"),
        unknown,
        cancelled,
        order("succeed"),
    ];
    let stories = SdkClient::new(&deployment, sdk, &jobs).stories();

    let ran = json!(["ENQUEUED", "RUNNING"]);
    for (story, job) in stories.iter().zip(&jobs) {
        let (statuses, result) = match job["reference"].as_str().unwrap() {
            _ if job["workflow"] == "no_such_workflow" => (json!([]), "ERROR"),
            "succeed" => (ran.clone(), "SUCCEEDED"),
            "sleep" => (json!(["ENQUEUED", "RUNNING", "CANCELLED"]), "CANCELLED"),
            _ => (ran.clone(), "ERROR"),
        };
        assert_eq!(story["statuses"], statuses, "{story}");
        assert_eq!(story["result"], result, "{story}");
    }
    let half = json!([0.5, "half way"]);
    assert_eq!(
        stories[0]["progress"],
        json!([half, [1.0, "Calculation finished."]])
    );
    assert_eq!(stories[0]["messages"], json!([["a remark", 2, "an-asset"]]));
    let output = stories[0]["output_esdl"].as_str().unwrap();
    assert!(output.contains("network_succeed"), "{output}");
    assert!(
        stories[0]["logs"]
            .as_str()
            .unwrap()
            .contains("asked to succeed")
    );
    assert!(
        stories[3]["logs"]
            .as_str()
            .unwrap()
            .contains("no_such_workflow is unknown")
    );

    deployment.no_jobs_left();
    let kept = "SELECT count(*) FROM esdl_time_series_info WHERE esdl_id LIKE 'output-%'";
    assert_eq!(deployment.count(kept), 2);
    drop(worker);
    assert!(service.stop().success());
}

#[test]
fn a_job_cancelled_in_the_queue_is_never_run() {
    let deployment = Deployment::new();
    let _service = start(&deployment);
    let mut cancelled = order("succeed");
    cancelled["cancel_on"] = "ENQUEUED".into();
    let stories = SdkClient::new(&deployment, "4.3", &[cancelled]).stories();
    assert_eq!(stories[0]["statuses"], json!(["ENQUEUED", "CANCELLED"]));
    assert_eq!(stories[0]["result"], "CANCELLED");
    // The worker that comes later takes the task and is told to end it; the next job runs.
    let _worker = CeleryWorker::new(&deployment, "4.3");
    let stories = SdkClient::new(&deployment, "4.3", &[order("succeed")]).stories();
    assert_eq!(stories[0]["result"], "SUCCEEDED");
    let sql = "SELECT count(*) FROM job_history WHERE outcome = 'CANCELLED' AND running_at IS NULL";
    deployment.comes_to(1, sql);
}

#[test]
fn a_task_that_kills_its_worker_ends_as_a_crash_loop() {
    let deployment = Deployment::new();
    let _service = start(&deployment);
    let _worker = CeleryWorker::new(&deployment, "4.3");
    let jobs = [order("die"), order("succeed")];
    let stories = SdkClient::new(&deployment, "4.3", &jobs).stories();
    assert_eq!(stories[0]["statuses"], json!(["ENQUEUED", "RUNNING"]));
    assert_eq!(stories[0]["result"], "ERROR");
    assert_eq!(
        stories[0]["logs"],
        "Job cannot be processed due to being retried the maximum number of times."
    );
    assert_eq!(stories[1]["result"], "SUCCEEDED");
}

/// As OMOTES ships its workers: each task has a process to itself.
const ONE_TASK_EACH: [(&str, &str); 1] = [("MAX_TASKS_BEFORE_RESTART", "1")];

#[test]
fn a_worker_that_replaces_its_process_after_each_task_runs_one_job_after_the_other() {
    let deployment = Deployment::new();
    let _service = start(&deployment);
    let _worker = CeleryWorker::with(&deployment, "4.3", &ONE_TASK_EACH);
    let mut cancelled = order("sleep");
    cancelled["cancel_on"] = "RUNNING".into();
    // The client waits until the second one runs, with those before it done and the others behind.
    let some = vec![order("succeed"); 4];
    let between = [cancelled.clone(), order("fail"), order("die"), cancelled];
    let jobs = [&some[..], &between[..2], &some, &between[2..], &some].concat();
    let stories = SdkClient::new(&deployment, "4.3", &jobs).stories();
    for (story, job) in stories.iter().zip(&jobs) {
        let (statuses, result) = match job["reference"].as_str().unwrap() {
            "succeed" => (json!(["ENQUEUED", "RUNNING"]), "SUCCEEDED"),
            "sleep" => (json!(["ENQUEUED", "RUNNING", "CANCELLED"]), "CANCELLED"),
            _ => (json!(["ENQUEUED", "RUNNING"]), "ERROR"),
        };
        assert_eq!(story["result"], result, "{story}");
        assert_eq!(story["statuses"], statuses, "{story}");
        if job["reference"] == "succeed" {
            let progress = json!([[0.5, "half way"], [1.0, "Calculation finished."]]);
            assert_eq!(story["progress"], progress, "{story}");
        }
    }
    deployment.no_jobs_left();
    for (outcome, expected) in [("SUCCEEDED", 12), ("CANCELLED", 2), ("FAILED", 1)] {
        let sql =
            format!("SELECT count(*) FROM job_history WHERE outcome = '{outcome}' AND starts = 1");
        assert_eq!(deployment.count(&sql), expected, "{outcome}");
    }
    // Given out again when its process was gone: the workers are asked about the second start, and
    // a third one does not wait for what they say.
    let looped = "SELECT count(*) FROM job_history WHERE outcome = 'CRASH_LOOP' AND starts = 2";
    assert_eq!(deployment.count(looped), 1);
}

#[rstest]
#[case::that_may_start_once("1", "ERROR")]
#[case::that_may_start_twice("2", "SUCCEEDED")]
fn the_task_of_a_worker_that_is_killed_goes_to_another(#[case] limit: &str, #[case] result: &str) {
    let deployment = Deployment::new();
    let workflows = format!("{PYTHON}/workflows.json");
    let _service = deployment.start_with(&[
        ("WORKFLOW_CONFIG_PATH", &workflows),
        ("DELIVERY_LIMIT_THRESHOLD_PER_JOB", limit),
    ]);
    let mut worker = CeleryWorker::with(&deployment, "4.3", &ONE_TASK_EACH);
    let file = deployment.folder.join("go on");
    let mut waiting = order(&format!("wait for {}", file.display()));
    waiting["reference"] = "wait".into();
    let client = SdkClient::new(
        &deployment,
        "4.3",
        &[order("succeed"), waiting, order("succeed")],
    );
    let starts = "SELECT count(*) FROM job_starts";
    let running = format!("{starts} JOIN job USING (job_id) WHERE job_reference = 'wait'");
    deployment.comes_to(1, &running);
    worker.kill();
    let _other = CeleryWorker::with(&deployment, "4.3", &ONE_TASK_EACH);
    deployment.comes_to(2, &running);
    if limit == "1" {
        // The other worker alone says that it runs the task.
        let ended = "SELECT count(*) FROM job_history WHERE outcome = 'CRASH_LOOP'";
        deployment.comes_to(1, ended);
    }
    // One that is ended has been told so, and goes on until it hears it.
    fs::write(&file, "").unwrap();
    let stories = client.stories();
    let results: Vec<_> = stories.iter().map(|story| &story["result"]).collect();
    assert_eq!(results, ["SUCCEEDED", result, "SUCCEEDED"], "{stories:?}");
    if result == "ERROR" {
        assert_eq!(
            stories[1]["logs"],
            "Job cannot be processed due to being retried the maximum number of times."
        );
    }
    deployment.no_jobs_left();
    let starts = "SELECT starts::bigint FROM job_history WHERE job_reference = 'wait'";
    assert_eq!(deployment.count(starts), 2);
}

#[test]
fn five_clients_and_three_workers_finish_five_hundred_jobs() {
    const CLIENTS: usize = 5;
    const JOBS_EACH: usize = 100;
    let deployment = Deployment::new();
    let _service = start(&deployment);
    let _workers = ["4.1", "4.2", "4.3"].map(|sdk| CeleryWorker::new(&deployment, sdk));
    let jobs = vec![order("succeed"); JOBS_EACH];
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| SdkClient::new(&deployment, ["4.1", "4.2", "4.3"][number % 3], &jobs))
        .collect();
    for client in clients {
        for story in client.stories() {
            assert_eq!(story["result"], "SUCCEEDED", "{story}");
        }
    }
    deployment.no_jobs_left();
    let succeeded = "SELECT count(*) FROM job_history WHERE outcome = 'SUCCEEDED'";
    assert_eq!(
        deployment.count(succeeded),
        i64::try_from(CLIENTS * JOBS_EACH).unwrap()
    );
}
