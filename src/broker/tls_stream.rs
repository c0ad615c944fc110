//! A TLS connection to RabbitMQ that behaves like a plain socket towards amiquip. amiquip asks
//! whether it can write only while it has something to write, so what is reported as written must
//! have left rustls too.

use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mio_of_amiquip::{Evented, Poll, PollOpt, Ready, Token};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

pub(super) struct TlsStream {
    socket: mio_of_amiquip::net::TcpStream,
    tls: ClientConnection,
    /// How many bytes rustls has accepted whose records are not all sent: the next write begins
    /// with them again.
    unsent: usize,
}

impl TlsStream {
    /// Does the TLS handshake with `host` on a connected socket, within `timeout`.
    pub(super) fn open(
        mut socket: TcpStream,
        host: &str,
        config: ClientConfig,
        timeout: Duration,
    ) -> anyhow::Result<TlsStream> {
        let name = ServerName::try_from(host.to_owned())
            .with_context(|| format!("{host:?} as the name in a certificate"))?;
        let mut tls = ClientConnection::new(Arc::new(config), name)?;
        let deadline = Instant::now() + timeout;
        while tls.is_handshaking() || tls.wants_write() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no end of it within {timeout:?}; {}", super::STUCK);
            }
            // Blocking, so that a fault here is reported as what it is.
            socket.set_read_timeout(Some(left))?;
            socket.set_write_timeout(Some(left))?;
            let step = if tls.wants_write() {
                tls.write_tls(&mut socket)
            } else {
                tls.read_tls(&mut socket)
            };
            match step {
                Ok(0) => bail!("the other side hung up; does it speak TLS on this port?"),
                Ok(_) => {}
                // The time is up.
                Err(error)
                    if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {}
                Err(error) => return Err(error.into()),
            }
            if let Err(error) = tls.process_new_packets() {
                // The alert is sent to the other side, if it listens.
                let _ = tls.write_tls(&mut socket);
                return Err(error.into());
            }
        }
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        Ok(TlsStream {
            socket: mio_of_amiquip::net::TcpStream::from_stream(socket)?,
            tls,
            unsent: 0,
        })
    }

    /// Reads what has arrived; `WouldBlock` when nothing has.
    fn receive(&mut self) -> io::Result<()> {
        self.tls.read_tls(&mut self.socket)?;
        let processed = self.tls.process_new_packets();
        if processed.is_err() {
            // As in the handshake.
            let _ = self.tls.write_tls(&mut self.socket);
        }
        processed.map(|_| ()).map_err(io::Error::other)
    }

    fn send(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            if self.tls.write_tls(&mut self.socket)? == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            // Nothing signals data that is already decrypted, so it goes first.
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.receive()?,
                read => return read,
            }
        }
    }
}

