//! Queues that take nothing for now, and the messages that wait for them unacknowledged.

use amiquip::{AmqpValue, FieldTable};
use omotes_orchestrator::wire::{
    DEAD_LETTERS_QUEUE, WORKFLOW_REQUESTS_KEY, job_result::ResultType, job_status_update::JobStatus,
};
use prost::Message;
use rstest::rstest;
use serde_json::json;

use crate::harness::deployment::{Deployment, Service, eventually, has_khepri, management};
use crate::harness::peers::{Client, Peer, Taken, Task, Worker, running_job};

const OUTPUT: &str = "<e id='out-1'/>";

fn assert_one_session(service: &Service) {
    let ended = "the session with RabbitMQ has ended";
    assert!(!service.log().contains(ended), "{ended}");
}

/// Lets the dead letters of a vhost hold so many messages and refuse the others, as an operator
/// might.
fn limit_dead_letters(vhost: &str, messages: u32) {
    let policy = json!({
        "pattern": format!("^{DEAD_LETTERS_QUEUE}$"),
        "definition": {"max-length": messages, "overflow": "reject-publish"},
        "apply-to": "queues",
    });
    management("PUT", &format!("policies/{vhost}/limit"), Some(policy));
}

fn unlimit_dead_letters(vhost: &str) {
    management("DELETE", &format!("policies/{vhost}/limit"), None);
}

/// Waits until a policy is in force.
fn fill_dead_letters(client: &Client, vhost: &str) {
    client.peer.declare(DEAD_LETTERS_QUEUE);
    limit_dead_letters(vhost, 1);
    eventually("the policy is in force", || {
        let queue = management("GET", &format!("queues/{vhost}/{DEAD_LETTERS_QUEUE}"), None);
        (queue["policy"] == "limit").then_some(())
    });
    client.peer.send(DEAD_LETTERS_QUEUE, b"there is no room");
}

/// Why a service is not ready.
fn why_not_ready(service: &Service, text: &str) {
    eventually(&format!("not ready: {text}"), || {
        let (ready, body) = service.readiness()?;
        (!ready && body.to_string().contains(text)).then_some(())
    });
}

fn one_job_goes_through(client: &Client, worker: &Worker) {
    let job = client.submit("workflow_1");
    let task = worker.take();
    assert_eq!(task.job, job);
    worker.succeed(&task, OUTPUT);
    assert_eq!(client.outcome(job).0, ResultType::Succeeded);
}

/// The next letter of a queue that may not be there yet.
fn next_letter(deployment: &Deployment, vhost: &str) -> Taken {
    eventually("a dead letter", || {
        let path = format!("queues/{vhost}");
        let queues = management("GET", &path, None);
        let mut queues = queues.as_array()?.iter();
        queues.find(|queue| queue["name"] == DEAD_LETTERS_QUEUE)?;
        Peer::new(deployment, vhost).poll(DEAD_LETTERS_QUEUE)
    })
}

#[test]
fn dead_letters_whose_queue_was_deleted_go_into_a_new_one() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let sides = [
        (&client.peer, deployment.sdk_vhost(), "job_submissions"),
        (
            &worker.peer,
            deployment.celery_vhost(),
            "omotes_task_result_events",
        ),
    ];
    for (peer, vhost, queue) in sides {
        peer.send(queue, b"\xffbefore");
        assert_eq!(peer.next(DEAD_LETTERS_QUEUE).body, b"\xffbefore");
        peer.delete_queue(DEAD_LETTERS_QUEUE);
        peer.send(queue, b"\xffafter");
        assert_eq!(next_letter(&deployment, &vhost).body, b"\xffafter");
    }
    one_job_goes_through(&client, &worker);
    assert_one_session(&service);
}

#[test]
fn a_message_whose_dead_letter_is_not_taken_waits_for_room() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let vhost = deployment.sdk_vhost();
    fill_dead_letters(&client, &vhost);
    let service = deployment.start_single_file();
    client.peer.send("job_submissions", b"\xffbad");
    let line = "omotes_dead_letters of the SDK vhost: it takes nothing more";
    service.logged(line);
    why_not_ready(&service, line);
    // Before it and after it, in the same batch and in others.
    client.peer.send("job_submissions", b"\xffworse");
    one_job_goes_through(&client, &worker);
    assert_eq!(service.log().matches(line).count(), 1);

    // Room for one, then for the other.
    let bodies: Vec<_> = (0..3)
        .map(|_| client.peer.next(DEAD_LETTERS_QUEUE).body)
        .collect();
    assert_eq!(bodies[0], b"there is no room");
    assert!(bodies.contains(&b"\xffbad".to_vec()), "{bodies:?}");
    assert!(bodies.contains(&b"\xffworse".to_vec()), "{bodies:?}");
    service.logged("omotes_dead_letters of the SDK vhost: nothing waits for it any more");
    service.wait_until_ready();
    assert_one_session(&service);
    assert!(service.stop().success());
    assert_eq!(client.peer.queue_length("job_submissions"), 0);
}

