//! `doctor`: what is wrong with a deployment, and what to do about it.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use console::{Style, Term};
use omotes_orchestrator::actions::counted;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::config::environment::Environment;
use omotes_orchestrator::doctor::{Finding, Role, Severity, Switch, examine, sorted, summary};
use omotes_orchestrator::telemetry::report::one_line;

use super::{NOTHING_DONE, print, say, say_aside, told_after_a_while};

#[derive(Args)]
pub(crate) struct Doctor {
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// A command that runs RabbitMQ's rabbitmqctl, for what AMQP does not tell.
    #[arg(long, value_name = "COMMAND")]
    rabbitmqctl: Option<String>,
    /// Also what is to be known before the Python service is replaced by this one (`here`), or this one
    /// by it (`back`), and first whether that may be done now; both where none is named.
    #[arg(
        long,
        value_enum,
        value_name = "DIRECTION",
        num_args = 0..=1,
        require_equals = true
    )]
    before_switch: Option<Option<Direction>>,
    /// Also put right what can be put right without a loss: say what that is, ask, and do it.
    #[arg(long, conflicts_with_all = ["json", "before_switch"])]
    fix: bool,
    /// With --fix: do not ask.
    #[arg(long, requires = "fix")]
    yes: bool,
}

/// The way of a switch.
#[derive(Clone, Copy, ValueEnum)]
enum Direction {
    Here,
    Back,
}

/// # Errors
/// Standard output is gone.
pub(crate) fn run(
    config: &Config,
    environment: &Environment,
    doctor: &Doctor,
) -> anyhow::Result<ExitCode> {
    let near_misses = environment.near_misses();
    let switch = doctor.before_switch.map(switch);
    const NEWS: &str = "still looking: not all that is asked answers at once";
    let findings = told_after_a_while(NEWS, || {
        examine(
            config,
            &near_misses,
            doctor.rabbitmqctl.as_deref(),
            switch.as_ref(),
        )
    });
    if doctor.json {
        print(&(serde_json::to_string_pretty(&findings)? + "\n"))?;
    } else {
        print(&text(&findings))?;
    }
    if doctor.fix {
        return fix(config, &findings, doctor.yes);
    }
    let worst = findings.iter().map(|finding| finding.severity).max();
    Ok(match worst {
        None | Some(Severity::Ok | Severity::Note) => ExitCode::SUCCESS,
        Some(Severity::Warning | Severity::Error) => ExitCode::FAILURE,
    })
}

/// A finding in each line or two: what is wrong, with what others follow from before all, and then what is
/// well. The last line sums it up, for it is what somebody at a terminal sees.
fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    let follow = findings.iter().filter(|one| one.role == Role::Follows);
    let follow = counted(follow.count(), "other finding");
    let (wrong, right) = sorted(findings);
    for finding in &wrong {
        if finding.role == Role::Cause {
            let _ = writeln!(text, "One cause, from which {follow} may follow:");
        }
        add(&mut text, finding);
    }
    if !wrong.is_empty() && !right.is_empty() {
        text.push('\n');
    }
    for finding in &right {
        add(&mut text, finding);
    }
    let counted = findings.iter().filter(|one| one.role != Role::Verdict);
    let worst = counted.map(|one| one.severity).max();
    let last = style(worst.unwrap_or(Severity::Ok)).bold();
    let _ = writeln!(text, "\n{}", last.apply_to(summary(findings)));
    text
}

fn add(text: &mut String, finding: &Finding) {
    let style = style(finding.severity);
    if finding.role == Role::Verdict {
        let _ = writeln!(text, "{}", style.bold().apply_to(&finding.found));
        return;
    }
    let severity = style.apply_to(format!("{:<8}", finding.severity.name()));
    let _ = writeln!(text, "{severity}{:<16}{}", finding.part, finding.found);
    let remedy = match finding.role {
        Role::Verdict | Role::Cause | Role::Own => finding.remedy.as_str(),
        Role::Follows => "Follows from the first.",
    };
    if !remedy.is_empty() {
        let _ = writeln!(text, "{:24}{remedy}", "");
    }
}

fn style(severity: Severity) -> Style {
    match severity {
        Severity::Ok => Style::new().green(),
        Severity::Note => Style::new().cyan(),
        Severity::Warning => Style::new().yellow(),
        Severity::Error => Style::new().red(),
    }
}

/// Says what can be put right, and does it where somebody agrees. Exits with 1 when nothing was done
/// although something could be, or did not work out.
fn fix(config: &Config, findings: &[Finding], yes: bool) -> anyhow::Result<ExitCode> {
    let fixes: BTreeSet<_> = findings.iter().filter_map(|one| one.fix.clone()).collect();
    if fixes.is_empty() {
        say(format_args!("there is nothing that --fix puts right"))?;
        return Ok(ExitCode::SUCCESS);
    }
    for fix in &fixes {
        say(format_args!("--fix would {fix}"))?;
    }
    if !yes && !is_agreed()? {
        say_aside(format_args!("{NOTHING_DONE}"));
        return Ok(ExitCode::FAILURE);
    }
    let mut code = ExitCode::SUCCESS;
    for fix in &fixes {
        match fix.apply(config) {
            Ok(done) => say(format_args!("{done}"))?,
            Err(error) => {
                let error = one_line(&format!("{error:#}"));
                say_aside(format_args!("could not {fix}: {error}"));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// Asks whoever sits at the terminal; nobody does without one.
fn is_agreed() -> anyhow::Result<bool> {
    let terminal = Term::stderr();
    if !terminal.is_term() || !io::stdin().is_terminal() {
        return Ok(false);
    }
    terminal.write_str("Do it? [y/N] ")?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}

/// What is asked of a switch this way, or either way.
fn switch(direction: Option<Direction>) -> Switch {
    Switch {
        may_be_here: !matches!(direction, Some(Direction::Back)),
        may_be_back: !matches!(direction, Some(Direction::Here)),
    }
}
