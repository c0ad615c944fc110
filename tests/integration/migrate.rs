//! The database's revisions, beside the real Alembic with the Python service's revisions.

use std::fs;
use std::process::{Command, Output};

use omotes_orchestrator::wire::{job_result::ResultType, job_status_update::JobStatus};
use rstest::rstest;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::harness::deployment::{Deployment, eventually, setting};
use crate::harness::peers::{Client, Task, Worker, running_job};

const ALEMBIC_HEAD: &str = "543bc8f6ad87";

/// What a finished program has printed; it must have succeeded.
fn said(output: Output) -> String {
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    assert!(output.status.success(), "{text}");
    text
}

fn db(deployment: &Deployment, arguments: &[&str]) -> String {
    said(deployment.command(arguments).output().unwrap())
}

/// Why a command fails.
fn fault(deployment: &Deployment, arguments: &[&str]) -> String {
    let output = deployment.command(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

/// Of the database, for SQLAlchemy.
fn url(deployment: &Deployment) -> String {
    format!(
        "postgresql://{}:{}@127.0.0.1:{}/{}",
        setting("POSTGRES_USER"),
        setting("POSTGRES_PASSWORD"),
        setting("POSTGRES_PORT"),
        deployment.name
    )
}

pub fn alembic(deployment: &Deployment, arguments: &[&str]) -> String {
    let ini = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/python/alembic/alembic.ini"
    );
    let mut command = Command::new(format!("{}/alembic/bin/alembic", setting("VENVS")));
    command
        .args(["-c", ini])
        .args(arguments)
        .env("DATABASE_URL", url(deployment))
        .env("PYTHONDONTWRITEBYTECODE", "1");
    said(command.output().unwrap())
}

/// The schema as text: columns, constraints, indexes and enums with their names.
fn schema(deployment: &Deployment) -> String {
    let sql = "
        SELECT format('column %s.%s %s %s %s', table_name, column_name, data_type, is_nullable,
                      character_maximum_length) AS line
        FROM information_schema.columns WHERE table_schema = 'public'
        UNION ALL
        SELECT format('constraint %s %s %s', conrelid::regclass, conname, pg_get_constraintdef(oid))
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
        UNION ALL
        SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
        UNION ALL
        SELECT format('enum %s %s %s', enumtypid::regtype, enumsortorder, enumlabel) FROM pg_enum
        ORDER BY line";
    let rows = deployment.sql().query(sql, &[]).unwrap();
    let lines: Vec<String> = rows.iter().map(|row| row.get("line")).collect();
    lines.join("\n")
}

#[rstest]
#[case("aacf0b4d16ad")]
#[case("60506a3a582f")]
#[case("93fd48ba9ee8")]
#[case("b3e9e4d8d50e")]
#[case("543bc8f6ad87")]
fn a_database_of_the_python_service_is_upgraded_and_given_back(#[case] revision: &str) {
    let deployment = Deployment::new();
    // It says what it does.
    assert!(alembic(&deployment, &["upgrade", revision]).contains("Running upgrade"));
    let python = schema(&deployment);
    let mut sql = deployment.sql();
    sql.batch_execute(
        "INSERT INTO job (job_id, workflow_type, status, registered_at, timeout_after_ms)
         VALUES (gen_random_uuid(), 'w', 'REGISTERED', now(), 2147483647)",
    )
    .unwrap();
    let has_series = python.contains("esdl_time_series_info");
    if has_series {
        let row =
            "INSERT INTO esdl_time_series_info (row_id, esdl_id) VALUES (gen_random_uuid(), 'e')";
        sql.batch_execute(row).unwrap();
    }

    db(&deployment, &["db", "upgrade"]);
    let fresh = Deployment::new();
    db(&fresh, &["db", "upgrade"]);
    assert_eq!(schema(&deployment), schema(&fresh));
    // For Alembic there is nothing to do.
    assert!(alembic(&deployment, &["current"]).contains(ALEMBIC_HEAD));
    assert!(!alembic(&deployment, &["upgrade", "head"]).contains("Running upgrade"));
    assert_eq!(schema(&deployment), schema(&fresh));
    assert_eq!(deployment.count("SELECT count(*) FROM job"), 1);

    // Longer than the column that comes back can hold.
    sql.batch_execute("UPDATE job SET timeout_after_ms = 4294967295")
        .unwrap();
    db(&deployment, &["db", "downgrade", revision, "--yes"]);
    assert_eq!(schema(&deployment), python);
    assert!(alembic(&deployment, &["current"]).contains(revision));
    let timeout = "SELECT timeout_after_ms::bigint FROM job";
    assert_eq!(deployment.count(timeout), 2_147_483_647);
    if has_series {
        assert_eq!(
            deployment.count("SELECT count(*) FROM esdl_time_series_info"),
            1
        );
    }

    db(&deployment, &["db", "downgrade", "base", "--yes"]);
    assert_eq!(deployment.count("SELECT count(*) FROM alembic_version"), 0);
    assert!(!schema(&deployment).contains("job"));
    alembic(&deployment, &["upgrade", "head"]);
}

/// The Python service's turn on the tables, by its own statements. Returns what it found.
fn python_turn(deployment: &Deployment, turn: &Value) -> Value {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/tables.py");
    let mut command = Command::new(format!("{}/alembic/bin/python", setting("VENVS")));
    command.args([script, &url(deployment), &turn.to_string()]);
    serde_json::from_str(&said(command.output().unwrap())).unwrap()
}

#[rstest]
#[case::on_the_upgraded_tables(false)]
#[case::on_its_own_tables(true)]
fn jobs_in_every_state_survive_the_python_services_turn(#[case] downgraded: bool) {
    // A downgrade takes the connections that a pooler keeps for replicas.
    let deployment = Deployment::new().without_pooler();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    alembic(&deployment, &["upgrade", "head"]);
    let python = schema(&deployment);
    let service = deployment.start();
    let (waiting, mut submission) = client.submission("workflow_1");
    submission.timeout_ms = Some(u32::MAX);
    client.listen(waiting);
    client.send(&submission);
    let waiting = worker.take();
    let [running, done, finished_by_python] = [(); 3].map(|()| running_job(&client, &worker, None));
    worker.succeed(&done, "<e id='done'/>");
    assert_eq!(client.outcome(done.job).0, ResultType::Succeeded);
    assert!(service.stop().success());

    let upgraded = schema(&deployment);
    if downgraded {
        downgrade(&deployment, ALEMBIC_HEAD);
        assert_eq!(schema(&deployment), python);
    }
    // What the Python service does at its start.
    assert!(!alembic(&deployment, &["upgrade", "head"]).contains("Running upgrade"));
    let (registered, submission) = client.submission("workflow_1");
    client.listen(registered);
    let submitted = Task {
        job: Uuid::new_v4(),
        id: Uuid::new_v4().to_string(),
    };
    client.listen(submitted.job);
    let found = python_turn(
        &deployment,
        &json!({
            "register": registered.to_string(),
            "submit": [submitted.job.to_string(), submitted.id],
            "start": waiting.job.to_string(),
            "finish": finished_by_python.job.to_string(),
            "series": ["of the Python service", submitted.job.to_string()],
        }),
    );
    let row = |task: &Task, status: &str, timeout: Value, starts: u32| {
        let times = [true, true, starts > 0];
        json!({"status": status, "task": task.id, "workflow": "workflow_1", "times": times,
               "reference": "a reference", "timeout": timeout, "starts": starts})
    };
    let timeout = if downgraded {
        i64::from(i32::MAX)
    } else {
        i64::from(u32::MAX)
    };
    let jobs = [
        (waiting.job, row(&waiting, "SUBMITTED", timeout.into(), 0)),
        (running.job, row(&running, "RUNNING", Value::Null, 1)),
        (
            finished_by_python.job,
            row(&finished_by_python, "RUNNING", Value::Null, 1),
        ),
    ];
    let jobs: Map<_, _> = jobs
        .map(|(job, row)| (job.to_string(), row))
        .into_iter()
        .collect();
    assert_eq!(
        found,
        json!({"jobs": jobs, "series": {"done": [done.job.to_string(), true]}})
    );

    let _service = deployment.start();
    assert_eq!(schema(&deployment), upgraded);
    // The submission that the Python service was killed over comes again.
    client.send(&submission);
    let registered = worker.take();
    assert_eq!(registered.job.to_string(), submission.uuid);
    let kept = "SELECT count(*) FROM job WHERE registered_at < now() - interval '50 minutes'
                AND status = 'SUBMITTED'";
    // The other one is what the Python service submitted.
    deployment.comes_to(2, kept);
    worker.start(&submitted);
    assert_eq!(client.status(submitted.job), JobStatus::Running);
    for task in [&waiting, &running, &registered, &submitted] {
        worker.succeed(task, &format!("<e id='{}'/>", task.job));
        assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    }
    deployment.no_jobs_left();
    let series = "SELECT count(*) FROM esdl_time_series_info WHERE deactivated_at IS NULL";
    assert_eq!(deployment.count(series), 5);
    // A start of the job that the Python service ended is of nobody's.
    worker.start(&finished_by_python);
    assert_eq!(worker.revoked(), finished_by_python.id);
}

/// Once the connections of what ran before are gone, which takes Postgres a moment.
fn downgrade(deployment: &Deployment, revision: &str) {
    eventually("nobody is connected", || {
        let output = deployment
            .command(&["db", "downgrade", revision, "--yes"])
            .output()
            .unwrap();
        output.status.success().then_some(())
    });
}

#[test]
fn nothing_is_downgraded_unasked() {
    // It takes the connections that a pooler keeps for replicas.
    let deployment = Deployment::new().without_pooler();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    running_job(&client, &worker, Some(1000 * 60));
    let other = client.submit("workflow_1");
    assert_eq!(client.status(other), JobStatus::Enqueued);
    let ended = client.submit("no such workflow");
    client.outcome(ended);
    deployment.comes_to(2, "SELECT count(*) FROM job");
    let before = schema(&deployment);
    let rows = "SELECT (SELECT count(*) FROM job) * 100 + (SELECT count(*) FROM job_starts) * 10
                       + (SELECT count(*) FROM job_history)";
    let downgrade = |more: &[&str]| {
        let arguments = [&["db", "downgrade"], more].concat();
        let output = deployment.command(&arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };

    // While somebody works on the tables, nothing makes it.
    for more in [&["base"][..], &["base", "--yes"], &[ALEMBIC_HEAD, "--yes"]] {
        let (code, said) = downgrade(more);
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("connected as omotes_orchestrator"), "{said}");
    }
    assert!(service.stop().success());
    let said = eventually("nobody is connected", || {
        let (code, said) = downgrade(&["base"]);
        assert_eq!(code, Some(1), "{said}");
        (!said.contains("connected as")).then_some(said)
    });
    for line in [
        "table job: 2 rows",
        "table job_starts: 1 row",
        "table job_history: 1 row",
        "table esdl_time_series_info: 0 rows",
        "nothing was done: --yes does it",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let (code, said) = downgrade(&[ALEMBIC_HEAD]);
    assert_eq!(code, Some(1), "{said}");
    for line in [
        "table job_history: 1 row",
        "column job.priority: 2 values",
        "column job.progress: 0 values",
        "column job_starts.message_id: 1 value",
        "column job.timeout_after_ms: bigint becomes integer",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert!(!said.contains("table job:"), "{said}");
    assert_eq!(schema(&deployment), before);
    assert_eq!(deployment.count(rows), 211);

    let (code, said) = downgrade(&["base", "--yes"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("table job: 2 rows") && said.contains("undone aacf0b4d16ad"),
        "{said}"
    );
    // There is nothing to ask about where nothing goes.
    let (code, said) = downgrade(&["base"]);
    assert_eq!((code, said.as_str()), (Some(0), "nothing to do\n"));
}

#[test]
fn a_start_counted_by_the_python_service_counts() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    // Before it, for what was started before its session would be excused.
    let _service = deployment.start();
    let task = Task {
        job: Uuid::new_v4(),
        id: "a task of the Python service".to_owned(),
    };
    client.listen(task.job);
    let mut sql = deployment.sql();
    sql.execute(
        "INSERT INTO job VALUES ($1, $2, 'workflow_1', 'RUNNING', now(), now(), now(), NULL, '')",
        &[&task.job, &task.id],
    )
    .unwrap();
    sql.execute("INSERT INTO job_starts VALUES ($1, now())", &[&task.job])
        .unwrap();
    worker.start(&task);
    assert_eq!(worker.revoked(), task.id);
    assert_eq!(client.outcome(task.job).0, ResultType::Error);
}

#[test]
fn the_commands_say_where_the_database_is() {
    let deployment = Deployment::new();
    assert_eq!(db(&deployment, &["db", "current"]), "base\n");
    let said = db(&deployment, &["db", "upgrade", ALEMBIC_HEAD]);
    assert_eq!(said.lines().count(), 5);
    assert_eq!(
        db(&deployment, &["db", "current"]),
        format!("{ALEMBIC_HEAD} unique esdl id\n")
    );
    db(&deployment, &["db", "upgrade"]);
    assert!(db(&deployment, &["db", "current"]).ends_with("(head)\n"));
    assert_eq!(db(&deployment, &["db", "upgrade"]), "nothing to do\n");
    let history = db(&deployment, &["db", "history"]);
    assert!(
        history.starts_with("aacf0b4d16ad create job\n60506a3a582f "),
        "{history}"
    );

    let past = fault(&deployment, &["db", "upgrade", ALEMBIC_HEAD]);
    assert!(past.contains("`db downgrade` goes back"), "{past}");
    let unknown = fault(&deployment, &["db", "downgrade", "0000"]);
    assert!(
        unknown.contains("there is no revision \"0000\""),
        "{unknown}"
    );
}

#[test]
fn a_new_revision_gets_its_folder_on_top_of_the_last_one() {
    let deployment = Deployment::new();
    let no_folder = fault(&deployment, &["db", "revision", "a thing"]);
    assert!(
        no_folder.contains("there is no migrations/ here"),
        "{no_folder}"
    );
    fs::create_dir(deployment.folder.join("migrations")).unwrap();
    let said = db(&deployment, &["db", "revision", "Add a column: colour!"]);
    let folder = deployment.folder.join(said.trim());
    let name = folder.file_name().unwrap().to_str().unwrap();
    assert_eq!(name.split_once('_').unwrap().1, "add_a_column_colour");
    let history = db(&deployment, &["db", "history"]);
    let head = history.lines().last().unwrap().split(' ').next().unwrap();
    assert_eq!(
        fs::read_to_string(folder.join("up.sql")).unwrap(),
        format!("-- Revises: {head}\n")
    );
    assert!(folder.join("down.sql").exists());
}

#[rstest]
#[case::of_a_newer_python_service(
    "UPDATE alembic_version SET version_num = 'ffffffffffff'",
    "`alembic_version` says \"ffffffffffff\", a revision that this program does not know"
)]
#[case::of_a_newer_orchestrator(
    "UPDATE orchestrator_version SET version_num = 'eeeeeeeeeeee'",
    "`orchestrator_version` says \"eeeeeeeeeeee\", a revision that this program does not know"
)]
#[case::two_heads(
    "INSERT INTO alembic_version VALUES ('b3e9e4d8d50e')",
    "`alembic_version` has 2 rows"
)]
#[case::nobodys(
    "DROP TABLE alembic_version",
    "`alembic_version` does not say which revision it is at"
)]
#[case::undone_below_ours(
    "UPDATE alembic_version SET version_num = 'b3e9e4d8d50e'",
    "Somebody ran Alembic's downgrade"
)]
fn an_unknown_revision_stops_the_start_and_says_what_to_do(#[case] sql: &str, #[case] fault: &str) {
    let deployment = Deployment::new();
    db(&deployment, &["db", "upgrade"]);
    deployment.sql().batch_execute(sql).unwrap();
    let mut service = deployment.launch(&[]);
    assert_eq!(service.wait().code(), Some(1));
    assert!(service.log().contains(fault), "{}", service.log());
}