#[test]
fn a_job_whose_messages_dead_letter_waits_is_answered_at_once() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    fill_dead_letters(&client, &deployment.sdk_vhost());
    let service = deployment.start();
    let (job, submission) = client.submission("workflow_1");
    client.listen(job);
    let mut body = submission.encode_to_vec();
    body.truncate(body.len() - 3);
    client.peer.send("job_submissions", &body);
    assert_eq!(client.outcome(job).0, ResultType::Error);
    deployment.no_jobs_left();
    service.logged("it takes nothing more");
    client.peer.next(DEAD_LETTERS_QUEUE);
    assert_eq!(client.peer.next(DEAD_LETTERS_QUEUE).body, body);
    // Not told again with the letter.
    assert_eq!(client.peer.queue_length(&format!("jobs.{job}.result")), 0);
    assert_one_session(&service);
}

/// More than RabbitMQ hands out before something is acknowledged, by their number or by their size.
#[rstest]
#[case::many(400, 10)]
#[case::large(40, 1024 * 1024)]
fn a_flood_whose_dead_letters_are_not_taken_lets_others_through(
    #[case] messages: u32,
    #[case] bytes: usize,
) {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let vhost = deployment.sdk_vhost();
    fill_dead_letters(&client, &vhost);
    let service = deployment.start();
    let job = client.submit("workflow_1");
    worker.take();
    // A copy must not go to others each time that it goes round.
    let copies = AmqpValue::FieldArray(vec![AmqpValue::LongString("copies".to_owned())]);
    let headers = FieldTable::from([("CC".to_owned(), copies)]);
    client.peer.declare("copies");
    let bad = vec![b'\xff'; bytes];
    for _ in 0..messages {
        client
            .peer
            .send_with("job_deletions", &bad, headers.clone());
    }
    client.cancel(job);
    assert_eq!(client.outcome(job).0, ResultType::Cancelled);
    one_job_goes_through(&client, &worker);
    why_not_ready(&service, "it takes nothing more");

    unlimit_dead_letters(&vhost);
    eventually("all letters", || {
        (client.peer.queue_length(DEAD_LETTERS_QUEUE) == messages + 1).then_some(())
    });
    service.wait_until_ready();
    assert_eq!(client.peer.queue_length("copies"), messages);
    assert_one_session(&service);
    assert!(service.stop().success());
    assert_eq!(client.peer.queue_length("job_deletions"), 0);
    assert_eq!(
        client.peer.queue_length(DEAD_LETTERS_QUEUE),
        messages + 1,
        "each once"
    );
}

/// As after an upgrade of RabbitMQ to one that takes less.
#[test]
fn a_message_above_a_lowered_limit_has_a_dead_letter_of_its_beginning() {
    let deployment = Deployment::with_own_servers();
    let client = Client::new(&deployment);
    let body = vec![b'\xff'; 1024 * 1024];
    client.peer.send_as("job_submissions", &body, "large");
    deployment.limit_messages(256 * 1024);
    let service = deployment.start();
    let letter = client.peer.next(DEAD_LETTERS_QUEUE);
    assert_eq!(letter.body, body[..letter.body.len()]);
    assert!(letter.body.len() >= 1000, "{}", letter.body.len());
    match letter.header("cut") {
        AmqpValue::LongString(cut) => {
            assert!(cut.contains("of 1048576 bytes"), "{cut}");
            assert!(cut.contains("larger than configured max size"), "{cut}");
        }
        other => panic!("{other:?}"),
    }
    assert_one_session(&service);
    assert!(service.stop().success());
    assert_eq!(client.peer.queue_length("job_submissions"), 0);
}

