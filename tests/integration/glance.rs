//! What the page says at a glance: how all is, what needs a look, and what is asked of it by a part of a name.

use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::operator::{Answer, Operator};
use crate::harness::planted::{FAILED, RUNNING, plant, workflows};

fn planted() -> (Service, Deployment) {
    let deployment = Deployment::new();
    let file = workflows(&deployment);
    let service = deployment.start_with(&[
        ("WORKFLOW_CONFIG_PATH", file.to_str().unwrap()),
        ("KEEP_RESULTS_SEC", "7200"),
    ]);
    plant(&mut deployment.sql());
    (service, deployment)
}

fn verdict(page: &Answer) -> &str {
    let (_, rest) = page.body.split_once("<p class=\"verdict").unwrap();
    let (_, rest) = rest.split_once('>').unwrap();
    rest.split_once("</p>").unwrap().0
}

#[test]
fn what_needs_a_look_is_said_first_and_by_name() {
    let (service, deployment) = planted();
    let mut sql = deployment.sql();
    sql.batch_execute(
        "UPDATE job SET submitted_at = now() - interval '190 min'
         WHERE job_reference = 'Utrecht, connection 1'",
    )
    .unwrap();
    let nobody = Operator::at(&service, "");
    // The limits are read now and then.
    let page = eventually("a paused queue", || {
        let page = nobody.get("/");
        page.body.contains("is paused; ").then_some(page)
    });
    assert_eq!(
        verdict(&page),
        "Queue optimiser is paused; 1 job is overdue; 1 job is silent."
    );
    for what in [
        "<b>optimiser</b> is paused by an operator, and 2 jobs wait for it.",
        "1 job is <b>silent</b>: <a href=",
        "the oldest waits for <time",
        "3 h 10 min",
        "Limits in force",
        "title=\"KEEP_RESULTS_SEC\"",
        "title=\"TIMEOUT_JOB_HANDLER_RERUN_SEC\"",
        "title=\"WORKERS_PERIOD_SEC\"",
        "<dd>2 h</dd>",
        "Table <code>job_history</code>",
        ", tables at revision ",
    ] {
        assert!(page.body.contains(what), "{what}: {}", page.body);
    }
    let (_, shown) = page.body.split_once("<main").unwrap();
    let (shown, _) = shown.split_once("</main>").unwrap();
    assert!(!shown.contains('`'), "{shown}");
    // The same for somebody at a terminal.
    let doctor = || {
        let mut doctor = deployment.command(&["doctor"]);
        let definitions = deployment.folder.join("planted.json");
        doctor.env("WORKFLOW_CONFIG_PATH", definitions);
        String::from_utf8(doctor.output().unwrap().stdout).unwrap()
    };
    let said = doctor();
    for (what, why) in [
        (
            "note    Jobs            1 job is overdue: Zwolle (",
            "It runs for longer than all of its workflow before it. `jobs show ID` ",
        ),
        (
            "note    Jobs            1 job is silent: Groningen, all variants of the return temperature (",
            "Its worker has reported no progress for more than ten minutes. `jobs show ID` ",
        ),
    ] {
        let mut lines = said.lines();
        assert!(lines.any(|line| line.starts_with(what)), "{what}: {said}");
        let remedy = lines.next().unwrap().trim_start();
        assert!(remedy.starts_with(why), "{said}");
    }
    // Whatever is looked at.
    for path in ["/?finished=true", "/?workflow=optimiser"] {
        let other = nobody.get(path);
        assert_eq!(verdict(&other), verdict(&page), "{path}");
    }
    // Nobody hears what workers report.
    assert!(service.stop().success());
    let said = doctor();
    assert!(
        !said.contains(" is silent") && !said.contains(" is overdue"),
        "{said}"
    );
}

