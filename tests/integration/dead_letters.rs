//! The command that looks after dead letters.

use std::fs;
use std::process::Output;

use amiquip::{AmqpProperties, AmqpValue, Exchange, FieldTable, Publish, QueueDeclareOptions};
use omotes_orchestrator::wire::DEAD_LETTERS_QUEUE;

use crate::acting::{ACCOUNTS, ANNA};
use crate::harness::deployment::{Deployment, eventually};
use crate::harness::operator::Operator;
use crate::harness::peers::{Client, Worker};

fn run(deployment: &Deployment, arguments: &[&str]) -> Output {
    let arguments = [&["dead-letters"], arguments].concat();
    deployment.command(&arguments).output().unwrap()
}

/// What a command that succeeds has said.
fn said(deployment: &Deployment, arguments: &[&str]) -> String {
    let output = run(deployment, arguments);
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    text
}

/// What a command that fails has said.
fn fault(deployment: &Deployment, arguments: &[&str]) -> String {
    let output = run(deployment, arguments);
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

/// The letters of `list`, once there are so many, with one space between their columns.
fn list(deployment: &Deployment, letters: usize) -> Vec<String> {
    eventually("the dead letters", || {
        let lines = rows(&run(deployment, &["list"]));
        (lines.len() == letters).then_some(lines)
    })
}

/// What a command lists below its header.
fn rows(output: &Output) -> Vec<String> {
    let list = str::from_utf8(&output.stdout).unwrap();
    let mut lines = list.lines().map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.join(" ")
    });
    if let Some(header) = lines.next() {
        assert_eq!(header, "ID TIME CONNECTION QUEUE BYTES REASON");
    }
    lines.collect()
}

#[test]
fn dead_letters_are_listed_shown_and_dropped() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let _service = deployment.start();
    client.peer.send_as("job_submissions", b"\xff\0\n", "mine");
    let body = [b"\x0a\x03abc".as_slice(), &[7; 1000]].concat();
    worker
        .peer
        .send_as("omotes_task_result_events", &body, "yours");
    let lines = list(&deployment, 2);
    assert!(
        lines[0].contains("Z SDK job_submissions 3 JobSubmission: "),
        "{}",
        lines[0]
    );
    assert!(
        lines[1].contains("Z TASK omotes_task_result_events 1005 TaskResult: "),
        "{}",
        lines[1]
    );

    // To the second.
    let time = lines[0].split(' ').nth(1).unwrap();
    assert_eq!(time.len(), "2026-01-01T00:00:00Z".len(), "{time}");
    let hint = "comes straight back if it is put back";
    assert!(said(&deployment, &["list"]).contains(hint));

    let [mine, yours] = [&lines[0][..8], &lines[1][..8]];
    let shown = said(&deployment, &["show", mine]);
    for line in [
        "queue:      job_submissions (SDK)",
        "reason:     JobSubmission: ",
        "\"message_id\": \"mine\"",
        "body:       3 bytes: \\xff\\x00\\n\n",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    said(&deployment, &["show", yours, "--body", "letter"]);
    assert_eq!(fs::read(deployment.folder.join("letter")).unwrap(), body);

    assert!(fault(&deployment, &["show", "zz"]).contains("there is no dead letter \"zz\""));
    assert!(fault(&deployment, &["drop", ""]).contains("several"));
    assert!(said(&deployment, &["drop", yours]).ends_with(": dropped\n"));
    assert_eq!(list(&deployment, 1), lines[..1]);
    let asked = run(&deployment, &["drop", "--all"]);
    assert_eq!(asked.status.code(), Some(1));
    assert_eq!(rows(&asked), lines[..1]);
    let asked = String::from_utf8(asked.stderr).unwrap();
    assert!(
        asked.contains("would delete 1 dead letter") && asked.contains("--yes"),
        "{asked}"
    );
    list(&deployment, 1);
    said(&deployment, &["drop", "--all", "--yes"]);
    list(&deployment, 0);
}

#[test]
fn dead_letters_go_back_as_they_were() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let worker = Worker::new(&deployment, "workflow_1");
    let service = deployment.start();
    let headers = FieldTable::from([
        ("a text".to_owned(), AmqpValue::LongString("x".to_owned())),
        ("a number".to_owned(), AmqpValue::LongInt(7)),
        (
            "a list".to_owned(),
            AmqpValue::FieldArray(vec![AmqpValue::Boolean(true)]),
        ),
    ]);
    let properties = AmqpProperties::default()
        .with_delivery_mode(2)
        .with_message_id("mine".to_owned())
        .with_content_type("application/protobuf".to_owned())
        .with_content_encoding("none".to_owned())
        .with_correlation_id("correlation".to_owned())
        .with_reply_to("somewhere".to_owned())
        .with_type_("a type".to_owned())
        .with_app_id("an app".to_owned())
        .with_priority(3)
        .with_timestamp(1_767_225_600)
        .with_headers(headers);
    let publish =
        Publish::with_properties(b"\xff", "omotes_task_result_events", properties.clone());
    Exchange::direct(&worker.peer.channel)
        .publish(publish)
        .unwrap();
    client.peer.send("job_deletions", b"\xff");
    list(&deployment, 2);
    assert!(service.stop().success());

    said(&deployment, &["requeue", "--all"]);
    list(&deployment, 0);
    let back = worker.peer.next("omotes_task_result_events");
    assert_eq!(back.body, b"\xff");
    assert_eq!(back.properties, properties);
    assert_eq!(client.peer.next("job_deletions").body, b"\xff");
}