/// How RabbitMQ treats a durable queue whose node in a cluster is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Down {
    /// It knows that, so what is published is returned, and whoever asks is told at once.
    Known,
    /// It looks for its process, as it does right after the node's end, and as RabbitMQ that
    /// has Khepri does: it rejects what is published, and whoever asks waits for a minute.
    Presumed,
}

impl Down {
    /// As far as RabbitMQ still has it: one that has Khepri never knows.
    fn as_here(self) -> Down {
        if has_khepri() { Down::Presumed } else { self }
    }
}

/// Runs Erlang code about a queue's name, `N`, with what reads and writes RabbitMQ's record of it.
fn change_record(deployment: &Deployment, vhost: &str, queue: &str, change: &str) {
    let read_and_write = if has_khepri() {
        "Read = fun(Name) -> {ok, Q} = rabbit_db_queue:get(Name), Q end, \
         Write = fun(Q) -> rabbit_db_queue:set(Q) end"
    } else {
        "Read = fun(Name) -> [Q] = mnesia:dirty_read(rabbit_queue, Name), Q end, \
         Write = fun(Q) -> mnesia:dirty_write(rabbit_queue, Q) end"
    };
    let code = format!(
        "N = rabbit_misc:r(<<\"{vhost}\">>, queue, <<\"{queue}\">>), {read_and_write}, {change}."
    );
    deployment.rabbitmqctl(&["eval", &code]);
}

fn take_down(deployment: &Deployment, vhost: &str, queue: &str, down: Down) {
    let change = match down {
        Down::Known => "mnesia:dirty_delete(rabbit_queue, N)",
        Down::Presumed => "Write(amqqueue:set_pid(Read(N), spawn(fun() -> ok end)))",
    };
    let change = format!("persistent_term:put(N, Read(N)), {change}");
    change_record(deployment, vhost, queue, &change);
}

/// Lets a queue's process die of the next message, and another one take its place at once.
fn let_crash(deployment: &Deployment, vhost: &str, queue: &str) {
    let change = "Whole = Read(N), \
         Dies = fun() -> receive {'$gen_cast', C} when element(1, C) =:= deliver -> \
            Write(Whole), exit(crashed) end end, \
         Write(amqqueue:set_pid(Whole, spawn(Dies)))";
    change_record(deployment, vhost, queue, change);
}

fn bring_up(deployment: &Deployment, vhost: &str, queue: &str) {
    change_record(deployment, vhost, queue, "Write(persistent_term:get(N))");
}

#[rstest]
#[case(Down::Known)]
#[case(Down::Presumed)]
fn a_task_queue_whose_node_is_down_holds_up_its_own_jobs_alone(#[case] down: Down) {
    let down = down.as_here();
    let deployment = Deployment::with_own_servers();
    let client = Client::new(&deployment);
    let one = Worker::new(&deployment, "workflow_1");
    let two = Worker::new(&deployment, "workflow_2");
    take_down(&deployment, &deployment.celery_vhost(), "workflow_1", down);
    let service = deployment.start_single_file();
    let waiting = client.submit("workflow_1");
    let line = "the task queue \"workflow_1\": it is not available: ";
    assert_tells_why(&service.logged(line), down);
    why_not_ready(&service, "workflow_1");
    let job = client.submit("workflow_2");
    assert_eq!(two.take().job, job);
    client.hears_nothing(waiting);
    bring_up(&deployment, &deployment.celery_vhost(), "workflow_1");
    assert_eq!(one.take().job, waiting);
    assert_eq!(client.status(waiting), JobStatus::Enqueued);
    service.wait_until_ready();
    assert_eq!(service.log().matches(line).count(), 1);

    // It was there when the service declared it.
    take_down(&deployment, &deployment.celery_vhost(), "workflow_1", down);
    let waiting = [client.submit("workflow_1"), client.submit("workflow_1")];
    why_not_ready(&service, "2 messages wait");
    client.cancel(waiting[0]);
    assert_eq!(client.outcome(waiting[0]).0, ResultType::Cancelled);
    let job = client.submit("workflow_2");
    assert_eq!(two.take().job, job);
    bring_up(&deployment, &deployment.celery_vhost(), "workflow_1");
    assert_eq!(one.take().job, waiting[1]);
    service.wait_until_ready();
    assert_eq!(one.waiting(), 0);
    assert_one_session(&service);
    assert!(service.stop().success());
    assert_eq!(client.peer.queue_length("job_submissions"), 0);
}

