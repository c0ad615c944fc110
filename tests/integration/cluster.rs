//! A cluster of RabbitMQ nodes of which one is killed, with classic queues on it.

use std::collections::HashSet;
use std::time::Instant;

use omotes_orchestrator::wire::{
    DEAD_LETTERS_QUEUE, job_result::ResultType, job_status_update::JobStatus,
};
use rstest::rstest;

use crate::harness::cluster::Cluster;
use crate::harness::deployment::{Server, Service, eventually};
use crate::harness::peers::{Client, Task, Worker, running_job};

const OUTPUT: &str = "<e id='out-1'/>";
const JOBS: usize = 20;

/// What the first node does about queues of the node that is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Of RabbitMQ that has Mnesia.
    Forgets,
    /// Of RabbitMQ that has Khepri, which has no other.
    Presumes,
}

impl Manner {
    fn about(self, cluster: &Cluster, vhost: &str, queue: &str) {
        match self {
            Manner::Forgets => {}
            Manner::Presumes => cluster.presume(vhost, queue),
        }
    }
}

fn assert_one_session(service: &Service) {
    let ended = "the session with RabbitMQ has ended";
    assert!(!service.log().contains(ended), "{ended}");
}

/// A job of which everything is on the first node.
fn one_job_goes_through(client: &Client, worker: &Worker) {
    let task = running_job(client, worker, None);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
}

#[rstest]
#[case(Manner::Forgets)]
#[case(Manner::Presumes)]
fn a_result_waits_for_the_node_of_its_clients_queue(#[case] manner: Manner) {
    let cluster = Cluster::start();
    let client = Client::new(&cluster.one);
    let worker = Worker::new(&cluster.one, "workflow_1");
    let elsewhere = Client::new(&cluster.other);
    let service = cluster.one.start_single_file();
    let [on_its_way, later] = [(); 2].map(|()| running_job(&elsewhere, &worker, None));
    cluster.kill_other_meanwhile(1, || worker.succeed(&on_its_way, OUTPUT));
    service.logged("queues of clients: jobs.");
    for task in [&on_its_way, &later] {
        let queue = format!("jobs.{}.result", task.job);
        manner.about(&cluster, &cluster.one.sdk_vhost(), &queue);
    }
    worker.succeed(&later, OUTPUT);
    one_job_goes_through(&client, &worker);
    cluster.one.comes_to(2, "SELECT count(*) FROM job");

    cluster.start_other();
    for task in [&on_its_way, &later] {
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    }
    cluster.one.no_jobs_left();
    service.wait_until_ready();
    assert_one_session(&service);
    assert!(service.stop().success());
}

#[rstest]
#[case(Manner::Forgets)]
#[case(Manner::Presumes)]
fn a_task_waits_for_the_node_of_its_queue(#[case] manner: Manner) {
    let cluster = Cluster::start();
    let client = Client::new(&cluster.one);
    let worker = Worker::new(&cluster.one, "workflow_1");
    let elsewhere = Worker::new(&cluster.other, "workflow_2");
    let service = cluster.one.start_single_file();
    let first = client.submit("workflow_2");
    assert_eq!(elsewhere.take().job, first);
    let (on_its_way, submission) = client.submission("workflow_2");
    client.listen(on_its_way);
    cluster.kill_other_meanwhile(1, || client.send(&submission));
    service.logged("the task queue \"workflow_2\": it is not available: ");
    manner.about(&cluster, &cluster.one.celery_vhost(), "workflow_2");
    let later = client.submit("workflow_2");
    one_job_goes_through(&client, &worker);

    cluster.start_other();
    let elsewhere = Worker::new(&cluster.one, "workflow_2");
    let mut expected = [on_its_way, later];
    // What was on its way may have arrived as well; its copy is revoked when it is started.
    eventually("a task of each", || {
        let job = Task::of(&elsewhere.peer.poll("workflow_2")?).job;
        expected
            .iter_mut()
            .filter(|one| **one == job)
            .for_each(|one| *one = first);
        (expected == [first; 2]).then_some(())
    });
    for job in [on_its_way, later] {
        assert_eq!(client.status(job), JobStatus::Enqueued);
        client.cancel(job);
        assert_eq!(client.outcome(job).0, ResultType::Cancelled);
    }
    service.wait_until_ready();
    assert_one_session(&service);
}

