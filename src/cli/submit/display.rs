//! What is shown of a job while it goes on, on standard error: standard output is for its result.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use omotes_orchestrator::telemetry::report::{one_line, percent};

use crate::cli::say_aside;

/// A progress bar on a terminal, plain lines elsewhere.
pub(super) struct Display {
    bar: ProgressBar,
}

impl Display {
    pub(super) fn new() -> Display {
        if !stderr().is_terminal() {
            return Display {
                bar: ProgressBar::hidden(),
            };
        }
        let bar = ProgressBar::new(1000);
        let style = ProgressStyle::with_template("{bar:40} {percent:>3} % {elapsed} {msg}")
            .expect("a template without faults");
        bar.set_style(style);
        bar.enable_steady_tick(Duration::from_millis(200));
        Display { bar }
    }

    /// Nothing more is shown, and nothing is left of the bar.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }

    pub(super) fn line(&self, text: &str) {
        if self.bar.is_hidden() {
            say_aside(format_args!("{text}"));
        } else {
            self.bar.println(text);
        }
    }

    pub(super) fn progress(&self, fraction: f64, message: &str) {
        let message = one_line(message);
        if self.bar.is_hidden() {
            say_aside(format_args!("progress {} {message}", percent(fraction)));
        } else {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "clamped to what the bar has"
            )]
            self.bar
                .set_position((fraction.clamp(0.0, 1.0) * 1000.0) as u64);
            self.bar.set_message(message);
        }
    }
}
