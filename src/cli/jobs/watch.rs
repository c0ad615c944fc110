//! `jobs watch`: the list on the whole screen, kept up to date. What a key does is in [`screen`].

use std::io::{self, IsTerminal, Write};
use std::panic;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, after, bounded, select, unbounded};
use crossterm::event::{self, Event};
use crossterm::style::{Attribute, Print, SetAttribute};
use crossterm::terminal::{
    Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use crossterm::{cursor, execute, queue};
use jiff::Timestamp;
use omotes_orchestrator::actions::jobs::cancel;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::{MAX_LIMIT, Page};
use omotes_orchestrator::service::queues::Watch;
use omotes_orchestrator::store::Connection;
use omotes_orchestrator::telemetry::report::one_line;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use uuid::Uuid;

use self::screen::{Line, Screen, Step};
use super::Selection;
use super::list::{self, DEFAULT_LIMIT};
use super::origin::origin;
use crate::cli::{connect_quietly, print_on};

mod screen;

/// Between two looks.
const PERIOD: Duration = Duration::from_secs(2);
/// How often the keyboard is asked; it answers at once when a key is pressed.
const KEYS: Duration = Duration::from_millis(250);

/// # Errors
/// The terminal cannot be used.
pub(super) fn run(config: &Config, list: Selection) -> anyhow::Result<ExitCode> {
    let (signal, signals) = unbounded();
    let mut caught = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let handle = caught.handle();
    // It ends with the process.
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for number in caught.forever() {
                // Its receiver may be gone.
                let _ = signal.send(number);
            }
        })?;
    let outcome = match io::stdout().is_terminal() && io::stdin().is_terminal() {
        true => on_screen(config, list, &signals),
        false => on_paper(config, &list, &signals),
    };
    handle.close();
    outcome
}

/// Prints the list again and again, until somebody has enough of it.
fn on_paper(
    config: &Config,
    list: &Selection,
    signals: &Receiver<i32>,
) -> anyhow::Result<ExitCode> {
    let mut looker = Looker::new(config);
    loop {
        let text = match looker.look(list, list.limit(DEFAULT_LIMIT)) {
            Ok(page) => list::text(&page, list),
            Err(error) => format!("{}\n", one_line(&format!("{error:#}"))),
        };
        if !print_on(&format!("{:.0}\n{text}", Timestamp::now()))? {
            return Ok(ExitCode::SUCCESS);
        }
        select! {
            recv(signals) -> number => return Ok(ended_by(number.ok())),
            recv(after(PERIOD)) -> _ => {}
        }
    }
}

fn ended_by(signal: Option<i32>) -> ExitCode {
    let number = signal.filter(|number| *number != SIGINT);
    match number.and_then(|number| u8::try_from(128 + number).ok()) {
        Some(code) => ExitCode::from(code),
        None => ExitCode::SUCCESS,
    }
}

/// Looks, with connections that may have to be opened again.
struct Looker<'c> {
    config: &'c Config,
    connection: Option<Connection>,
    queues: Option<Watch>,
}

impl Looker<'_> {
    fn new(config: &Config) -> Looker<'_> {
        Looker {
            config,
            connection: None,
            queues: None,
        }
    }

    fn look(&mut self, list: &Selection, limit: u16) -> anyhow::Result<Page> {
        let alive = self.queues.take();
        let alive = alive.filter(|watch| watch.look(self.config, &[]).is_ok());
        self.queues = alive.or_else(|| Watch::open(self.config).ok());
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect_quietly(self.config)?,
        };
        let (page, _) = list::jobs(
            self.config,
            &mut connection,
            self.queues.as_ref(),
            list,
            limit,
        )?;
        // One on which something has failed is not used again.
        self.connection = Some(connection);
        Ok(page)
    }
}

/// What comes in from other threads.
enum News {
    Seen(anyhow::Result<Page>),
    /// What became of a cancel.
    Said(String),
}