fn assert_tells_why(line: &str, down: Down) {
    let why = match down {
        Down::Known => "is down or inaccessible",
        Down::Presumed => "RabbitMQ has not answered about it for 3s",
    };
    assert!(line.contains(why), "{line}");
}

#[rstest]
#[case::told_at_once("0", false, 0, Down::Known)]
#[case::rejected("0", false, 0, Down::Presumed)]
// What is more than may wait goes back to its queue, but no message that waits without its body.
#[case::after_a_wait("10000", true, 9 * 1024 * 1024, Down::Known)]
fn a_result_waits_for_its_clients_queue_whose_node_is_down(
    #[case] outcome_delay: &str,
    #[case] another_looks_on: bool,
    #[case] size: usize,
    #[case] state: Down,
) {
    let state = state.as_here();
    let deployment = Deployment::with_own_servers();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let variables = [
        ("HANDLER_THREADS", "1"),
        ("OUTCOME_DELAY_MS", outcome_delay),
        ("OUTCOME_LOST_SEC", "1"),
        ("TIMEOUT_JOB_MANAGER_START_BUFFER_SEC", "0"),
    ];
    let looks = |period| [&variables[..], &[("TIMEOUT_JOB_HANDLER_RERUN_SEC", period)]].concat();
    let [often, seldom] = ["1", "10000"].map(looks);
    let service = deployment.start_with(if another_looks_on { &seldom } else { &often });
    let [one, two, cancelled, other, gone] = [(); 5].map(|()| running_job(&client, &worker, None));
    let result_queue = |task: &Task| format!("jobs.{}.result", task.job);
    let vhost = deployment.sdk_vhost();
    let down = [&one, &two, &cancelled].map(result_queue);
    for queue in &down {
        take_down(&deployment, &vhost, queue, state);
    }
    client.peer.delete_queue(&result_queue(&gone));
    let output = format!("<e>{}</e>", " ".repeat(size));
    worker.succeed(&one, &output);
    worker.succeed(&two, &output);
    client.cancel(cancelled.job);
    worker.succeed(&gone, OUTPUT);
    worker.succeed(&other, OUTPUT);
    assert_eq!(client.outcome(other.job).0, ResultType::Succeeded);
    assert_tells_why(&service.logged("queues of clients: jobs."), state);
    why_not_ready(&service, "queues of clients: jobs.");
    // Nobody waits for that of the last but one, which says nothing about the first.
    deployment.comes_to(3, "SELECT count(*) FROM job");
    let sign = "SELECT count(*) FROM pg_locks
                JOIN pg_database ON database = pg_database.oid
                WHERE locktype = 'advisory' AND objsubid = 2 AND objid = 3
                  AND datname = current_database()";
    deployment.comes_to(1, sign);
    // It knows as well that they are not lost.
    let _other = another_looks_on.then(|| deployment.start_with(&often));
    // Long enough for an outcome that nothing brings back.
    let lost = "SELECT count(*) FROM job_history WHERE finished_at < now() - interval '1 second'";
    deployment.at_least(3, lost);
    deployment.looked_for_what_is_due();
    for queue in &down {
        bring_up(&deployment, &vhost, queue);
    }
    for task in [&one, &two] {
        let result = client.result(task.job);
        assert_eq!(result.result_type(), ResultType::Succeeded);
        assert!(result.output_esdl.as_ref() == Some(&output));
    }
    assert_eq!(client.outcome(cancelled.job).0, ResultType::Cancelled);
    deployment.no_jobs_left();
    service.wait_until_ready();
    assert_one_session(&service);
    for queue in [one, two, cancelled, other].iter().map(result_queue) {
        assert_eq!(client.peer.queue_length(&queue), 0, "{queue}");
    }
    assert!(service.stop().success());
    assert_eq!(client.peer.queue_length("job_deletions"), 0);
    assert_eq!(worker.peer.queue_length("omotes_task_result_events"), 0);
}

/// What becomes of the dead letters' own queue must not keep the service from starting.
#[test]
fn dead_letters_declared_otherwise_are_used_as_they_are() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let options = amiquip::QueueDeclareOptions {
        durable: true,
        arguments: FieldTable::from([("x-max-length".to_owned(), AmqpValue::LongInt(1000))]),
        ..Default::default()
    };
    client
        .peer
        .channel
        .queue_declare(DEAD_LETTERS_QUEUE, options)
        .unwrap();
    let service = deployment.start();
    client.peer.send("job_submissions", b"\xff");
    assert_eq!(client.peer.next(DEAD_LETTERS_QUEUE).body, b"\xff");
    assert_one_session(&service);
}

