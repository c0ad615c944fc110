//! What becomes of the databases in InfluxDB. All tests share one InfluxDB, so each looks at its
//! own databases only, and none shortens the retention, which is two days.

use std::io::Read;
use std::net::TcpListener;

use base64::prelude::{BASE64_STANDARD, Engine};
use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use rstest::rstest;
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Service, eventually, setting};
use crate::harness::peers::{Client, Worker};

fn query(query: &str) -> String {
    let credentials = format!(
        "{}:{}",
        setting("INFLUXDB_USER"),
        setting("INFLUXDB_PASSWORD")
    );
    let url = format!("http://127.0.0.1:{}/query", setting("INFLUXDB_PORT"));
    let mut response = ureq::post(url)
        .header(
            "Authorization",
            format!("Basic {}", BASE64_STANDARD.encode(credentials)),
        )
        .send_form([("q", query)])
        .unwrap();
    response.body_mut().read_to_string().unwrap()
}

/// A database that is dropped at the end of the test, if it still is there.
struct Database(String);

impl Database {
    fn new(name: &str) -> Database {
        query(&format!("CREATE DATABASE \"{name}\""));
        Database(name.to_owned())
    }

    fn of_an_esdl() -> Database {
        Database::new(&Uuid::new_v4().to_string())
    }

    fn exists(&self) -> bool {
        query("SHOW DATABASES").contains(&format!("\"{}\"", self.0))
    }

    fn output(&self) -> String {
        format!("<e id='{}'/>", self.0)
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        query(&format!("DROP DATABASE \"{}\"", self.0));
    }
}

fn start(deployment: &Deployment, variables: &[(&str, &str)]) -> Service {
    let often = [("TIME_SERIES_SCAN_SEC", "1")];
    deployment.start_with(&[&often, variables].concat())
}

/// Whether there is a row for the database that says so.
fn row(deployment: &Deployment, database: &Database, condition: &str) -> Option<()> {
    let sql =
        format!("SELECT count(*) FROM esdl_time_series_info WHERE esdl_id = $1 AND {condition}");
    let rows: i64 = deployment
        .sql()
        .query_one(&sql, &[&database.0])
        .unwrap()
        .get(0);
    (rows == 1).then_some(())
}

/// Makes the time of its deletion lie back further than the retention.
fn age(deployment: &Deployment, database: &Database) {
    let sql =
        "UPDATE esdl_time_series_info SET deactivated_at = deactivated_at - interval '49 hours'
               WHERE esdl_id = $1 AND deactivated_at IS NOT NULL";
    assert_eq!(deployment.sql().execute(sql, &[&database.0]).unwrap(), 1);
}

/// A database whose deletion is due, which the next scan drops.
fn due(deployment: &Deployment) -> Database {
    let database = Database::of_an_esdl();
    let sql = "INSERT INTO esdl_time_series_info (row_id, esdl_id, deactivated_at, job_id)
               VALUES (gen_random_uuid(), $1, now() - interval '49 hours', gen_random_uuid())
               ON CONFLICT (esdl_id) DO UPDATE
               SET deactivated_at = excluded.deactivated_at, job_id = excluded.job_id";
    deployment.sql().execute(sql, &[&database.0]).unwrap();
    database
}

/// Waits until a scan that has begun after this call has ended.
fn scanned(deployment: &Deployment) {
    for _ in 0..2 {
        let mark = due(deployment);
        eventually("a scan", || (!mark.exists()).then_some(()));
    }
}

/// A job has claimed them, and a scan leaves them.
fn are_kept(deployment: &Deployment, series: &Database) {
    eventually("they are claimed", || {
        row(
            deployment,
            series,
            "deactivated_at IS NULL AND job_id IS NOT NULL",
        )
    });
    scanned(deployment);
    assert!(series.exists());
}