fn on_screen(
    config: &Config,
    list: Selection,
    signals: &Receiver<i32>,
) -> anyhow::Result<ExitCode> {
    let limit = list.limit(MAX_LIMIT);
    let wanted = Arc::new(Mutex::new(list.clone()));
    let (news, all_news) = unbounded();
    let (look_now, nudges) = bounded(1);
    let keys = keys()?;
    look_on(config, &wanted, limit, &nudges, &news)?;
    let mut screen = Screen::new(list);
    let terminal = Terminal::enter()?;
    let code = loop {
        draw(&mut screen)?;
        select! {
            recv(signals) -> number => break ended_by(number.ok()),
            recv(keys) -> event => match screen.take(event?) {
                Step::Stay => {}
                Step::End => break ExitCode::SUCCESS,
                Step::Look => {
                    *wanted.lock().unwrap_or_else(PoisonError::into_inner) = screen.list().clone();
                    // One that is on its way covers this too.
                    let _ = look_now.try_send(());
                }
                Step::Cancel(id) => ask_to_end(config, id, &news)?,
            },
            recv(all_news) -> one => match one? {
                News::Seen(Ok(page)) => screen.show(page, Timestamp::now()),
                News::Seen(Err(error)) => screen.say(one_line(&format!("{error:#}"))),
                News::Said(text) => {
                    screen.say(text);
                    let _ = look_now.try_send(());
                }
            },
            recv(after(PERIOD)) -> _ => {}
        }
    };
    drop(terminal);
    Ok(code)
}

/// Reads keys in a thread that ends with the process.
fn keys() -> anyhow::Result<Receiver<Event>> {
    let (key, keys) = unbounded();
    thread::Builder::new()
        .name("keys".to_owned())
        .spawn(move || {
            loop {
                match event::poll(KEYS) {
                    Ok(false) => {}
                    Ok(true) => match event::read() {
                        Ok(event) if key.send(event).is_ok() => {}
                        Ok(_) | Err(_) => return,
                    },
                    Err(_) => return,
                }
            }
        })?;
    Ok(keys)
}

/// Looks periodically, and on each of the `nudges`, in a thread that ends with the process: neither
/// Postgres nor RabbitMQ holds up a key.
fn look_on(
    config: &Config,
    wanted: &Arc<Mutex<Selection>>,
    limit: u16,
    nudges: &Receiver<()>,
    news: &Sender<News>,
) -> anyhow::Result<()> {
    let (config, wanted) = (config.clone(), Arc::clone(wanted));
    let (nudges, news) = (nudges.clone(), news.clone());
    thread::Builder::new()
        .name("look".to_owned())
        .spawn(move || {
            let mut looker = Looker::new(&config);
            loop {
                let list = wanted
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                if news.send(News::Seen(looker.look(&list, limit))).is_err() {
                    return;
                }
                // Its sender may be gone, which the next send tells.
                let _ = nudges.recv_timeout(PERIOD);
            }
        })?;
    Ok(())
}

fn ask_to_end(config: &Config, id: Uuid, news: &Sender<News>) -> anyhow::Result<()> {
    let (config, news) = (config.clone(), news.clone());
    thread::Builder::new()
        .name("cancel".to_owned())
        .spawn(move || {
            let asked = connect_quietly(&config)
                .and_then(|connection| Ok(cancel(&config, connection, &[id], &origin())?));
            let said = match asked {
                Ok(became) => became.iter().map(ToString::to_string).collect(),
                Err(error) => one_line(&format!("{error:#}")),
            };
            // The screen may be gone.
            let _ = news.send(News::Said(said));
        })?;
    Ok(())
}

/// The terminal as this needs it; as it was once this is dropped, or something panics.
struct Terminal;

impl Terminal {
    fn enter() -> anyhow::Result<Terminal> {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |what| {
            restore();
            before(what);
        }));
        enable_raw_mode()?;
        let terminal = Terminal;
        execute!(io::stdout(), EnterAlternateScreen, cursor::Hide)?;
        Ok(terminal)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // There is nobody to tell.
    let _ = execute!(io::stdout(), cursor::Show, LeaveAlternateScreen);
    let _ = disable_raw_mode();
}

fn draw(screen: &mut Screen) -> anyhow::Result<()> {
    let (columns, rows) = crossterm::terminal::size()?;
    let lines = screen.lines(columns, rows, Timestamp::now());
    let mut out = io::stdout().lock();
    for (row, line) in (0..rows).zip(lines) {
        queue!(out, cursor::MoveTo(0, row))?;
        match line {
            Line::Plain(text) => queue!(out, Print(text))?,
            Line::Marked(text) => queue!(
                out,
                SetAttribute(Attribute::Reverse),
                Print(text),
                SetAttribute(Attribute::Reset)
            )?,
            Line::Dim(text) => queue!(
                out,
                SetAttribute(Attribute::Dim),
                Print(text),
                SetAttribute(Attribute::Reset)
            )?,
        }
        queue!(out, Clear(ClearType::UntilNewLine))?;
    }
    out.flush()?;
    Ok(())
}
