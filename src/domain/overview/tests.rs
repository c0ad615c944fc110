use super::*;
use rstest::rstest;

#[rstest]
#[case(-3, "0 s")]
#[case(59, "59 s")]
#[case(60, "1 min")]
#[case(200, "3 min 20 s")]
#[case(600, "10 min")]
#[case(7259, "2 h")]
#[case(7500, "2 h 5 min")]
#[case(90_000, "1 d 1 h")]
fn times_are_spoken(#[case] seconds: i64, #[case] expected: &str) {
    assert_eq!(spoken(SignedDuration::from_secs(seconds)), expected);
}

#[rstest]
#[case::nothing("", Filter::default())]
#[case::empty_fields("text=&state=&workflow=", Filter::default())]
#[case::all(
    "text=a+b%25&state=running&workflow=simulator&limit=7&offset=14",
    Filter {
        text: Some("a b%".to_owned()),
        state: Some(JobState::Live(JobStatus::Running)),
        workflow: Some("simulator".to_owned()),
        limit: 7,
        offset: 14,
        ..Filter::default()
    }
)]
#[case::an_outcome_is_of_finished_jobs(
    "state=SUCCEEDED",
    Filter {
        finished: true,
        state: Some(JobState::Ended(Outcome::Succeeded)),
        ..Filter::default()
    }
)]
fn a_query_is_a_filter_and_back(#[case] query: &str, #[case] expected: Filter) {
    let filter = Filter::parse(query).unwrap();
    assert_eq!(filter, expected);
    assert_eq!(
        Filter::parse(&filter.query(filter.offset)).unwrap(),
        expected
    );
}

#[rstest]
#[case("state=done", "state=done: expected one of REGISTERED")]
#[case("limit=0", "limit=0: expected a number from 1 to 1000")]
#[case("offset=-1", "offset=-1: expected a whole number")]
#[case("finished=yes", "finished=yes: expected true or false")]
#[case("order=up", "order is not known here")]
fn a_faulty_query_is_told(#[case] query: &str, #[case] error: &str) {
    let found = Filter::parse(query).unwrap_err();
    assert!(found.starts_with(error), "{found}");
}

/// At a place of its queue, of which nothing else is known.
pub(super) fn waiting(position: i64) -> JobView {
    JobView {
        id: Uuid::nil(),
        reference: String::new(),
        workflow: Some("simulator".to_owned()),
        state: JobState::Live(JobStatus::Submitted),
        priority: None,
        task_id: None,
        queue: None,
        registered_at: None,
        submitted_at: None,
        running_at: None,
        finished_at: None,
        timeout_ms: None,
        starts: 0,
        progress: None,
        result_bytes: None,
        position: Some(position),
        estimate: None,
        too_few_runs: None,
        concern: None,
        step: None,
        turn: None,
        granted_at: None,
        ends: End::default(),
        why: None,
    }
}

#[test]
fn jobs_are_estimated_by_their_place_and_what_runs() {
    let at = |second| Timestamp::from_second(second).unwrap();
    let run = Duration::from_secs(100);
    let rows = WorkflowRows {
        elapsed: vec![Duration::from_secs(40)],
        runs: Runs::new(vec![run; 5]),
        ..WorkflowRows::default()
    };
    let mut overview = Overview {
        rows: BTreeMap::from([("simulator".to_owned(), rows)]),
        ..Overview::default()
    };
    let running = JobView {
        state: JobState::Live(JobStatus::Running),
        running_at: Some(at(0)),
        position: None,
        ..waiting(0)
    };
    let mut jobs = [running, waiting(1), waiting(3)];
    let span = |seconds| {
        let time = Duration::from_secs(seconds);
        Some(Span {
            median: time,
            p90: time,
        })
    };
    // Nobody knows of workers.
    overview.estimate(&mut jobs, at(40));
    assert_eq!(jobs[0].estimate.unwrap().run, span(60));
    assert_eq!(jobs[1].estimate.unwrap().wait, None);
    overview.queues = Some(Queues {
        at: at(0),
        queues: vec![Queue {
            vhost: Vhost::Celery,
            name: "simulator".to_owned(),
            depth: Some(Depth {
                messages: 3,
                consumers: 1,
            }),
        }],
        without_worker: BTreeMap::new(),
    });
    overview.estimate(&mut jobs, at(40));
    let waits: Vec<_> = jobs.iter().map(|job| job.estimate.unwrap().wait).collect();
    assert_eq!(waits, [None, span(60), span(260)]);
}