#[test]
fn the_series_of_a_job_live_as_long_as_somebody_needs_them() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = start(&deployment, &[]);
    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.start(&task);
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(client.status(job), JobStatus::Running);

    // The worker has written them, and a scan sees them before the job is done.
    let series = Database::of_an_esdl();
    eventually("they are marked", || {
        row(
            &deployment,
            &series,
            "deactivated_at IS NOT NULL AND job_id IS NULL",
        )
    });
    // However long ago that was: a job that was running then may claim them. It runs before they are
    // so old, for a scan may come in between.
    let sql = "UPDATE job SET running_at = running_at - interval '50 hours'";
    deployment.sql().batch_execute(sql).unwrap();
    age(&deployment, &series);
    scanned(&deployment);
    assert!(series.exists());

    worker.succeed(&task, &series.output());
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    are_kept(&deployment, &series);

    // Its client deletes the job; they are dropped when the retention has passed.
    client.cancel(job);
    eventually("they are retired", || {
        row(&deployment, &series, "deactivated_at IS NOT NULL")
    });
    scanned(&deployment);
    assert!(series.exists());
    age(&deployment, &series);
    eventually("they are dropped", || (!series.exists()).then_some(()));
    eventually("nothing is left of them", || {
        row(&deployment, &series, "true").is_none().then_some(())
    });
}

/// Each is an ESDL that tools write, or may write, with `ID` as its energy system's id.
#[rstest]
#[case::beside_something_else(
    "<?xml version='1.0' encoding='UTF-8'?>\n<xmi:XMI xmi:version='2.0' xmlns:xmi='http://www.omg.org/XMI' \
     xmlns:esdl='http://www.tno.nl/esdl'>\n  <esdl:EnergySystem xmi:id='_1' id='ID' name='n'/>\n</xmi:XMI>",
    "ID"
)]
#[case::with_a_character_reference("<esdl:EnergySystem id='&#x49;&#68;'/>", "&#x49;&#68;")]
#[case::with_an_entity(
    "<!DOCTYPE e [<!ENTITY system 'ID'>]><esdl:EnergySystem id='&system;'/>",
    "ID"
)]
fn the_series_of_a_successful_job_are_kept_wherever_its_id_stands(
    #[case] esdl: &str,
    #[case] place: &str,
) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = start(&deployment, &[]);
    let job = client.submit("workflow_1");
    let task = worker.take();
    worker.start(&task);
    let series = Database::of_an_esdl();
    let id = match place.starts_with('&') {
        // As some serializers write whatever is not a letter.
        true => series.0.replace('-', "&#45;"),
        false => series.0.clone(),
    };
    worker.succeed(&task, &esdl.replace(place, &id));
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    are_kept(&deployment, &series);
}

#[test]
fn the_series_of_a_cancelled_job_go_also_when_its_result_still_comes() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = start(&deployment, &[]);
    let job = client.submit("workflow_1");
    let task = worker.take();
    client.cancel(job);
    assert_eq!(client.outcome(job).0, ResultType::Cancelled);
    let series = Database::of_an_esdl();
    worker.succeed(&task, &series.output());
    eventually("they are retired", || {
        row(&deployment, &series, "deactivated_at IS NOT NULL")
    });
    age(&deployment, &series);
    eventually("they are dropped", || (!series.exists()).then_some(()));
}

#[test]
fn what_is_not_a_jobs_is_left_alone() {
    let deployment = Deployment::new();
    let protected = Database::of_an_esdl();
    let configured = Database::of_an_esdl();
    let foreign = Database::new(&format!("not-a-uuid-{}", Uuid::new_v4()));
    let service = start(
        &deployment,
        &[
            ("INFLUXDB_DATABASE", configured.0.as_str()),
            ("TIME_SERIES_PROTECTED_DATABASES", protected.0.as_str()),
        ],
    );
    service.logged("are not OMOTES's and are left alone");
    // As the Python service may have marked them.
    for database in [&protected, &configured] {
        assert!(row(&deployment, database, "true").is_none());
        let sql = "INSERT INTO esdl_time_series_info (row_id, esdl_id, deactivated_at)
                   VALUES (gen_random_uuid(), $1, now() - interval '49 hours')";
        deployment.sql().execute(sql, &[&database.0]).unwrap();
    }
    // Series that workers keep elsewhere: in use, and deleted.
    let sql = "INSERT INTO esdl_time_series_info (row_id, esdl_id, deactivated_at)
               VALUES (gen_random_uuid(), 'elsewhere', NULL),
                      (gen_random_uuid(), 'elsewhere, deleted', now() - interval '49 hours')";
    deployment.sql().batch_execute(sql).unwrap();
    scanned(&deployment);
    for database in [&protected, &configured, &foreign] {
        assert!(database.exists());
    }
    assert!(row(&deployment, &foreign, "true").is_none());
    let sql = "SELECT count(*) FROM esdl_time_series_info WHERE esdl_id LIKE 'elsewhere%'";
    assert_eq!(deployment.count(sql), 1);
}