#[test]
fn a_letter_whose_queue_is_gone_or_full_stays() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    client.peer.declare(DEAD_LETTERS_QUEUE);
    let overflow = AmqpValue::LongString("reject-publish".to_owned());
    let options = QueueDeclareOptions {
        arguments: FieldTable::from([
            ("x-max-length".to_owned(), AmqpValue::LongInt(0)),
            ("x-overflow".to_owned(), overflow),
        ]),
        ..QueueDeclareOptions::default()
    };
    client.peer.channel.queue_declare("full", options).unwrap();
    let of_queue = |queue: &str| {
        let queue = AmqpValue::LongString(queue.to_owned());
        FieldTable::from([("queue".to_owned(), queue)])
    };
    for (id, headers) in [
        ("letter-0", of_queue("full")),
        ("letter-1", of_queue("gone")),
        ("letter-2", FieldTable::new()),
    ] {
        let properties = AmqpProperties::default()
            .with_delivery_mode(2)
            .with_message_id(id.to_owned())
            .with_headers(headers);
        let publish = Publish::with_properties(b"x", DEAD_LETTERS_QUEUE, properties);
        Exchange::direct(&client.peer.channel)
            .publish(publish)
            .unwrap();
    }
    list(&deployment, 3);
    let fault = fault(&deployment, &["requeue", "--all"]);
    assert!(
        fault.contains("letter-0: it stays, for the queue \"full\" takes nothing more"),
        "{fault}"
    );
    assert!(
        fault.contains("letter-1: it stays, for there is no queue \"gone\""),
        "{fault}"
    );
    assert!(
        fault.contains("letter-2: it stays, for it does not say which queue"),
        "{fault}"
    );
    list(&deployment, 3);
}

/// What RabbitMQ has given up has the id that its sender has chosen.
#[test]
fn letters_with_one_id_are_not_taken_for_each_other() {
    let deployment = Deployment::new();
    let client = Client::new(&deployment);
    let service = deployment.start_with(&ACCOUNTS);
    list(&deployment, 0);
    let letter = |body: &[u8], priority| {
        let header =
            |name: &str, text: &str| (name.to_owned(), AmqpValue::LongString(text.to_owned()));
        let headers = FieldTable::from([
            header("x-first-death-queue", "a queue"),
            header("x-first-death-reason", "delivery_limit"),
        ]);
        let properties = AmqpProperties::default()
            .with_message_id("twin".to_owned())
            .with_priority(priority)
            .with_headers(headers);
        let publish = Publish::with_properties(body, DEAD_LETTERS_QUEUE, properties);
        let exchange = Exchange::direct(&client.peer.channel);
        exchange.publish(publish).unwrap();
    };
    letter(b"one", 1);
    letter(b"other", 1);
    // Alike but for what it is sent with.
    letter(b"other", 2);
    letter(b"other", 2);
    let lines = list(&deployment, 4);
    let names: Vec<_> = lines
        .iter()
        .map(|line| line.split(' ').next().unwrap())
        .collect();
    assert!(
        names.iter().all(|name| name.starts_with("twin#")),
        "{names:?}"
    );
    assert_eq!(names[2], names[3]);
    for action in ["drop", "requeue", "show"] {
        let fault = fault(&deployment, &[action, "twin"]);
        assert!(
            fault.contains("3 dead letters that differ have the id \"twin\""),
            "{fault}"
        );
        assert!(fault.contains(names[1]), "{fault}");
    }
    let anna = Operator::at(&service, ANNA);
    let sent = anna.send(&[("do", "requeue"), ("letter", "twin")]);
    sent.is(400, "3 dead letters that differ have the id");
    anna.get("/confirm?do=requeue")
        .is(200, "Requeue the 2 that are alike");
    list(&deployment, 4);
    let shown = said(&deployment, &["show", names[0]]);
    assert!(shown.contains("3 bytes: one"), "{shown}");
    let shown = said(&deployment, &["show", names[2]]);
    assert!(shown.contains("copies:     2, alike in all"), "{shown}");
    let dropped = said(&deployment, &["drop", names[1]]);
    assert_eq!(dropped, format!("{}: dropped\n", names[1]));
    let left = list(&deployment, 3);
    assert_eq!([&lines[..1], &lines[2..]].concat(), left);
    // What cannot go back stays, and is told of the right one.
    let stays = fault(&deployment, &["requeue", names[0]]);
    let expected = format!("{}: it stays, for there is no queue", names[0]);
    assert!(stays.contains(&expected), "{stays}");
    said(&deployment, &["drop", names[2]]);
    let left = list(&deployment, 1);
    assert!(left[0].starts_with("twin "), "{left:?}");
    assert!(said(&deployment, &["drop", "tw"]).ends_with("twin: dropped\n"));
}
