//! A cluster of RabbitMQ nodes of which one is killed, with classic queues on it.

use std::time::Instant;

use omotes_orchestrator::wire::{
    DEAD_LETTERS_QUEUE, job_result::ResultType, job_status_update::JobStatus,
};
use rstest::rstest;

use crate::harness::cluster::Cluster;
use crate::harness::deployment::{Service, eventually};
use crate::harness::peers::{Client, Task, Worker, running_job};

const OUTPUT: &str = "<e id='out-1'/>";

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

#[test]
fn a_service_moves_to_another_node_of_the_cluster() {
    let cluster = Cluster::start();
    let client = Client::new(&cluster.one);
    let worker = Worker::new(&cluster.one, "workflow_1");
    let ports = [&cluster.other, &cluster.one].map(|node| node.rabbitmq_port());
    let hosts = format!("127.0.0.1:{},127.0.0.1:{}", ports[0], ports[1]);
    let variables =
        ["SDK", "TASK", "CELERY"].map(|vhost| (format!("{vhost}_RABBITMQ_HOSTNAME"), &*hosts));
    let variables = variables
        .each_ref()
        .map(|(name, hosts)| (name.as_str(), *hosts));
    let mut service = cluster.one.start_with(&variables);
    // It has chosen at random, for each of its connections.
    while cluster.connections_of_other() == 0 {
        assert!(service.stop().success());
        service = cluster.one.start_with(&variables);
    }
    let running = running_job(&client, &worker, None);
    cluster.kill_other();
    let killed = Instant::now();
    service.logged("the session with RabbitMQ has ended");
    service.wait_until_ready();
    eprintln!("ready {:?} after the end of the node", killed.elapsed());
    worker.succeed(&running, OUTPUT);
    assert_eq!(client.outcome(running.job).0, ResultType::Succeeded);
    one_job_goes_through(&client, &worker);
}