#[test]
fn a_dry_run_only_says_what_it_would_do() {
    let deployment = Deployment::new();
    let unknown = Database::of_an_esdl();
    let service = start(&deployment, &[("TIME_SERIES_DRY_RUN", "true")]);
    service.logged(&format!(
        "time series {}: no job has claimed them yet, dry run",
        unknown.0
    ));
    let retired = due(&deployment);
    service.logged(&format!(
        "time series {}: nobody needs them, dry run, would be dropped",
        retired.0
    ));
    assert!(retired.exists());
    assert!(row(&deployment, &unknown, "true").is_none());
}

#[test]
fn an_influxdb_that_refuses_is_said_so_once_and_jobs_go_on() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = start(&deployment, &[("INFLUXDB_PASSWORD", "wrong")]);
    service.logged("time series are not looked after for now");
    service.logged("DEBUG time-series time series: InfluxDB at");
    let log = service.log();
    assert_eq!(
        log.matches("time series are not looked after for now")
            .count(),
        1
    );
    assert!(log.contains("authorization failed"), "{log}");
    let job = client.submit("workflow_1");
    worker.succeed(&worker.take(), "<e id='out'/>");
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
    service.wait_until_ready();
}

#[test]
fn an_influxdb_that_hangs_holds_up_no_job_and_no_stop() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let service = start(&deployment, &[("INFLUXDB_PORT", &port)]);
    // It has taken the question, and does not answer.
    let asked = || {
        let (mut connection, _) = listener.accept().unwrap();
        connection.read_exact(&mut [0; 4]).unwrap();
        connection
    };
    for _ in 0..2 {
        let hanging = asked();
        let job = client.submit("workflow_1");
        worker.succeed(&worker.take(), "<e id='out'/>");
        assert_eq!(client.outcome(job).0, ResultType::Succeeded);
        service.wait_until_ready();
        drop(hanging);
    }
    let _hanging = asked();
    let warning = "time series are not looked after for now";
    assert_eq!(service.log().matches(warning).count(), 1);
    assert!(service.stop().success());
}

#[test]
fn the_commands_list_keep_and_drop() {
    let deployment = Deployment::new();
    assert!(
        deployment
            .command(&["db", "upgrade"])
            .status()
            .unwrap()
            .success()
    );
    let run = |arguments: &[&str]| {
        let output = deployment
            .command(&[&["time-series"], arguments].concat())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    let series = due(&deployment);
    let (_, list) = run(&["list"]);
    assert!(
        list.contains(&format!("{}: not needed since ", series.0)),
        "{list}"
    );
    assert!(list.contains("in InfluxDB"), "{list}");
    assert!(run(&["keep", &series.0]).0);
    let (_, list) = run(&["list"]);
    assert!(list.contains(&format!("{}: in use", series.0)), "{list}");
    let (done, said) = run(&["drop", &series.0]);
    assert!(!done && series.exists(), "{said}");
    assert!(said.contains(&format!("{}: in use", series.0)), "{said}");
    assert!(said.contains("nothing was done: --yes does it"), "{said}");
    assert!(run(&["drop", &series.0, "--yes"]).0);
    assert!(!series.exists());
    let nothing = "nothing is known of any time series\n";
    assert_eq!(run(&["list"]), (true, nothing.to_owned()));
    assert_eq!(
        run(&["keep", "nobody"]),
        (
            false,
            "omotes-orchestrator: nothing is known of time series nobody\n".to_owned()
        )
    );
    let (done, said) = run(&["drop", "_internal"]);
    assert!(!done && said.contains("is protected"), "{said}");
}

#[test]
fn there_need_be_no_influxdb() {
    let deployment = Deployment::new();
    let service = start(&deployment, &[("INFLUXDB_HOST", "")]);
    // By the time that it is ready all of its threads are there.
    let threads = service.threads();
    assert!(threads.contains(&"maintenance".to_owned()), "{threads:?}");
    assert!(!threads.contains(&"time-series".to_owned()), "{threads:?}");
    let output = deployment
        .command(&["time-series", "list"])
        .env("INFLUXDB_HOST", "")
        .output()
        .unwrap();
    assert!(!output.status.success());
}
