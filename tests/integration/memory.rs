//! That nothing anybody sends makes the service need more memory than a small container has.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use amiquip::{AmqpProperties, AmqpValue, Exchange, FieldTable, Publish};
use omotes_orchestrator::wire::{JobSubmission, job_result::ResultType};
use prost::Message as _;

use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::peers::{Client, Task, Worker, running_job};

const MIB: usize = 1024 * 1024;
const LIMIT: usize = 512 * MIB;

/// A memory cgroup, gone when dropped.
struct Cgroup {
    folder: PathBuf,
    /// Names of files: of the most memory there was, and of the count of processes that were
    /// killed for want of it.
    peak: &'static str,
    kills: &'static str,
}

impl Cgroup {
    /// One with [`LIMIT`] bytes and no swap.
    ///
    /// # Errors
    /// This machine or this user cannot have one.
    fn new(name: &str) -> Result<Cgroup, String> {
        let (root, peak, kills, limits) = if fs::exists("/sys/fs/cgroup/memory").unwrap() {
            // With swap, where the kernel counts that.
            let limits = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"];
            let files = ("memory.max_usage_in_bytes", "memory.oom_control");
            ("/sys/fs/cgroup/memory", files.0, files.1, limits)
        } else {
            let limits = ["memory.max", "memory.swap.max"];
            // It may be on already, and if it cannot be, the limit has no file.
            let _ = fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
            ("/sys/fs/cgroup", "memory.peak", "memory.events", limits)
        };
        let folder = PathBuf::from(root).join(format!("omotes_{name}"));
        fs::create_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let group = Cgroup {
            folder,
            peak,
            kills,
        };
        for file in limits {
            let path = group.folder.join(file);
            let value = if file.contains("swap.max") { 0 } else { LIMIT };
            match fs::write(&path, value.to_string()) {
                Err(error) if file == limits[0] => {
                    return Err(format!("{}: {error}", path.display()));
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(group)
    }

    /// The same command, inside.
    fn around(&self, command: &Command) -> Command {
        let mut inside = Command::new("/bin/sh");
        inside
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(self.folder.join("cgroup.procs"))
            .arg(command.get_program())
            .args(command.get_args())
            .current_dir(command.get_current_dir().unwrap())
            .env_clear();
        for (name, value) in command.get_envs() {
            inside.env(name, value.unwrap());
        }
        inside
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.folder.join(file)).unwrap_or_default()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its process has just ended, and may still be in it for a moment.
        eventually("the cgroup can go", || {
            fs::remove_dir(&self.folder).ok().or_else(|| {
                let gone = !self.folder.exists();
                gone.then_some(())
            })
        });
    }
}

/// A service that has no more memory than [`LIMIT`]. Where it cannot be kept from having more, it
/// is watched.
struct Confined {
    // Dropped first: a cgroup with processes cannot go.
    service: Service,
    cgroup: Option<Cgroup>,
}

impl Confined {
    fn start(deployment: &Deployment) -> Confined {
        let mut command = deployment.command(&["run"]);
        let cgroup = match Cgroup::new(&deployment.name) {
            Ok(group) => Some(group),
            Err(why) => {
                eprintln!("no cgroup with a limit of memory, so it is only measured: {why}");
                None
            }
        };
        if let Some(group) = &cgroup {
            command = group.around(&command);
        }
        let service = deployment.launch_command(command);
        service.wait_until_ready();
        Confined { service, cgroup }
    }

    /// That it has neither been killed nor had more memory than it may.
    fn is_well(&self, after: &str) {
        let peak = self.service.peak_memory();
        let group = self.cgroup.as_ref();
        eprintln!(
            "peak memory after {after}: {peak} MiB; in the cgroup: {}",
            group.map_or("none".to_owned(), |group| group.read(group.peak))
        );
        let kills = group.map_or(String::new(), |group| group.read(group.kills));
        let killed = kills
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "))
            .is_some_and(|count| count != "0");
        assert!(!killed, "killed after {after}: {kills}");
        assert!(peak < (LIMIT / MIB) as u64, "{peak} MiB after {after}");
    }
}

/// A field of a protobuf message that is a text or a message.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    prost::encode_length_delimiter(content.len(), &mut field).unwrap();
    field.extend_from_slice(content);
    field
}

/// A submission with so many bytes of parameters: one list of empty values.
fn empty_values(client: &Client, bytes: usize) {
    let (job, submission) = client.submission("workflow_2");
    client.listen(job);
    let items = field(1, &[]).repeat(bytes / 2);
    let value = field(2, &field(6, &items));
    drop(items);
    let entry = [field(1, b"key"), value].concat();
    let mut body = submission.encode_to_vec();
    body.extend(field(5, &field(1, &entry)));
    client.peer.send("job_submissions", &body);
    let (result, logs) = client.outcome(job);
    assert_eq!(result, ResultType::Error);
    assert!(logs.contains("more than 100,000 values"), "{logs}");
}

/// Jobs with long references, which are all cancelled at once.
fn long_references(deployment: &Deployment, client: &Client, worker: &Worker) {
    const JOBS: usize = 60;
    let reference = "r".repeat(8 * MIB);
    let jobs: Vec<_> = (0..JOBS)
        .map(|_| {
            let (job, submission) = client.submission("workflow_1");
            client.listen(job);
            client.send(&JobSubmission {
                job_reference: Some(reference.clone()),
                ..submission
            });
            let task = worker.take_message();
            assert_eq!(Task::of(&task).job, job);
            assert_eq!(task.json()[0][1], reference);
            job
        })
        .collect();
    let kept = "SELECT count(*) FROM job WHERE length(job_reference) = 1000";
    deployment.comes_to(JOBS.try_into().unwrap(), kept);
    // As the Python service has them.
    let mut sql = deployment.sql();
    sql.batch_execute("UPDATE job SET job_reference = repeat(job_reference, 8192)")
        .unwrap();
    client.peer.widen("job_deletions", JOBS);
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    for job in &jobs {
        client.cancel(*job);
    }
    eventually("the service has them all", || {
        (client.peer.queue_length("job_deletions") == 0).then_some(())
    });
    lock.rollback().unwrap();
    for job in &jobs {
        assert_eq!(client.outcome(*job).0, ResultType::Cancelled);
    }
    deployment.no_jobs_left();
}

/// Small submissions with as many bytes of headers as a frame can have, all in hand at once. As one
/// text: many values are in `guarded_stream.rs`, for amiquip takes minutes to write them.
fn large_headers(deployment: &Deployment, confined: &Confined, client: &Client) {
    const MESSAGES: usize = 400;
    let text = AmqpValue::LongString("h".repeat(130_000));
    client.peer.widen("job_submissions", MESSAGES);
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let properties = AmqpProperties::default()
        .with_delivery_mode(2)
        .with_headers(FieldTable::from([("x".to_owned(), text)]));
    for _ in 0..MESSAGES {
        let (_, submission) = client.submission("no_such_workflow");
        let body = submission.encode_to_vec();
        let publish = Publish::with_properties(&body, "job_submissions", properties.clone());
        let exchange = Exchange::direct(&client.peer.channel);
        exchange.publish(publish).unwrap();
    }
    confined.service.logged("has been waiting for Postgres");
    lock.rollback().unwrap();
    deployment.comes_to(
        MESSAGES as i64,
        "SELECT count(*) FROM job_history WHERE workflow_type = 'no_such_workflow'",
    );
}

fn large_results(client: &Client, worker: &Worker) {
    const RESULTS: usize = 20;
    let output = format!("<e id='out-1'>{}</e>", "x".repeat(64 * MIB));
    let tasks: Vec<_> = (0..RESULTS)
        .map(|_| running_job(client, worker, None))
        .collect();
    for task in &tasks {
        worker.succeed(task, &output);
    }
    for task in &tasks {
        let result = client.result(task.job);
        assert_eq!(result.output_esdl.as_deref(), Some(output.as_str()));
    }
}

/// A result whose client is gone, and its queue too: RabbitMQ returns it, and once more when it is
/// sent to the queue itself.
fn a_result_that_comes_back(deployment: &Deployment, client: &Client, worker: &Worker) {
    let task = running_job(client, worker, None);
    for kind in ["status", "progress", "result"] {
        client
            .peer
            .delete_queue(&format!("jobs.{}.{kind}", task.job));
    }
    let output = format!("<e id='out-1'>{}</e>", "x".repeat(96 * MIB));
    worker.succeed(&task, &output);
    drop(output);
    let succeeded = "SELECT count(*) FROM job_history WHERE result_bytes > 100000000";
    deployment.comes_to(1, succeeded);
}

fn many_remarks(client: &Client, worker: &Worker) {
    let task = running_job(client, worker, None);
    let mut body = field(1, task.job.to_string().as_bytes());
    body.extend(field(2, task.id.as_bytes()));
    body.extend(field(7, &[]).repeat(8 * MIB));
    worker.peer.send("omotes_task_result_events", &body);
    let (result, logs) = client.outcome(task.job);
    assert_eq!(result, ResultType::Error);
    assert!(logs.contains("more than 100,000"), "{logs}");
}

#[test]
fn a_small_container_has_memory_enough_for_whatever_is_sent() {
    let deployment = Deployment::with_own_servers();
    deployment.limit_messages(128 * MIB);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let confined = Confined::start(&deployment);
    empty_values(&client, 114 * MIB);
    confined.is_well("114 MiB of empty values");
    long_references(&deployment, &client, &worker);
    confined.is_well("60 references of 8 MiB");
    large_headers(&deployment, &confined, &client);
    confined.is_well("400 times 126 KB of headers");
    many_remarks(&client, &worker);
    confined.is_well("16 MiB of empty remarks");
    large_results(&client, &worker);
    confined.is_well("20 results of 64 MiB");
    a_result_that_comes_back(&deployment, &client, &worker);
    confined.is_well("a result of 96 MiB that RabbitMQ returns");
    let task = running_job(&client, &worker, None);
    worker.succeed(&task, "<e id='out-2'/>");
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    deployment.no_jobs_left();
}