#[rstest]
#[case(Down::Known)]
#[case(Down::Presumed)]
fn dead_letters_whose_queues_node_is_down_hold_up_nobody(#[case] down: Down) {
    let down = down.as_here();
    let deployment = Deployment::with_own_servers();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let sides = [
        (&client.peer, deployment.sdk_vhost(), "job_submissions"),
        (
            &worker.peer,
            deployment.celery_vhost(),
            "omotes_task_result_events",
        ),
    ];
    for (peer, vhost, _) in &sides {
        peer.declare(DEAD_LETTERS_QUEUE);
        take_down(&deployment, vhost, DEAD_LETTERS_QUEUE, down);
    }
    // While it starts, and when it has found the queues.
    let service = deployment.start_single_file();
    let waiting = "omotes_dead_letters of the SDK vhost: it is not available: ";
    for round in [&b"\xfffirst"[..], b"\xffthen"] {
        for (peer, _, queue) in &sides {
            peer.send(queue, round);
        }
        why_not_ready(&service, waiting);
        one_job_goes_through(&client, &worker);
        for (peer, vhost, _) in &sides {
            bring_up(&deployment, vhost, DEAD_LETTERS_QUEUE);
            assert_eq!(peer.next(DEAD_LETTERS_QUEUE).body, round);
        }
        service.wait_until_ready();
        for (_, vhost, _) in &sides {
            take_down(&deployment, vhost, DEAD_LETTERS_QUEUE, down);
        }
    }
    assert_tells_why(&service.logged(waiting), down);
    assert_one_session(&service);
    assert!(service.stop().success());
}

#[test]
fn a_task_that_its_queue_rejects_is_sent_again_unless_that_is_full() {
    let deployment = Deployment::with_own_servers();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    // All tasks by the same handler, which knows the queue.
    let service = deployment.start_single_file();
    one_job_goes_through(&client, &worker);
    let vhost = deployment.celery_vhost();
    let_crash(&deployment, &vhost, "workflow_1");
    let job = client.submit("workflow_1");
    assert_eq!(client.status(job), JobStatus::Enqueued);
    assert_eq!(worker.take().job, job);

    let full = r#"{"max-length": 1, "overflow": "reject-publish"}"#;
    deployment.rabbitmqctl(&["set_policy", "-p", &vhost, "full", "^workflow_1$", full]);
    let taken = client.submit("workflow_1");
    assert_eq!(client.status(taken), JobStatus::Enqueued);
    let refused = client.submit("workflow_1");
    let (result_type, logs) = client.outcome(refused);
    assert_eq!(result_type, ResultType::Error);
    let why = "the task queue \"workflow_1\" takes nothing more";
    assert!(logs.contains(why), "{logs}");
    assert_eq!(worker.take().job, taken);
    assert_one_session(&service);
}

/// It belonged to a replica whose node of the cluster went down.
#[test]
fn a_queue_of_requests_whose_node_is_down_holds_up_nobody() {
    let deployment = Deployment::with_own_servers();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let vhost = deployment.sdk_vhost();
    client.peer.declare(WORKFLOW_REQUESTS_KEY);
    take_down(&deployment, &vhost, WORKFLOW_REQUESTS_KEY, Down::Presumed);
    let service = deployment.start();
    let line = service.logged("request_available_workflows: not ours for now");
    assert_tells_why(&line, Down::Presumed);
    one_job_goes_through(&client, &worker);
    bring_up(&deployment, &vhost, WORKFLOW_REQUESTS_KEY);
    service.logged("requests that are sent to request_available_workflows are answered here");
    assert_one_session(&service);
    assert!(service.stop().success());
}

#[test]
fn what_rabbitmq_does_not_say_a_word_about_is_told() {
    let deployment = Deployment::with_own_servers();
    let client = Client::new(&deployment);
    let vhost = deployment.sdk_vhost();
    take_down(&deployment, &vhost, "job_deletions", Down::Presumed);
    let service = deployment.launch(&[]);
    let line = service.logged("still no session with RabbitMQ");
    assert!(line.contains("not done within 30s"), "{line}");
    assert!(
        line.contains("declaring the queue \"job_deletions\""),
        "{line}"
    );
    bring_up(&deployment, &vhost, "job_deletions");
    service.wait_until_ready();
    drop(client);
}