/// As `doctor` says it, but for what only a look at RabbitMQ tells: the one that says it runs.
#[test]
fn whether_one_may_go_back_is_said_as_doctor_says_it() {
    let (service, deployment) = planted();
    let mut command = deployment.command(&["doctor", "--before-switch=back"]);
    command.env("WORKFLOW_CONFIG_PATH", workflows(&deployment));
    let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
    let verdict = said.lines().next().unwrap();
    let expected = "Not yet back to the Python service: jobs of several steps are in flight; \
                    3 jobs wait for their turn; the definition file has workflows of steps.";
    assert_eq!(verdict.replace("an orchestrator runs; ", ""), expected);
    let nobody = Operator::at(&service, "");
    let page = eventually("the jobs are counted", || {
        let page = nobody.get("/?finished=true");
        page.body.contains("not yet, 3 reasons").then_some(page)
    });
    for what in [
        expected,
        "jobs of steps are in flight, 1 of optimise_and_simulate: ",
        "<code>jobs release --all --yes</code>",
        "omotes-orchestrator doctor --before-switch=back",
    ] {
        assert!(page.body.contains(what), "{what}: {}", page.body);
    }
}

/// What is lost for good before what only takes long, and by the names of the jobs.
#[test]
fn what_has_to_be_done_something_about_is_said_first() {
    let deployment = Deployment::new();
    let file = workflows(&deployment);
    let service = deployment.start_with(&[
        ("WORKFLOW_CONFIG_PATH", file.to_str().unwrap()),
        ("WORKERS_PERIOD_SEC", "60"),
    ]);
    let mut sql = deployment.sql();
    plant(&mut sql);
    sql.batch_execute("UPDATE job SET running_at = now() - interval '3 h', timeout_after_ms = NULL WHERE celery_id = 't-4'")
        .unwrap();
    let lost = format!(
        "DELETE FROM worker_look; INSERT INTO worker_look (looked_at) VALUES (now());
         DELETE FROM absent_task;
         INSERT INTO absent_task (celery_id, job_id, since, confirmed_at, may_wait, is_told)
         VALUES ('t-1', '{RUNNING}', now() - interval '2 min', now(), false, true)"
    );
    let nobody = Operator::at(&service, "");
    let page = eventually("a lost task, and a paused queue", || {
        sql.batch_execute(&lost).unwrap();
        let page = nobody.get("/");
        let verdict = verdict(&page).to_owned();
        (verdict.contains("lost") && verdict.contains("paused")).then_some(page)
    });
    assert_eq!(
        verdict(&page),
        "A task is lost; queue optimiser is paused; 2 jobs are overdue; and 1 more."
    );
    for what in [
        &format!("the task of job <a href=\"/jobs/{RUNNING}\">Rotterdam harbour, phase 2</a>"),
        "They run for longer than all of their workflows before them.",
        "Its worker has reported no progress",
    ] {
        assert!(page.body.contains(what), "{what}: {}", page.body);
    }
}

#[test]
fn a_job_is_found_by_the_beginning_of_its_id() {
    let (service, deployment) = planted();
    let nobody = Operator::at(&service, "");
    let several = nobody.get("/jobs/7d2f1c04").is(200, "whose ids begin with");
    for id in [RUNNING, FAILED] {
        assert!(
            several.body.contains(&format!("/jobs/{id}")),
            "{}",
            several.body
        );
    }
    let mut sql = deployment.sql();
    sql.batch_execute(&format!(
        "DELETE FROM job_history WHERE job_id = '{FAILED}'"
    ))
    .unwrap();
    let one = nobody.get("/jobs/7d2f1c04");
    assert_eq!(one.status, 303, "{one:?}");
    assert_eq!(
        one.header("location"),
        Some(format!("/jobs/{RUNNING}").as_str())
    );
    for unknown in ["ffff0000", "no-such", "12"] {
        let page = nobody
            .get(&format!("/jobs/{unknown}"))
            .is(404, "is unknown");
        assert!(
            page.body.contains("← all jobs") && page.body.contains(unknown),
            "{page:?}"
        );
    }
}
