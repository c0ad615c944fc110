//! Where the output of a job is, as far as that is known: a confirm of RabbitMQ's means that it is in the
//! client's queue, and nothing more.

use std::time::Duration;

use jiff::Timestamp;

use super::{JobState, JobView};
use crate::domain::job::Outcome;

/// What became of a result when its client was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// RabbitMQ has confirmed it.
    Queued,
    NoQueue,
    /// The same when it was told once more: it may have been there before.
    NoQueueAgain,
    FullQueue,
    /// RabbitMQ has not taken it; its client was told of an error.
    Refused,
}

impl Delivery {
    pub const ALL: &[Delivery] = &[
        Delivery::Queued,
        Delivery::NoQueue,
        Delivery::NoQueueAgain,
        Delivery::FullQueue,
        Delivery::Refused,
    ];

    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            Delivery::Queued => "QUEUED",
            Delivery::NoQueue => "NO_QUEUE",
            Delivery::NoQueueAgain => "NO_QUEUE_AGAIN",
            Delivery::FullQueue => "FULL_QUEUE",
            Delivery::Refused => "REFUSED",
        }
    }

    /// Why it is not in its client's queue.
    fn obstacle(self) -> Option<&'static str> {
        match self {
            Delivery::Queued => None,
            Delivery::NoQueue => Some("its client's queue was gone"),
            Delivery::NoQueueAgain => Some(
                "its client's queue was gone when it was told once more after an interruption, so it \
                 may have it",
            ),
            Delivery::FullQueue => Some("its client's queue took nothing more"),
            Delivery::Refused => Some("RabbitMQ did not take it"),
        }
    }
}

/// What RabbitMQ says of a client's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientQueue {
    Gone,
    /// It is one connection's alone, which is there.
    Locked,
    Empty,
    /// Empty, and somebody takes what comes.
    Heard,
    /// The result is in it.
    Full,
}

impl ClientQueue {
    /// What it says of the client of a job: whether it listens or, of a job that has ended, has the result. Of
    /// one that has succeeded [`Whereabouts::sentence`] says that.
    pub(super) fn sentence(self, job: &JobView, delivery: Option<Delivery>) -> Option<String> {
        let is_told = job.ends.is_told && delivery == Some(Delivery::Queued);
        let sentence = match (job.state, self) {
            (JobState::Live(_), ClientQueue::Heard) => "It listens for the result.",
            (JobState::Live(_), ClientQueue::Locked) => {
                "It is connected: nobody else may look into its queue."
            }
            (JobState::Live(_), ClientQueue::Empty) => {
                "It does not listen just now: the result will wait in its queue."
            }
            (JobState::Live(_), ClientQueue::Full) => {
                "It has not taken what is in its queue already."
            }
            (JobState::Live(_), ClientQueue::Gone) => {
                "It has no queue for the result: nobody waits for that."
            }
            (JobState::Ended(Outcome::Succeeded), _) => return None,
            (JobState::Ended(_), _) if !is_told => return None,
            (JobState::Ended(_), ClientQueue::Full) => {
                let since = job.finished_at?;
                return Some(format!(
                    "It has not taken the result, which waits in its queue since {since:.0}."
                ));
            }
            (JobState::Ended(_), ClientQueue::Empty | ClientQueue::Heard) => {
                "It has taken the result from its queue."
            }
            (JobState::Ended(_), ClientQueue::Gone) => {
                "Its queue is gone by now, as a rule because it has the result."
            }
            (JobState::Ended(_), ClientQueue::Locked) => return None,
        };
        Some(sentence.to_owned())
    }
}

/// An output ESDL that is kept here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    pub at: Timestamp,
    pub bytes: i64,
}

/// What is known of where a job's output is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Whereabouts {
    /// None in rows of earlier versions.
    pub delivery: Option<Delivery>,
    pub kept: Option<Kept>,
}

impl Whereabouts {
    /// Says it, where outputs are kept for this time and the queue has been looked at or not; nothing of a
    /// job that has no output, as far as is known.
    pub(super) fn sentence(
        self,
        job: &JobView,
        keeps: Duration,
        queue: Option<ClientQueue>,
    ) -> Option<String> {
        if let Some(kept) = self.kept {
            return Some(self.of_kept(kept, keeps));
        }
        let JobState::Ended(outcome) = job.state else {
            return None;
        };
        let delivery = self.delivery?;
        if let Some(obstacle) = delivery.obstacle() {
            let had_output = outcome == Outcome::Succeeded || delivery == Delivery::Refused;
            let never = match keeps.is_zero() {
                true => ", for KEEP_RESULTS_SEC is 0",
                false => "",
            };
            return had_output.then(|| format!("It is not kept here{never}, and {obstacle}."));
        }
        if outcome != Outcome::Succeeded {
            return None;
        }
        if !job.ends.is_told {
            return Some("Its client may not have been told yet.".to_owned());
        }
        let since = job.finished_at?;
        Some(match queue {
            Some(ClientQueue::Full) => format!(
                "It has waited in RabbitMQ, in its client's queue, since {since:.0}: nobody has taken it."
            ),
            Some(ClientQueue::Empty | ClientQueue::Heard) => {
                format!(
                    "Its client has taken it from its queue, into which it was put at {since:.0}."
                )
            }
            Some(ClientQueue::Gone) => format!(
                "It was put into its client's queue at {since:.0}, and that is gone by now, as a rule \
                 because its client has it."
            ),
            Some(ClientQueue::Locked) | None => format!(
                "It was put into its client's queue at {since:.0}; whether its client has taken it from \
                 there is not known here."
            ),
        })
    }