#[rstest]
#[case(Manner::Forgets)]
#[case(Manner::Presumes)]
fn dead_letters_whose_node_is_down_hold_up_nobody(#[case] manner: Manner) {
    let cluster = Cluster::start();
    let client = Client::new(&cluster.one);
    let worker = Worker::new(&cluster.one, "workflow_1");
    Client::new(&cluster.other).peer.declare(DEAD_LETTERS_QUEUE);
    let service = cluster.one.start_single_file();
    client.peer.send("job_submissions", b"\xfftaken");
    assert_eq!(client.peer.next(DEAD_LETTERS_QUEUE).body, b"\xfftaken");
    cluster.kill_other_meanwhile(1, || client.peer.send("job_submissions", b"\xfffirst"));
    let line = "omotes_dead_letters of the SDK vhost: it is not available: ";
    service.logged(line);
    manner.about(&cluster, &cluster.one.sdk_vhost(), DEAD_LETTERS_QUEUE);
    one_job_goes_through(&client, &worker);
    // It starts without them too.
    assert!(service.stop().success());
    let service = cluster.one.launch(&[("HANDLER_THREADS", "1")]);
    service.logged("omotes_dead_letters cannot be declared: it is not available: ");
    client.peer.send("job_submissions", b"\xffthen");
    service.logged(line);
    one_job_goes_through(&client, &worker);

    cluster.start_other();
    let mut letters = vec![b"\xfffirst".to_vec(), b"\xffthen".to_vec()];
    // What was on its way may have arrived as well.
    eventually("both letters", || {
        let letter = client.peer.poll(DEAD_LETTERS_QUEUE)?;
        letters.retain(|body| *body != letter.body);
        letters.is_empty().then_some(())
    });
    service.wait_until_ready();
    assert_one_session(&service);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Dies,
    Hangs,
}

/// The nodes of a cluster as a service is told them.
fn told(nodes: &[(String, String)]) -> Vec<(&str, &str)> {
    let nodes = nodes.iter();
    nodes
        .map(|(name, hosts)| (name.as_str(), hosts.as_str()))
        .collect()
}

/// Services, until one of them has its session with the other node: each has chosen at random.
fn start_on_other(cluster: &Cluster) -> Service {
    let variables = cluster.all_nodes();
    let vhost = cluster.one.sdk_vhost();
    loop {
        let service = cluster.one.start_with(&told(&variables));
        if cluster.is_consumed_on(&cluster.other, &vhost, "job_submissions") {
            return service;
        }
        assert!(service.stop().success());
    }
}

#[rstest]
#[case(Loss::Dies)]
#[case(Loss::Hangs)]
fn a_service_moves_to_another_node_of_the_cluster(#[case] loss: Loss) {
    // With Mnesia nothing can be declared before a node that hangs is taken for gone.
    let cluster = Cluster::start_impatient();
    let client = Client::new(&cluster.one);
    let worker = Worker::new(&cluster.one, "workflow_1");
    let service = start_on_other(&cluster);
    let running = running_job(&client, &worker, None);
    match loss {
        Loss::Dies => cluster.other.kill_server(Server::RabbitMq),
        Loss::Hangs => cluster.other.signal_rabbitmq("-STOP"),
    }
    let lost = Instant::now();
    service.logged("the session with RabbitMQ ends");
    let ended = lost.elapsed();
    service.logged("the session with RabbitMQ has ended");
    service.wait_until_ready();
    let ready = lost.elapsed();
    eprintln!("{loss:?}: ended after {ended:?}, ready after {ready:?}");
    // Far more than it takes, and less than it took where nobody noticed.
    assert!(ended.as_secs() < 15, "{ended:?}");
    if loss == Loss::Hangs {
        cluster.other.kill_server(Server::RabbitMq);
    }
    worker.succeed(&running, OUTPUT);
    assert_eq!(client.outcome(running.job).0, ResultType::Succeeded);
    one_job_goes_through(&client, &worker);
}

/// The lines of the example's configuration that this version of RabbitMQ knows, without those about how
/// the nodes find each other.
fn example_configuration() -> String {
    let lines = include_str!("../../examples/deployment/cluster/rabbitmq.conf").lines();
    let since_3_10 = |line: &&str| {
        !line.starts_with("cluster_formation.")
            && !line.starts_with("quorum_queue.")
            && !line.starts_with("default_queue_type")
    };
    lines.filter(since_3_10).collect::<Vec<_>>().join("\n")
}

