//! `doctor`: each fault is planted in real servers, and found.

use std::fs;
use std::net::TcpListener;

use amiquip::{ExchangeDeclareOptions, ExchangeType, QueueDeclareOptions};
use rstest::rstest;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::harness::deployment::{Deployment, Server, eventually, rabbitmq_version, setting};
use crate::harness::peers::{Client, Peer, Worker};
use crate::harness::planted::{RUNNING, plant_workers};

/// All that is not as it should be: severity, part, and what was found.
fn findings(
    deployment: &Deployment,
    arguments: &[&str],
    variables: &[(&str, &str)],
) -> Vec<String> {
    let arguments = [&["doctor", "--json"], arguments].concat();
    let mut command = deployment.command(&arguments);
    let output = command.envs(variables.iter().copied()).output().unwrap();
    let all: Vec<Value> = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let is_faulty =
        |finding: &&Value| finding["severity"] == "warning" || finding["severity"] == "error";
    let faulty = all.iter().filter(is_faulty).count();
    assert_eq!(output.status.code(), Some(i32::from(faulty > 0)));
    // In most of these tests none runs.
    let findings = all
        .iter()
        .filter(|finding| finding["part"] != "Orchestrator");
    let faulty: Vec<_> = findings.filter(is_faulty).collect();
    faulty
        .iter()
        .map(|finding| {
            let text = |field: &str| finding[field].as_str().unwrap().to_owned();
            assert!(!text("remedy").is_empty(), "{finding}");
            format!("{} {}: {}", text("severity"), text("part"), text("found"))
        })
        .collect()
}

/// That there is one finding that begins and goes on like this, and no other.
fn one(findings: &[String], beginning: &str, more: &str) {
    assert_eq!(findings.len(), 1, "{findings:#?}");
    let fits = findings[0].starts_with(beginning) && findings[0].contains(more);
    assert!(fits, "{findings:#?}");
}

