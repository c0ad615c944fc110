//! How the service stops.

use rstest::rstest;

use crate::deployment::Deployment;
use crate::peers::{Client, Worker};

#[rstest]
#[case("-TERM")]
#[case("-INT")]
#[case("-QUIT")]
fn a_signal_stops_it_in_good_order(#[case] signal: &str) {
    let deployment = Deployment::new();
    let mut service = deployment.start();
    service.signal(signal);
    assert_eq!(service.wait().code(), Some(0));
    service.logged("main stopped");
}

#[test]
fn it_stops_while_it_waits_for_the_services_it_needs() {
    let deployment = Deployment::new();
    for variable in [("POSTGRESQL_PORT", "1"), ("SDK_RABBITMQ_PORT", "1")] {
        let mut service = deployment.launch(&[variable]);
        match variable.0 {
            "POSTGRESQL_PORT" => service.logged("waiting for Postgres"),
            _ => service.logged("still no session with RabbitMQ"),
        };
        service.signal("-TERM");
        assert_eq!(service.wait().code(), Some(0));
    }
}

#[test]
fn it_stops_while_postgres_is_held_up() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let mut service = deployment.start();
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    let job = client.submit("workflow_1");
    crate::deployment::eventually("somebody waits for the lock", || {
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted
                       AND relation = 'job'::regclass";
        (lock.query_one(waiting, &[]).unwrap().get::<_, i64>(0) > 0).then_some(())
    });
    service.signal("-TERM");
    assert_eq!(service.wait().code(), Some(0));
    lock.rollback().unwrap();
    // Nothing is lost by it.
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start();
    assert_eq!(worker.take().job, job);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let mut service = deployment.start();
    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    client.submit("workflow_1");
    crate::deployment::eventually("somebody waits for the lock", || {
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted
                       AND relation = 'job'::regclass";
        (lock.query_one(waiting, &[]).unwrap().get::<_, i64>(0) > 0).then_some(())
    });
    service.signal("-TERM");
    service.logged("stopping on signal");
    service.signal("-INT");
    assert_eq!(service.wait().code(), Some(130));
}
