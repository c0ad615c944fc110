//! Pages that are open: each follows its events, as a browser does.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::Context;

/// What is read at once.
const BUFFER: usize = 64 * 1024;

pub struct Viewers {
    streams: Vec<TcpStream>,
    readers: Vec<JoinHandle<()>>,
    bytes: Arc<AtomicUsize>,
}

impl Viewers {
    /// Opens so many pages of the service that is at this address.
    ///
    /// # Errors
    /// It does not answer.
    pub fn open(address: &str, count: usize) -> anyhow::Result<Viewers> {
        let host = address.trim_start_matches("http://").trim_end_matches('/');
        let bytes = Arc::default();
        let mut viewers = Viewers {
            streams: Vec::with_capacity(count),
            readers: Vec::with_capacity(count),
            bytes: Arc::clone(&bytes),
        };
        for _ in 0..count {
            let mut stream = TcpStream::connect(host).with_context(|| host.to_owned())?;
            let request = format!("GET /events HTTP/1.1\r\nHost: {host}\r\n\r\n");
            stream.write_all(request.as_bytes())?;
            viewers.streams.push(stream.try_clone()?);
            let bytes = Arc::clone(&bytes);
            let reader = thread::Builder::new().stack_size(256 * 1024);
            viewers.readers.push(reader.spawn(move || {
                let mut buffer = vec![0; BUFFER];
                while let Ok(read @ 1..) = stream.read(&mut buffer) {
                    bytes.fetch_add(read, Ordering::Relaxed);
                }
            })?);
        }
        Ok(viewers)
    }

    /// How many bytes they have been sent so far.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Drop for Viewers {
    fn drop(&mut self) {
        for stream in &self.streams {
            // It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}
