//! A TCP proxy that does to a connection what networks do.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// How long a server may take to answer a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// How long a pump sleeps at most before it looks at the weather again.
const LOOK: Duration = Duration::from_millis(20);

/// What the network is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    Fair,
    /// What is sent stays somewhere, and nobody hears of it.
    BlackHole,
    /// Everything takes this long in each direction.
    Delay(Duration),
    /// So many bytes per second in each direction of each connection.
    Throttle(u32),
    /// New connections are refused.
    Refuse,
    /// New connections are reset.
    Reset,
}

/// How a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Fin,
    Rst,
}

struct State {
    weather: Weather,
    connections: Vec<Connection>,
    closed: bool,
}

struct Connection {
    client: TcpStream,
    server: TcpStream,
    /// Set when the pumps are to let go of it without a word.
    reset: Arc<AtomicBool>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Where a server listens.
pub struct Target(SocketAddr);

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Target {
        Target(address)
    }
}

/// A port of this machine.
impl From<u16> for Target {
    fn from(port: u16) -> Target {
        Target((Ipv4Addr::LOCALHOST, port).into())
    }
}

/// Forwards connections to a server, until it is dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Proxy {
    pub fn new(target: impl Into<Target>) -> std::io::Result<Proxy> {
        let Target(target) = target.into();
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                weather: Weather::Fair,
                connections: Vec::new(),
                closed: false,
            }),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, target, &accepting));
        Ok(Proxy { shared, address })
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    pub fn set(&self, weather: Weather) {
        self.shared.lock().weather = weather;
        self.shared.changed.notify_all();
    }

    /// Ends all connections, in both directions.
    pub fn cut(&self, end: End) {
        let mut state = self.shared.lock();
        for connection in state.connections.drain(..) {
            for stream in [connection.client, connection.server] {
                // A connection may have ended by itself; then there is nothing to do.
                let _ = match end {
                    End::Fin => stream.shutdown(Shutdown::Both),
                    // Then the last one to close the socket sends a reset.
                    End::Rst => socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)),
                };
            }
            connection.reset.store(end == End::Rst, Ordering::Relaxed);
        }
        // Also of those that keep to themselves what they have read.
        self.shared.changed.notify_all();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        self.cut(End::Fin);
        // Wakes the accepting thread.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weather, once it lets anything through; None when the proxy or the connection is gone.
    fn passable(&self, reset: &AtomicBool) -> Option<Weather> {
        let mut state = self.lock();
        let gone = |state: &State| state.closed || reset.load(Ordering::Relaxed);
        while state.weather == Weather::BlackHole && !gone(&state) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        (!gone(&state)).then_some(state.weather)
    }

    /// Waits unless the proxy is gone.
    fn wait(&self, time: Duration) {
        let state = self.lock();
        if !state.closed {
            drop(
                self.changed
                    .wait_timeout_while(state, time, |state| !state.closed),
            );
        }
    }
}

fn accept(listener: &TcpListener, target: SocketAddr, shared: &Arc<Shared>) {
    for client in listener.incoming() {
        let Ok(client) = client else { continue };
        if shared.lock().closed {
            return;
        }
        let weather = shared.lock().weather;
        match weather {
            Weather::Fair | Weather::BlackHole | Weather::Delay(_) | Weather::Throttle(_) => {}
            Weather::Refuse => continue,
            Weather::Reset => {
                let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
                continue;
            }
        }
        let Ok(server) = TcpStream::connect_timeout(&target, CONNECT) else {
            continue;
        };
        let clone = |stream: &TcpStream| stream.try_clone().ok();
        let (Some(to_client), Some(to_server)) = (clone(&client), clone(&server)) else {
            continue;
        };
        let (Some(kept_client), Some(kept_server)) = (clone(&client), clone(&server)) else {
            continue;
        };
        for stream in [&client, &server] {
            let _ = stream.set_nodelay(true);
            let _ = stream.set_read_timeout(Some(LOOK));
        }
        let reset = Arc::new(AtomicBool::new(false));
        shared.lock().connections.push(Connection {
            client: kept_client,
            server: kept_server,
            reset: Arc::clone(&reset),
        });
        for (from, to) in [(client, to_server), (server, to_client)] {
            let (shared, reset) = (Arc::clone(shared), Arc::clone(&reset));
            thread::spawn(move || pump(from, to, &shared, &reset));
        }
    }
}

/// Forwards one direction of one connection until either end closes.
fn pump(mut from: TcpStream, mut to: TcpStream, shared: &Shared, reset: &AtomicBool) {
    let mut buffer = vec![0; 64 * 1024];
    while let Some(weather) = shared.passable(reset) {
        let size = match weather {
            Weather::Throttle(rate) => (rate as usize / 50).clamp(1, buffer.len()),
            Weather::Fair
            | Weather::BlackHole
            | Weather::Delay(_)
            | Weather::Refuse
            | Weather::Reset => buffer.len(),
        };
        let read = match from.read(&mut buffer[..size]) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) =>
            {
                continue;
            }
            Err(_) => break,
        };
        match weather {
            Weather::Delay(delay) => shared.wait(delay),
            Weather::Throttle(_) => shared.wait(LOOK),
            Weather::Fair | Weather::BlackHole | Weather::Refuse | Weather::Reset => {}
        }
        // It may have become a black hole while this was read.
        if shared.passable(reset).is_none() || to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    if reset.load(Ordering::Relaxed) {
        return;
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