/// What `doctor` says, with the rabbitmqctl of the first node.
fn doctor(cluster: &Cluster, variables: &[(&str, &str)]) -> String {
    let tool = format!(
        "{}/run.sh private ctl {}",
        env!("CARGO_MANIFEST_DIR"),
        cluster.one.folder_of(Server::RabbitMq).display()
    );
    let mut command = cluster.one.command(&["doctor", "--rabbitmqctl", &tool]);
    command.env("PATH", std::env::var("PATH").unwrap());
    let output = command.envs(variables.iter().copied()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// Loads the example's definitions into a cluster.
fn import_example(cluster: &Cluster) {
    // Where RabbitMQ's own user may read it.
    let file = cluster.one.folder_of(Server::RabbitMq).join("import.json");
    std::fs::copy(EXAMPLE, &file).unwrap();
    cluster
        .one
        .rabbitmqctl(&["import_definitions", file.to_str().unwrap()]);
}

const EXAMPLE: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/examples/deployment/cluster/definitions.json"
);

#[test]
fn the_example_of_a_cluster_lives_through_the_loss_of_each_node() {
    let cluster = Cluster::of_three(&example_configuration());
    import_example(&cluster);
    let list = [
        "list_queues",
        "-q",
        "--no-table-headers",
        "-p",
        "omotes",
        "name",
        "type",
        "policy",
    ];
    let queues = cluster.one.rabbitmqctl(&list);
    for line in [
        "job_submissions\tquorum\tomotes-core",
        "job_deletions\tquorum\tomotes-core",
        "omotes_dead_letters\tquorum\tomotes-dead-letters",
    ] {
        assert!(queues.contains(line), "{queues}");
    }
    let variables = cluster.all_nodes();
    let variables = told(&variables);
    let _replicas = [
        cluster.one.start_with(&variables),
        cluster.one.start_with(&variables),
    ];
    let said = doctor(&cluster, &variables);
    // This version of RabbitMQ has no relaxed checks.
    assert!(
        said.contains("job_submissions is a quorum queue, which clients"),
        "{said}"
    );
    assert!(!said.contains("RabbitMQ drops"), "{said}");
    assert!(!said.contains("does not answer"), "{said}");
    cluster
        .one
        .rabbitmqctl(&["clear_policy", "-p", "omotes", "omotes-core"]);
    let limit = [
        "set_policy",
        "-p",
        "omotes",
        "omotes-core",
        "^job_",
        "{\"delivery-limit\":20}",
    ];
    cluster.one.rabbitmqctl(&limit);
    let said = doctor(&cluster, &variables);
    assert!(
        said.contains("job_submissions: RabbitMQ drops a message that it has delivered 20 times"),
        "{said}"
    );
    import_example(&cluster);
    let third = cluster.third.as_ref().unwrap();
    // Its queues are on a node that stays, for they are classic.
    for (lost, stays) in [
        (&cluster.other, &cluster.one),
        (third, &cluster.other),
        (&cluster.one, third),
    ] {
        let client = Client::of_existing(stays);
        let worker = Worker::of_existing(stays, "workflow_1");
        let before: Vec<_> = (0..JOBS).map(|_| client.submit("workflow_1")).collect();
        lost.kill_server(Server::RabbitMq);
        let said = doctor(&cluster, &variables);
        let silent = format!(
            "127.0.0.1:{}, one of 3 nodes, does not answer",
            lost.rabbitmq_port()
        );
        assert!(said.contains(&silent), "{said}");
        let after: Vec<_> = (0..JOBS).map(|_| client.submit("workflow_1")).collect();
        let mut left: HashSet<_> = before.into_iter().chain(after).collect();
        // Of some jobs there may be a task more, which is revoked.
        eventually("all of them succeed", || {
            if let Some(message) = worker.peer.poll("workflow_1") {
                let task = Task::of(&message);
                worker.start(&task);
                worker.succeed(&task, OUTPUT);
            }
            left.retain(|job| {
                let waits = client.peer.queue_length(&format!("jobs.{job}.result")) == 0;
                assert!(waits || client.outcome(*job).0 == ResultType::Succeeded);
                waits
            });
            left.is_empty().then_some(())
        });
        worker.peer.delete_queue("workflow_1");
        lost.start_server(Server::RabbitMq);
        cluster.all_run();
    }
}

/// RabbitMQ that has Mnesia stops such a node, which ends its connections; one that has Khepri keeps them,
/// and tells the node's consumers nothing.
#[test]
fn an_idle_service_leaves_a_node_that_is_cut_off() {
    let cluster = Cluster::of_three(&example_configuration());
    import_example(&cluster);
    let service = start_on_other(&cluster);
    let client = Client::of_existing(&cluster.one);
    let worker = Worker::of_existing(&cluster.one, "workflow_1");
    cluster.cut_off_other();
    let lost = Instant::now();
    let job = client.submit("workflow_1");
    service.logged("the session with RabbitMQ ends");
    let ended = lost.elapsed();
    let task = worker.take();
    assert_eq!(task.job, job);
    eprintln!(
        "ended after {ended:?}, the task is there after {:?}",
        lost.elapsed()
    );
    // Far more than it takes, and less than a question that nobody watches.
    assert!(ended.as_secs() < 15, "{ended:?}");
    worker.start(&task);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    service.wait_until_ready();
}

/// Nobody can bind anything while the leader hangs, or with Mnesia any node; whoever is on another node has
/// nothing to gain by a new session.
#[test]
fn a_node_that_hangs_ends_no_session_on_the_others() {
    let cluster = Cluster::of_three("");
    let client = Client::new(&cluster.one);
    let worker = Worker::new(&cluster.one, "workflow_1");
    let third = cluster.third.as_ref().unwrap();
    let hosts = format!(
        "127.0.0.1:{},127.0.0.1:{}",
        cluster.one.rabbitmq_port(),
        third.rabbitmq_port()
    );
    let variables = cluster
        .all_nodes()
        .into_iter()
        .map(|(name, _)| (name, hosts.clone()));
    let service = cluster
        .one
        .start_with(&told(&variables.collect::<Vec<_>>()));
    cluster.let_other_lead();
    one_job_goes_through(&client, &worker);
    cluster.other.signal_rabbitmq("-STOP");
    service.logged(
        "says nothing of what needs the majority of its cluster, and nor does another node",
    );
    cluster.other.kill_server(Server::RabbitMq);
    one_job_goes_through(&client, &worker);
    assert_one_session(&service);
    assert!(service.stop().success());
}