impl Write for TlsStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.unsent == 0 {
            self.unsent = self.tls.writer().write(buffer)?;
        }
        match self.send() {
            Ok(()) => Ok(mem::take(&mut self.unsent)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Err(error),
            // The other side may have said why before it hung up, such as that it wants a
            // certificate, which in TLS 1.3 comes after the handshake.
            Err(error) => match self.receive() {
                Err(reason) if reason.get_ref().is_some() => Err(reason),
                Ok(()) | Err(_) => Err(error),
            },
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

impl amiquip::IoStream for TlsStream {}

impl Evented for TlsStream {
    fn register(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        options: PollOpt,
    ) -> io::Result<()> {
        self.socket.register(poll, token, interest, options)
    }

    fn reregister(
        &self,
        poll: &Poll,
        token: Token,
        interest: Ready,
        options: PollOpt,
    ) -> io::Result<()> {
        self.socket.reregister(poll, token, interest, options)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.socket.deregister(poll)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use crossbeam_channel::bounded;
    use mio_of_amiquip::Events;
    use rustls::{ServerConnection, StreamOwned};

    use super::*;
    use crate::authority::Authority;
    use crate::tls::{self, Check, Tls};

    const PATIENCE: Duration = Duration::from_secs(60);
    /// More than the sockets of both sides hold.
    const LARGE: usize = 32 * 1024 * 1024;

    type Server = StreamOwned<ServerConnection, TcpStream>;

    /// A stream, after its other side has been given to `server` on a thread.
    fn open(server: impl FnOnce(TcpStream) + Send + 'static) -> anyhow::Result<TlsStream> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        thread::spawn(move || server(accepted));
        let tls = Tls {
            check: Check::Nothing,
            identity: None,
        };
        TlsStream::open(socket, "localhost", tls.client_config().unwrap(), PATIENCE)
    }

    fn with_server(server: impl FnOnce(Server) + Send + 'static) -> TlsStream {
        let tls = tls::tests::server(&Authority::new().issue("localhost"));
        open(move |socket| server(StreamOwned::new(tls, socket))).unwrap()
    }

    /// As amiquip does: once for each change of readiness.
    fn wait(poll: &Poll, stream: &TlsStream, interest: Ready) {
        poll.reregister(stream, Token(0), interest, PollOpt::edge())
            .unwrap();
        let mut events = Events::with_capacity(1);
        poll.poll(&mut events, Some(PATIENCE)).unwrap();
        assert!(!events.is_empty(), "nobody tells that it goes on");
    }

    fn poll_for(stream: &TlsStream) -> Poll {
        let poll = Poll::new().unwrap();
        poll.register(stream, Token(0), Ready::empty(), PollOpt::edge())
            .unwrap();
        poll
    }

    fn bytes() -> Vec<u8> {
        (0..LARGE).map(|index| (index % 251) as u8).collect()
    }

    #[test]
    fn what_is_written_is_on_its_way() {
        let (go, gone) = bounded::<()>(0);
        let (sender, received) = bounded(1);
        let mut stream = with_server(move |mut server| {
            let mut text = vec![0; LARGE];
            // The handshake, and the start.
            server.read_exact(&mut text[..1]).unwrap();
            gone.recv().unwrap();
            server.read_exact(&mut text[1..]).unwrap();
            sender.send(text).unwrap();
        });
        let poll = poll_for(&stream);
        let text = bytes();
        let mut written = 0;
        let mut blocked = 0;
        while written < LARGE {
            match stream.write(&text[written..]) {
                Ok(count) => {
                    assert!(count > 0);
                    assert!(!stream.tls.wants_write(), "some of it is left behind");
                    written += count;
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    assert!(stream.tls.wants_write());
                    if blocked == 0 {
                        go.send(()).unwrap();
                    }
                    blocked += 1;
                    wait(&poll, &stream, Ready::readable() | Ready::writable());
                }
            }
        }
        assert!(blocked > 0);
        assert!(received.recv_timeout(PATIENCE).unwrap() == text);
    }

    #[test]
    fn what_has_come_is_read_to_its_end() {
        let mut stream = with_server(|mut server| {
            server.write_all(&bytes()).unwrap();
            server.conn.send_close_notify();
            server.flush().unwrap();
        });
        let poll = poll_for(&stream);
        let mut text: Vec<u8> = Vec::new();
        // Not a divisor of a record's length.
        let mut buffer = [0; 1000];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => text.extend(&buffer[..count]),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    let left = stream.tls.reader().read(&mut buffer);
                    assert_eq!(left.unwrap_err().kind(), ErrorKind::WouldBlock);
                    wait(&poll, &stream, Ready::readable());
                }
            }
        }
        assert!(text == bytes());
    }

    #[test]
    fn a_handshake_that_fails_says_why() {
        let fault = |server: fn(TcpStream)| format!("{:#}", open(server).map(drop).unwrap_err());
        let hung_up = fault(drop);
        assert!(
            hung_up.contains("hung up") || hung_up.contains("reset"),
            "{hung_up}"
        );
        let plain = fault(|mut socket| {
            socket.write_all(b"AMQP\x00\x00\x09\x01").unwrap();
            // Until the other side has enough of it.
            let _ = socket.read_to_end(&mut Vec::new());
        });
        assert!(plain.contains("InvalidContentType"), "{plain}");
    }

    #[test]
    fn a_handshake_has_a_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let tls = Tls {
            check: Check::Nothing,
            identity: None,
        };
        let config = tls.client_config().unwrap();
        let opened = TlsStream::open(socket, "localhost", config, Duration::from_millis(50));
        let fault = opened.map(drop).unwrap_err().to_string();
        assert!(
            fault.starts_with("no end of it within 50ms; RabbitMQ may be"),
            "{fault}"
        );
    }
}