    fn of_kept(self, kept: Kept, keeps: Duration) -> String {
        let Kept { at, bytes } = kept;
        let until = match at.checked_add(keeps) {
            Ok(until) if !keeps.is_zero() => format!(", until {until:.0}"),
            Ok(_) | Err(_) => String::new(),
        };
        let why = self.delivery.and_then(Delivery::obstacle);
        let why = why.unwrap_or("nobody has taken it");
        format!("It is kept here, {bytes} bytes{until}: {why}.")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::overview::tests::waiting;
    use rstest::rstest;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn succeeded() -> JobView {
        let mut job = waiting(1);
        job.state = JobState::Ended(Outcome::Succeeded);
        job.finished_at = Some(at(0));
        job.ends.is_told = true;
        job
    }

    const KEPT: Option<Kept> = Some(Kept {
        at: Timestamp::UNIX_EPOCH,
        bytes: 7,
    });

    #[rstest]
    #[case::an_earlier_version(None, None, None, None)]
    #[case::unknown(
        Some(Delivery::Queued),
        None,
        None,
        Some(
            "It was put into its client's queue at 1970-01-01T00:00:00Z; whether its client has taken it \
              from there is not known here."
        )
    )]
    #[case::waits(
        Some(Delivery::Queued),
        None,
        Some(ClientQueue::Full),
        Some(
            "It has waited in RabbitMQ, in its client's queue, since 1970-01-01T00:00:00Z: nobody has \
              taken it."
        )
    )]
    #[case::taken(
        Some(Delivery::Queued),
        None,
        Some(ClientQueue::Empty),
        Some(
            "Its client has taken it from its queue, into which it was put at 1970-01-01T00:00:00Z."
        )
    )]
    #[case::gone(
        Some(Delivery::Queued),
        None,
        Some(ClientQueue::Gone),
        Some(
            "It was put into its client's queue at 1970-01-01T00:00:00Z, and that is gone by now, as a \
              rule because its client has it."
        )
    )]
    #[case::kept(
        Some(Delivery::NoQueue),
        KEPT,
        None,
        Some("It is kept here, 7 bytes, until 1970-01-01T00:10:00Z: its client's queue was gone.")
    )]
    #[case::kept_by_an_earlier_version(
        None,
        KEPT,
        None,
        Some("It is kept here, 7 bytes, until 1970-01-01T00:10:00Z: nobody has taken it.")
    )]
    #[case::kept_no_more(
        Some(Delivery::FullQueue),
        None,
        None,
        Some("It is not kept here, and its client's queue took nothing more.")
    )]
    fn what_is_known_is_said(
        #[case] delivery: Option<Delivery>,
        #[case] kept: Option<Kept>,
        #[case] queue: Option<ClientQueue>,
        #[case] expected: Option<&str>,
    ) {
        let keeps = Duration::from_secs(600);
        let whereabouts = Whereabouts { delivery, kept };
        let sentence = whereabouts.sentence(&succeeded(), keeps, queue);
        assert_eq!(sentence.as_deref(), expected);
    }

    #[rstest]
    #[case::listens(ClientQueue::Heard, "It listens", None)]
    #[case::is_away(
        ClientQueue::Empty,
        "It does not listen just now",
        Some("It has taken the result")
    )]
    #[case::has_taken_nothing(
        ClientQueue::Full,
        "It has not taken what",
        Some("It has not taken the result")
    )]
    #[case::is_nowhere(ClientQueue::Gone, "It has no queue", Some("Its queue is gone by now"))]
    #[case::lets_nobody_look(ClientQueue::Locked, "It is connected", None)]
    fn a_clients_queue_says_whether_it_listens(
        #[case] queue: ClientQueue,
        #[case] live: &str,
        #[case] ended: Option<&str>,
    ) {
        let sentence = queue.sentence(&waiting(1), None).unwrap();
        assert!(sentence.starts_with(live), "{sentence}");
        let mut failed = succeeded();
        assert_eq!(queue.sentence(&failed, Some(Delivery::Queued)), None);
        failed.state = JobState::Ended(Outcome::Failed);
        if let Some(ended) = ended {
            let sentence = queue.sentence(&failed, Some(Delivery::Queued)).unwrap();
            assert!(sentence.starts_with(ended), "{sentence}");
        }
        // It was told nothing that could be there.
        assert_eq!(queue.sentence(&failed, Some(Delivery::NoQueue)), None);
        assert_eq!(queue.sentence(&failed, None), None);
    }

    #[test]
    fn a_job_without_an_output_has_it_nowhere() {
        let whereabouts = |delivery| Whereabouts {
            delivery: Some(delivery),
            kept: None,
        };
        let failed = JobView {
            state: JobState::Ended(Outcome::Failed),
            ..succeeded()
        };
        let sentence =
            |delivery, job: &JobView| whereabouts(delivery).sentence(job, Duration::ZERO, None);
        assert_eq!(sentence(Delivery::Queued, &failed), None);
        assert_eq!(sentence(Delivery::NoQueue, &failed), None);
        let refused = sentence(Delivery::Refused, &failed).unwrap();
        assert!(refused.contains("RabbitMQ did not take it"), "{refused}");
        let mut untold = succeeded();
        untold.ends.is_told = false;
        let untold = sentence(Delivery::Queued, &untold).unwrap();
        assert!(untold.contains("may not have been told"), "{untold}");
    }
}