/// As after a dump was restored by somebody else. What the service says is to be done is enough.
#[rstest]
#[case::before_an_upgrade(ALEMBIC_HEAD)]
#[case::after_all_upgrades("head")]
fn tables_of_another_role_are_told_with_what_helps(#[case] revision: &str) {
    let deployment = Deployment::new();
    match revision {
        "head" => db(&deployment, &["db", "upgrade"]),
        revision => db(&deployment, &["db", "upgrade", revision]),
    };
    let role = format!("{}_Other", deployment.name);
    let mut sql = deployment.sql();
    sql.batch_execute(&format!("CREATE ROLE \"{role}\" LOGIN PASSWORD 'secret'"))
        .unwrap();
    let run = |arguments: &[&str]| {
        let mut command = deployment.command(arguments);
        command.env("POSTGRESQL_USERNAME", &role);
        command.env("POSTGRESQL_PASSWORD", "secret");
        command.output().unwrap()
    };
    let mut lacking = Vec::new();
    loop {
        let output = run(&["run"]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        let begin = "As a superuser, in this database: ";
        let (what, statements) = text.split_once(begin).expect(&text);
        assert!(
            what.contains(&format!("the user \"{role}\" lacks ")),
            "{text}"
        );
        lacking.push(what.to_owned());
        let doctor = run(&["doctor", "--json"]);
        let found: Vec<Value> = serde_json::from_slice(&doctor.stdout).unwrap();
        let error = found.iter().find(|one| one["severity"] == "error").unwrap();
        assert!(
            error["found"].as_str().unwrap().contains("the user"),
            "{error}"
        );
        let (statements, _) = statements.split_once("; \n").unwrap_or((statements, ""));
        let line = statements.lines().next().unwrap();
        sql.batch_execute(line).expect(line);
        if run(&["db", "upgrade"]).status.success() {
            break;
        }
        assert!(lacking.len() < 3, "{lacking:#?}");
    }
    assert!(
        lacking[0].contains("SELECT on alembic_version, which is omotes's"),
        "{lacking:#?}"
    );
    if revision == ALEMBIC_HEAD {
        let owner = "the ownership of job, which is omotes's";
        assert!(lacking[1].contains(owner), "{lacking:#?}");
    }
    let variables = [
        ("POSTGRESQL_USERNAME", role.as_str()),
        ("POSTGRESQL_PASSWORD", "secret"),
    ];
    let service = deployment.start_with(&variables);
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let task = running_job(&client, &worker, None);
    worker.succeed(&task, "<e id='out-1'/>");
    assert_eq!(client.outcome(task.job).0, ResultType::Succeeded);
    assert!(service.stop().success());
    sql.batch_execute(&format!(
        "REASSIGN OWNED BY \"{role}\" TO omotes; DROP OWNED BY \"{role}\"; DROP ROLE \"{role}\""
    ))
    .unwrap();
}
