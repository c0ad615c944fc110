//! What somebody has to look at though all parts work: in a few words, for the line that says how all is,
//! and in full, for the box below it.

use jiff::Timestamp;
use maud::html;

use super::layout::Frame;
use super::words::{Matter, command, name, since};
use super::workers;
use crate::domain::overview::{Ambers, JobView, LonelyQueue, Overview, QueueView};
use crate::telemetry::health::Part;
use crate::telemetry::report::harmless;
use crate::wire::DEAD_LETTERS_QUEUE;

/// How many matters the line names.
const SAID: usize = 3;

/// All of them, those first for which somebody has to do something; `jobs` are those that come first of those
/// that have not ended.
pub(super) fn matters(frame: &Frame<'_>, overview: &Overview, jobs: &[JobView]) -> Vec<Matter> {
    let now = frame.now;
    let mut all = Vec::new();
    let lonely = overview.lonely().into_iter();
    all.extend(lonely.map(|queue| without_worker(&queue, now)));
    let mut faults = frame.parts.iter().filter(|part| part.why.is_some());
    // Without RabbitMQ nobody knows.
    let rabbitmq_works = !faults.any(|part| part.part == Part::Broker);
    if let (Some(workers), true) = (overview.seen_workers(now), rabbitmq_works) {
        all.extend(workers::matters(workers, jobs, now));
    }
    let paused = overview.turns.iter();
    let paused = paused.filter(|queue| queue.limit.is_paused && queue.held > 0);
    all.extend(paused.map(|queue| is_paused(queue, frame)));
    all.extend(Ambers::among(jobs, now).iter().map(ambers));
    let queues = overview.queues.as_ref();
    let letters = queues.map_or(0, |queues| queues.messages_in(DEAD_LETTERS_QUEUE));
    if letters > 0 {
        all.push(dead_letters(letters, frame));
    }
    all
}

/// As the line says how all is.
pub(super) fn verdict(matters: &[Matter]) -> String {
    let Some((first, others)) = matters.split_first() else {
        return "All is well.".to_owned();
    };
    // Those that are said alike are said once.
    let mut said = vec![(first.short.as_str(), 1)];
    for Matter { short, .. } in others {
        match said.iter_mut().find(|(one, _)| one == short) {
            Some((_, count)) => *count += 1,
            None => said.push((short, 1)),
        }
    }
    let texts = said.iter().take(SAID).map(|(short, count)| match count {
        1 => (*short).to_owned(),
        several => format!("{short} ({several} times)"),
    });
    let mut text = texts.collect::<Vec<_>>().join("; ");
    if let Some(more @ 1..) = said.len().checked_sub(SAID) {
        text = format!("{text}; and {more} more");
    }
    let mut letters = text.chars();
    let first = letters
        .next()
        .map(|letter| letter.to_uppercase().to_string());
    format!("{}{}.", first.unwrap_or_default(), letters.as_str())
}

fn without_worker(lonely: &LonelyQueue, now: Timestamp) -> Matter {
    let queue = harmless(&lonely.queue);
    Matter {
        short: format!("no worker takes {queue}"),
        full: html! {
            b { (queue) } span.dim { (lonely.users()) } " has no worker, and " (lonely.what_waits())
            @if let Some(oldest) = lonely.oldest {
                @if lonely.waiting == 1 { " for " } @else { ", the oldest for " } (since(oldest, now))
            }
            ". Start one that takes this queue, or see what keeps it away: "
            (command("omotes-orchestrator doctor"))
        },
    }
}

fn is_paused(queue: &QueueView, frame: &Frame<'_>) -> Matter {
    let shown = harmless(&queue.name);
    let resume = format!("omotes-orchestrator workflows resume {shown}");
    Matter {
        short: format!("queue {shown} is paused"),
        full: html! {
            b { (shown) } " is paused by "
            @match (queue.paused_by(), queue.is_paused_by_operator) {
                (Some(pause), _) => (pause.by.name()),
                (None, true) => "an operator",
                (None, false) => "its definition",
            }
            ", and " (queue.held) @if queue.held == 1 { " job waits" } @else { " jobs wait" } " for it. "
            @if frame.acting.is_some() { a href={ "#turns-" (queue.name) } { "Resume it" } " or leave it so." }
            @else { (command(&resume)) }
        },
    }
}

fn ambers(all: &Ambers<'_>) -> Matter {
    let (first, more) = all.named();
    Matter {
        short: format!("{} {}", all.subject(), all.amber.word()),
        full: html! {
            (all.subject()) " " b { (all.amber.word()) } ": "
            @for (place, job) in first.iter().enumerate() {
                @if place > 0 { ", " } a href={ "/jobs/" (job.id) } { (name(job)) }
            }
            @if more > 0 { " and " (more) " more" }
            ". " (all.meaning())
        },
    }
}

fn dead_letters(count: u32, frame: &Frame<'_>) -> Matter {
    let one = count == 1;
    Matter {
        short: format!("{count} dead letter{}", if one { "" } else { "s" }),
        full: html! {
            (count) @if one { " message" } @else { " messages" } " could not be handled. "
            @if frame.acting.is_some() {
                a.button href=(super::LETTERS) { @if one { "See what it is" } @else { "See what they are" } }
            } @else { (command("omotes-orchestrator dead-letters list")) }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_alike_is_said_once() {
        let matter = |short: &str| Matter {
            short: short.to_owned(),
            full: html! {},
        };
        let all = ["a task is lost", "x", "a task is lost", "y", "z"].map(matter);
        assert_eq!(verdict(&all), "A task is lost (2 times); x; y; and 1 more.");
        assert_eq!(verdict(&all[1..2]), "X.");
        assert_eq!(verdict(&[]), "All is well.");
    }
}
