//! What is acknowledged when, with messages of two queues on one channel.

use omotes_orchestrator::wire::task_result::ResultType;

use crate::harness::deployment::{Deployment, Service};
use crate::harness::peers::{Client, Task, Worker};
use crate::harness::proxy::{End, Proxy};

const OUTPUT: &str = "<e id='out-1'/>";
const ENDED: &str = "SELECT count(*) FROM job_history WHERE outcome = 'SUCCEEDED'";

fn check_acknowledgements(service: &Service) {
    let log = service.log();
    for refusal in ["unknown delivery tag", "PRECONDITION_FAILED"] {
        assert!(!log.contains(refusal), "{refusal}");
    }
}

/// The thread that takes progress and results falls behind what RabbitMQ delivers, while
/// connections are lost and the service is stopped in the middle of it.
#[test]
fn no_result_is_acknowledged_before_it_is_taken() {
    const JOBS: i64 = 2000;
    const ROUND: usize = 500;
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    for _ in 0..JOBS {
        let (_, submission) = client.submission("workflow_1");
        client.send(&submission);
    }
    let tasks: Vec<Task> = (0..JOBS).map(|_| worker.take()).collect();
    assert!(service.stop().success());

    let proxy = Proxy::new(deployment.rabbitmq_port()).unwrap();
    let port = proxy.port().to_string();
    let slow = [
        ("OMOTES_FAULT_POINT", "consumer"),
        ("OMOTES_FAULT_MILLISECONDS", "20"),
        ("TASK_RABBITMQ_PORT", &port),
        ("LOG_LEVEL", "INFO"),
    ];
    for (round, tasks) in tasks.chunks(ROUND).enumerate() {
        let mut service = deployment.start_with(&slow);
        let before = deployment.count(ENDED);
        // While it runs, for what waits already is delivered queue by queue.
        for task in tasks {
            worker.progress(task, 0.5);
            let result = worker.result(task, ResultType::Succeeded, OUTPUT);
            worker.peer.send("omotes_task_result_events", &result);
        }
        deployment.at_least(before + 30, ENDED);
        if round % 2 == 1 {
            proxy.cut(End::Rst);
            service.logged("the session with RabbitMQ has ended, a new one follows");
        }
        service.signal("-TERM");
        assert!(service.wait().success());
        check_acknowledgements(&service);
    }
    assert!(
        deployment.count("SELECT count(*) FROM job") > 0,
        "the stops came too late to show anything"
    );
    let service = deployment.start();
    deployment.comes_to(JOBS, ENDED);
    deployment.no_jobs_left();
    check_acknowledgements(&service);
}