#[test]
fn what_is_in_order_is_said_to_be() {
    let deployment = Deployment::new();
    // Before anything is there, and with everything.
    assert_eq!(findings(&deployment, &[], &[]), Vec::<String>::new());
    let service = deployment.start();
    assert_eq!(findings(&deployment, &[], &[]), Vec::<String>::new());
    assert!(service.stop().success());
    let output = deployment.command(&["doctor"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains('\u{1b}'), "{text:?}");
    assert!(text.contains("the tables are at revision"), "{text}");
    assert!(text.contains(" KiB in this database: "), "{text}");
    assert!(
        text.ends_with("\n\n1 warning: Orchestrator: no orchestrator runs\n"),
        "{text}"
    );
}

#[rstest]
#[case::no_host(&[("SDK_RABBITMQ_HOSTNAME", "nowhere.invalid")], "error SDK RabbitMQ", "nowhere.invalid")]
#[case::wrong_password(&[("TASK_RABBITMQ_PASSWORD", "wrong")], "error TASK RabbitMQ", "invalid credentials")]
#[case::no_vhost(&[("CELERY_RABBITMQ_VIRTUALHOST", "nowhere")], "error CELERY RabbitMQ", "nowhere")]
#[case::no_database(&[("POSTGRESQL_DATABASE", "nowhere")], "error Postgres", "nowhere")]
#[case::wrong_user(&[("POSTGRESQL_USERNAME", "nobody")], "error Postgres", "nobody")]
#[case::wrong_influxdb_password(&[("INFLUXDB_PASSWORD", "wrong")], "warning InfluxDB", "authorization failed")]
#[case::no_definitions(&[("WORKFLOW_CONFIG_PATH", "/nowhere.json")], "error Workflows", "/nowhere.json")]
fn a_wrong_variable_is_told(
    #[case] variables: &[(&str, &str)],
    #[case] beginning: &str,
    #[case] more: &str,
) {
    // PgBouncer does not say who it is that it does not know.
    let deployment = Deployment::new().without_pooler();
    one(&findings(&deployment, &[], variables), beginning, more);
}

#[test]
fn a_vhost_in_which_no_task_queue_can_be_declared_is_told_before_a_job_fails() {
    let deployment = Deployment::new();
    deployment.make_celery_vhost_anew(&json!({"defaultqueuetype": "quorum"}));
    let found = findings(&deployment, &[], &[]);
    one(&found, "error CELERY RabbitMQ", "x-max-priority");
}

#[test]
fn a_port_where_nobody_listens_is_told() {
    let deployment = Deployment::new();
    let port = {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port().to_string()
    };
    for (variable, beginning) in [
        ("CELERY_RABBITMQ_PORT", "error CELERY RabbitMQ"),
        ("POSTGRESQL_PORT", "error Postgres"),
        ("INFLUXDB_PORT", "warning InfluxDB"),
    ] {
        let found = findings(&deployment, &[], &[(variable, &port)]);
        one(&found, beginning, "onnection refused");
    }
}

#[test]
fn a_faulty_definition_file_is_told() {
    let deployment = Deployment::new();
    let file = deployment.folder.join("workflows.json");
    fs::write(&file, r#"[{"workflow_type_name": 5}]"#).unwrap();
    let path = file.display().to_string();
    let found = findings(&deployment, &[], &[("WORKFLOW_CONFIG_PATH", &path)]);
    one(&found, "error Workflows: ", "workflow_type_name");
}

#[test]
fn what_is_wrong_in_the_database_is_told() {
    // A pooler's sessions do not hear of what the database is set to meanwhile.
    let deployment = Deployment::new().without_pooler();
    assert!(deployment.start().stop().success());
    let mut sql = deployment.sql();
    let found = || findings(&deployment, &[], &[]);

    sql.batch_execute(
        "INSERT INTO job (job_id, workflow_type, status, registered_at)
         VALUES (gen_random_uuid(), 'renamed', 'REGISTERED', now())",
    )
    .unwrap();
    let two = found();
    assert_eq!(two.len(), 2, "{two:#?}");
    let undefined = "warning Workflows: there are jobs of renamed";
    assert!(two[0].starts_with(undefined), "{two:#?}");
    let lonely = "error CELERY RabbitMQ: 1 job waits for renamed";
    assert!(two[1].starts_with(lonely), "{two:#?}");
    // For somebody at a terminal what is wrong is at the top, and at the end.
    let said = text(&deployment, &[], &[]);
    let severity = |line: &str| line.split_whitespace().next().map(str::to_owned);
    let whole = said.lines().filter(|line| !line.starts_with(' '));
    let order: Vec<_> = whole.filter_map(severity).collect();
    assert_eq!(order[..3], ["error", "error", "warning"], "{said}");
    assert!(
        order[3..]
            .iter()
            .all(|one| one != "error" && one != "warning"),
        "{said}"
    );
    let last = "2 errors, 1 warning; the first: CELERY RabbitMQ: 1 job waits for renamed, which has no worker";
    assert!(said.contains(&format!("\n\n{last}\n")), "{said}");
    sql.batch_execute("DELETE FROM job").unwrap();

    // An hour ahead, as far as anybody who asks can tell.
    let name = deployment.database();
    sql.batch_execute(&format!(
        "CREATE SCHEMA ahead;
         CREATE FUNCTION ahead.clock_timestamp() RETURNS timestamptz LANGUAGE sql
             AS $$ SELECT pg_catalog.clock_timestamp() + interval '1 hour' $$;
         ALTER DATABASE {name} SET search_path = public, ahead, pg_catalog"
    ))
    .unwrap();
    let skew = "warning Postgres: its clock and this machine's differ by";
    one(&found(), skew, "");
    sql.batch_execute(&format!(
        "ALTER DATABASE {name} RESET search_path; DROP SCHEMA ahead CASCADE"
    ))
    .unwrap();

    let user = format!("{name}_reader");
    sql.batch_execute(&format!(
        "CREATE ROLE {user} LOGIN PASSWORD 'secret';
         GRANT SELECT ON ALL TABLES IN SCHEMA public TO {user}"
    ))
    .unwrap();
    let as_reader = [
        ("POSTGRESQL_USERNAME", user.as_str()),
        ("POSTGRESQL_PASSWORD", "secret"),
    ];
    let lacking = findings(&deployment, &[], &as_reader);
    sql.batch_execute(&format!("DROP OWNED BY {user}; DROP ROLE {user}"))
        .unwrap();
    one(&lacking, "error Postgres: the user lacks", "UPDATE on job,");

    sql.batch_execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        .unwrap();
    one(&found(), "error Postgres: ", "ffffffffffff");
}

#[test]
fn what_others_have_made_of_the_broker_is_told() {
    let deployment = Deployment::new();
    assert!(deployment.start().stop().success());
    let sdk = Peer::new(&deployment, &deployment.sdk_vhost());
    let celery = Peer::new(&deployment, &deployment.celery_vhost());
    let found = || findings(&deployment, &[], &[]);

    // A worker that sends its results to the clients' vhost, and a client in the workers'.
    sdk.declare("omotes_task_result_events");
    sdk.send_safely("omotes_task_result_events", b"a result");
    let mixed = "warning TASK RabbitMQ: omotes_task_result_events is used in the vhost";
    one(&found(), mixed, "of SDK, not in");
    sdk.delete_queue("omotes_task_result_events");
    celery.declare("job_submissions");
    celery.send_safely("job_submissions", b"a submission");
    let mixed = "warning SDK RabbitMQ: job_submissions is used in the vhost";
    one(&found(), mixed, "_celery of");
    celery.delete_queue("job_submissions");

    // Declared otherwise.
    celery.declare("workflow_1");
    let otherwise = "error CELERY RabbitMQ: workflow_1 is declared otherwise";
    one(&found(), otherwise, "x-max-priority");
    celery.delete_queue("workflow_1");
    let progress = "omotes_task_progress_events";
    celery.delete_queue(progress);
    let transient = QueueDeclareOptions::default();
    celery.channel.queue_declare(progress, transient).unwrap();
    let otherwise = "error TASK RabbitMQ: omotes_task_progress_events is declared otherwise";
    one(&found(), otherwise, "durable");
    celery.delete_queue(progress);
    let exchange = || {
        sdk.channel
            .exchange_declare_passive("omotes_exchange")
            .unwrap()
    };
    exchange().delete(Default::default()).unwrap();
    let options = ExchangeDeclareOptions::default();
    sdk.channel
        .exchange_declare(ExchangeType::Topic, "omotes_exchange", options)
        .unwrap();
    let otherwise = "error SDK RabbitMQ: omotes_exchange is declared otherwise";
    one(&found(), otherwise, "type");
    exchange().delete(Default::default()).unwrap();

    // What cannot be handled.
    sdk.declare("omotes_dead_letters");
    sdk.send_safely("omotes_dead_letters", b"a letter");
    let letters = "warning SDK RabbitMQ: 1 message that could not be handled";
    one(&found(), letters, "omotes_dead_letters");
}

#[test]
fn rights_and_limits_of_the_broker_are_told() {
    let deployment = Deployment::with_own_servers();
    assert!(deployment.start().stop().success());
    let found = || findings(&deployment, &[], &[]);
    let (vhost, user) = (deployment.sdk_vhost(), setting("RABBITMQ_USER"));
    let permit = |configure: &str, write: &str, read: &str| {
        let rights = [configure, write, read];
        let arguments = [&["set_permissions", "-p", &vhost, &user][..], &rights].concat();
        deployment.rabbitmqctl(&arguments);
    };
    for (configure, write, read, what) in [
        ("^$", ".*", ".*", "no rights on job_submissions"),
        (".*", ".*", "^amq", "no rights on job_submissions"),
        (".*", "^$", ".*", "no right to publish"),
    ] {
        permit(configure, write, read);
        let found = found();
        let fits = |line: &String| line.starts_with("error SDK RabbitMQ: ") && line.contains(what);
        assert!(
            found.iter().any(fits),
            "{configure} {write} {read}: {found:#?}"
        );
    }
    deployment.rabbitmqctl(&["clear_permissions", "-p", &vhost, &user]);
    one(&found(), "error SDK RabbitMQ: ", "omotes");
    permit(".*", ".*", ".*");

    // A message limit below what has been seen.
    deployment
        .sql()
        .execute(
            "INSERT INTO job_history (job_id, finished_at, starts, outcome, result_bytes)
             VALUES ($1, now(), 1, 'CANCELLED', 20000000)",
            &[&Uuid::new_v4()],
        )
        .unwrap();
    deployment.limit_messages(16 * 1024 * 1024);
    let thrice = found();
    assert_eq!(thrice.len(), 3, "{thrice:#?}");
    let refused = "a message of 19 MiB is not taken";
    assert!(
        thrice.iter().all(|line| line.contains(refused)),
        "{thrice:#?}"
    );
    deployment.limit_messages(128 * 1024 * 1024);

    // Longer than RabbitMQ waits for a worker's acknowledgement; and nobody there to do it.
    let _service = deployment.start();
    let client = Client::new(&deployment);
    let (job, mut submission) = client.submission("workflow_1");
    submission.timeout_ms = Some(120_000);
    client.listen(job);
    client.send(&submission);
    client.status(job);
    let script = "application:set_env(rabbit, consumer_timeout, 60000).";
    deployment.rabbitmqctl(&["eval", script]);
    let rabbitmqctl = format!(
        "{}/run.sh private ctl {}",
        env!("CARGO_MANIFEST_DIR"),
        deployment.folder_of(Server::RabbitMq).display()
    );
    let arguments = ["--rabbitmqctl", &rabbitmqctl];
    let all = findings(&deployment, &arguments, &[]);
    let lonely = "error CELERY RabbitMQ: 1 job waits for workflow_1";
    assert!(all[0].starts_with(lonely), "{all:#?}");
    // A classic queue has it no longer from RabbitMQ 4.3 on.
    let has_timeout = rabbitmq_version() < [4, 3];
    assert_eq!(all.len(), 1 + usize::from(has_timeout), "{all:#?}");
    let worker = Worker::new(&deployment, "workflow_1");
    let tasks = worker
        .peer
        .channel
        .basic_consume("workflow_1", Default::default());
    let found = findings(&deployment, &arguments, &[]);
    if has_timeout {
        let short = "warning RabbitMQ: consumer_timeout is 1 min, and the timeout of a job 2 min";
        one(&found, short, "");
    } else {
        assert_eq!(found, Vec::<String>::new());
    }
    // A policy may give task queues one of their own from RabbitMQ 3.12 on.
    if has_timeout && rabbitmq_version() >= [3, 12] {
        let vhost = deployment.celery_vhost();
        let own = r#"{"consumer-timeout": 90000}"#;
        deployment.rabbitmqctl(&["set_policy", "-p", &vhost, "own", ".*", own]);
        let own =
            "warning RabbitMQ: consumer_timeout is 1 min 30 s, and the timeout of a job 2 min";
        one(&findings(&deployment, &arguments, &[]), own, "");
        deployment.rabbitmqctl(&["clear_policy", "-p", &vhost, "own"]);
    }
    drop(tasks);

    // More queues than it could open again.
    let script = "application:set_env(rabbit, consumer_timeout, undefined).";
    deployment.rabbitmqctl(&["eval", script]);
    let output = deployment
        .command(&["doctor", "--json", "--rabbitmqctl", &rabbitmqctl])
        .output()
        .unwrap();
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let files = findings.iter().find_map(|finding| {
        let found = finding["found"].as_str().unwrap();
        found.contains("queues, and may open").then_some(found)
    });
    // As many as this machine lets it have.
    let files = files.unwrap_or_else(|| panic!("{findings:#?}"));
    let numbers: Vec<u64> = files
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    assert!(numbers[0] >= 8 && numbers[1] >= 1024, "{files}");
}

#[test]
fn what_postgres_is_set_to_is_told() {
    let deployment = Deployment::with_own(&[Server::RabbitMq, Server::Postgres], |deployment| {
        let conf = deployment.extra_folder(Server::Postgres).join("conf");
        fs::write(conf, "max_locks_per_transaction = 10\nfsync = off\n").unwrap();
    })
    // As above.
    .without_pooler();
    let found = |handlers: &str| findings(&deployment, &[], &[("HANDLER_THREADS", handlers)]);
    assert_eq!(found("15"), Vec::<String>::new());
    let few = "warning Postgres: it has room for 3000 locks, and 16 handlers may want 3200";
    one(&found("16"), few, "");
    let mut sql = deployment.sql();
    for (set, reset, beginning) in [
        (
            "ALTER ROLE omotes SET synchronous_commit = off",
            "ALTER ROLE omotes RESET ALL",
            "warning Postgres: synchronous_commit is off",
        ),
        (
            "ALTER DATABASE omotes SET default_transaction_read_only = on",
            "ALTER DATABASE omotes RESET ALL",
            "error Postgres: it is read-only: default_transaction_read_only is on",
        ),
    ] {
        sql.batch_execute(set).unwrap();
        one(&found("4"), beginning, "");
        sql.batch_execute(reset).unwrap();
    }
    let output = deployment.command(&["doctor"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("note    Postgres        fsync is off"),
        "{text}"
    );
}

/// What `doctor` prints.
fn text(deployment: &Deployment, arguments: &[&str], variables: &[(&str, &str)]) -> String {
    let mut command = deployment.command(&[&["doctor"], arguments].concat());
    let output = command.envs(variables.iter().copied()).output().unwrap();
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

#[test]
fn an_orchestrator_that_has_stopped_is_found() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let running = text(&deployment, &[], &[]);
    assert!(
        running.contains("1 orchestrator takes submissions"),
        "{running}"
    );
    assert!(service.stop().success());
    let stopped = text(&deployment, &[], &[]);
    assert!(
        stopped.contains("warning Orchestrator    no orchestrator runs\n"),
        "{stopped}"
    );
    let client = Client::new(&deployment);
    client.submit("workflow_1");
    let waiting = text(&deployment, &[], &[]);
    let expected = "error   Orchestrator    no orchestrator runs, and 1 submission waits";
    assert!(waiting.contains(expected), "{waiting}");
}

#[test]
fn the_service_that_runs_is_asked_how_it_is() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let bind = service.http().to_string();
    let asked = || text(&deployment, &[], &[("HTTP_BIND", &bind)]);
    let said = asked();
    let ready =
        format!("ok      Orchestrator    http://{bind}/health/ready is ready, version 0.1.0");
    assert!(said.contains(&ready), "{said}");
    // From elsewhere it cannot be.
    let said = text(&deployment, &[], &[]);
    assert!(
        said.contains("note    Orchestrator    none answers at http://127.0.0.1:0/"),
        "{said}"
    );

    let mut sql = deployment.sql();
    let mut lock = sql.transaction().unwrap();
    lock.batch_execute("LOCK TABLE job_starts IN ACCESS EXCLUSIVE MODE")
        .unwrap();
    eventually("it is not ready", || {
        (!service.readiness()?.0).then_some(())
    });
    let said = asked();
    assert!(said.starts_with("One cause, from which "), "{said}");
    let cause = "error   Postgres        it does not take what is written: ";
    assert!(said.lines().nth(1).unwrap().starts_with(cause), "{said}");
    let follows = format!("error   Orchestrator    http://{bind}/health/ready, version 0.1.0");
    assert!(said.contains(&follows), "{said}");
    assert!(
        said.contains("is not ready: Postgres does not do what is needed of it: "),
        "{said}"
    );
    // What is not known without --rabbitmqctl, or for the lock, is of no interest now.
    assert!(!said.contains("consumer_timeout"), "{said}");
    assert!(!said.contains("overdue or silent is not known"), "{said}");
    lock.rollback().unwrap();
    service.wait_until_ready();
}

#[test]
fn an_orchestrator_that_hangs_is_found() {
    let deployment = Deployment::new();
    let service = deployment.start();
    let bind = service.http().to_string();
    // The lock that each replica shows, which it has a moment after it is ready.
    let shown = format!(
        "SELECT count(*) FROM pg_locks JOIN pg_database ON database = pg_database.oid
         WHERE locktype = 'advisory' AND classid::bigint = {} AND objid = 1
           AND datname = current_database()",
        0x6f6d_6f74
    );
    deployment.comes_to(1, &shown);
    service.signal("-STOP");
    let said = text(&deployment, &[], &[("HTTP_BIND", &bind)]);
    let hangs = format!(
        "error   Orchestrator    at http://{bind}/health/ready one takes connections, and does not answer"
    );
    assert!(said.contains(&hangs), "{said}");
    // From elsewhere, a while later.
    let still = "error   Orchestrator    the orchestrator that is connected from ";
    let said = eventually("it is seen to stand still", || {
        let said = text(&deployment, &[], &[]);
        said.contains(still).then_some(said)
    });
    let more = " stands still: Postgres has not heard of it for ";
    assert!(said.contains(more), "{said}");
    // RabbitMQ gives it up in the end.
    let said = eventually("nobody takes submissions any more", || {
        let said = text(&deployment, &[], &[]);
        said.contains("no orchestrator runs").then_some(said)
    });
    let leads = format!("One cause, from which 1 other finding may follow:\n{still}");
    assert!(said.starts_with(&leads), "{said}");
    service.signal("-CONT");
}

#[test]
fn what_jobs_wait_for_in_vain_is_told() {
    let deployment = Deployment::new();
    assert!(deployment.start().stop().success());
    let mut sql = deployment.sql();
    plant_workers(&mut sql);
    sql.batch_execute(&format!(
        "UPDATE worker SET state = 'silent', last_seen = now() - interval '40 s'
             WHERE host = 'worker-simulator@a1';
         INSERT INTO job (job_id, workflow_type, status, registered_at, submitted_at, running_at, celery_id)
             VALUES ('{RUNNING}', 'workflow_1', 'RUNNING', now(), now(), now(), 't-1'),
                    (gen_random_uuid(), 'workflow_2', 'SUBMITTED', now() - interval '3 h',
                     now() - interval '3 h', NULL, 't-2');
         INSERT INTO absent_task (job_id, celery_id, since, confirmed_at, may_wait, is_told)
             VALUES ('{RUNNING}', 't-1', now() - interval '2 min', now(), false, true);
         INSERT INTO queue_limit (queue, paused, changed_at) VALUES ('workflow_1', true, now());
         INSERT INTO job_turn (job_id, queue, owner, priority, held_at)
             VALUES (gen_random_uuid(), 'workflow_1', '', 'MEDIUM', now());
         WITH resting AS (
             INSERT INTO job (job_id, workflow_type, status, registered_at)
             VALUES (gen_random_uuid(), 'workflow_2', 'REGISTERED', now() - interval '9 h')
             RETURNING job_id)
         INSERT INTO job_turn (job_id, queue, owner, priority, held_at, on_hold)
             SELECT job_id, 'workflow_2', '', 'MEDIUM', now(), true FROM resting"
    ))
    .unwrap();
    let found = findings(&deployment, &[], &[("WORKERS_PERIOD_SEC", "15")]);
    for expected in [
        "warning Workers: worker-simulator@a1 has not answered for 4",
        "warning Jobs: no worker has had the task of job ",
        "warning Jobs: workflow_1 is paused by an operator, and 1 job waits for that",
        "warning Jobs: a job of workflow_2 has waited for 3 h",
    ] {
        let is_there = found.iter().any(|one| one.starts_with(expected));
        assert!(is_there, "{expected}: {found:#?}");
    }
    let silent = found.iter().find(|one| one.contains("@a1")).unwrap();
    assert!(
        silent.ends_with(&format!("; it has job {RUNNING}")),
        "{silent}"
    );
    let workers = || deployment.command(&["workers"]).output().unwrap();
    let listed = String::from_utf8(workers().stdout).unwrap();
    let last = listed.lines().find(|line| line.starts_with("seen "));
    assert!(
        last.is_some_and(|line| line.ends_with(" s ago")),
        "{listed}"
    );
    // How they were an hour ago says nothing.
    sql.batch_execute("UPDATE worker_look SET looked_at = now() - interval '1 h'")
        .unwrap();
    let warned = String::from_utf8(workers().stderr).unwrap();
    let warning = "warning: nobody has looked at the workers for 1 h: this is how they were then";
    assert!(warned.starts_with(warning), "{warned}");
    let found = findings(&deployment, &[], &[("WORKERS_PERIOD_SEC", "15")]);
    assert!(!found.iter().any(|one| one.contains("@a1")), "{found:#?}");
}

#[test]
fn one_cause_leads_what_follows_from_it() {
    let deployment = Deployment::new();
    assert!(deployment.start().stop().success());
    let port = {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port().to_string()
    };
    let ports = ["SDK", "TASK", "CELERY"].map(|prefix| format!("{prefix}_RABBITMQ_PORT"));
    let away: Vec<_> = ports
        .iter()
        .map(|name| (name.as_str(), port.as_str()))
        .collect();
    let said = text(&deployment, &[], &away);
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(
        lines[0], "One cause, from which 2 other findings may follow:",
        "{said}"
    );
    assert!(lines[1].starts_with("error   SDK RabbitMQ"), "{said}");
    assert_eq!(said.matches("Follows from the first.").count(), 2, "{said}");
    let sum = "\n\n3 errors; 2 may follow from the first: SDK RabbitMQ: ";
    assert!(said.contains(sum), "{said}");
    let said = text(&deployment, &[], &[("POSTGRESQL_PORT", &port)]);
    assert!(
        said.starts_with("One cause, from which 1 other finding may follow:\n"),
        "{said}"
    );
    let second = said.lines().nth(1).unwrap();
    assert!(second.starts_with("error   Postgres"), "{said}");
    assert!(
        said.contains("no orchestrator runs\n                        Follows"),
        "{said}"
    );
    assert!(!text(&deployment, &[], &[]).contains("One cause"));
}

#[test]
fn tasks_of_ended_jobs_are_told_from_jobs_and_dropped() {
    let deployment = Deployment::new();
    let _service = deployment.start();
    let client = Client::new(&deployment);
    let [ended, waiting] = [(); 2].map(|()| client.submit("workflow_1"));
    client.status(ended);
    client.status(waiting);
    client.cancel(ended);
    client.outcome(ended);
    deployment.comes_to(1, "SELECT count(*) FROM job");
    let told = [
        "error CELERY RabbitMQ: 1 job waits for workflow_1, which has no worker",
        "warning CELERY RabbitMQ: 1 task in workflow_1 is of a job that has ended, or was started before",
    ];
    assert_eq!(findings(&deployment, &[], &[]), told);
    let asked = text(&deployment, &["--fix"], &[]);
    let would = "--fix would drop the tasks in workflow_1 whose jobs have ended";
    assert!(asked.contains(would), "{asked}");
    assert!(
        asked.ends_with("nothing was done: --yes does it\n"),
        "{asked}"
    );
    assert_eq!(findings(&deployment, &[], &[]), told);
    let done = text(&deployment, &["--fix", "--yes"], &[]);
    assert!(
        done.contains("1 task of jobs that have ended was dropped from workflow_1"),
        "{done}"
    );
    assert_eq!(findings(&deployment, &[], &[]), told[..1]);
    let worker = Worker::new(&deployment, "workflow_1");
    assert_eq!(worker.take().job, waiting);
    let nothing = text(&deployment, &["--fix", "--yes"], &[]);
    assert!(
        nothing.contains("there is nothing that --fix puts right"),
        "{nothing}"
    );
}

#[test]
fn what_the_service_declares_can_be_declared_before_it_starts() {
    let deployment = Deployment::new();
    let before = text(&deployment, &[], &[]);
    assert!(
        before.contains("note    Orchestrator    there is no queue job_submissions"),
        "{before}"
    );
    let done = text(&deployment, &["--fix", "--yes"], &[]);
    assert!(
        done.contains("the queues and exchanges of the service are declared\n"),
        "{done}"
    );
    let queues = deployment.queues();
    for queue in ["job_submissions", "job_deletions", "omotes_dead_letters"] {
        assert!(queues.contains(&queue.to_owned()), "{queues:?}");
    }
    // The service takes what was sent meanwhile.
    let client = Client::new(&deployment);
    let job = client.submit("workflow_1");
    let _service = deployment.start();
    client.status(job);
}
