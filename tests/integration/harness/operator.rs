//! An operator with a browser that runs no scripts.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::harness::deployment::{PATIENCE, Service};

/// What a server has answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        let mut named = lines.filter(|(one, _)| one.eq_ignore_ascii_case(name));
        named.next().map(|(_, value)| value)
    }

    /// The value of a hidden field on the page.
    pub fn field(&self, name: &str) -> Option<&str> {
        let begin = format!("name=\"{name}\" value=\"");
        let (_, rest) = self.body.split_once(&begin)?;
        rest.split('"').next()
    }

    /// Asserts its status and a text in it.
    #[track_caller]
    pub fn is(self, status: u16, text: &str) -> Answer {
        assert_eq!(self.status, status, "{self:?}");
        assert!(self.body.contains(text), "{text:?} in {self:?}");
        self
    }
}

/// Sends these bytes and reads to the end.
pub fn exchange(mut stream: TcpStream, request: &[u8]) -> Answer {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // It may be refused before it has been sent as a whole.
    match stream.write_all(request) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
        written => written.unwrap(),
    }
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    Answer {
        status: head.split(' ').nth(1).unwrap_or("0").parse().unwrap(),
        head: head.to_owned(),
        body: body.to_owned(),
    }
}

/// Somebody with an account, at a replica.
#[derive(Clone, Copy)]
pub struct Operator<'a> {
    pub address: SocketAddr,
    /// `user:password`; empty for somebody without.
    pub account: &'a str,
}

impl<'a> Operator<'a> {
    pub fn at(service: &Service, account: &'a str) -> Operator<'a> {
        Operator {
            address: service.http(),
            account,
        }
    }

    /// A request with these headers, each ended by a line break.
    pub fn request(&self, line: &str, headers: &str, body: &[u8]) -> Answer {
        let stream = TcpStream::connect(self.address).unwrap();
        exchange(stream, &self.bytes(line, headers, body))
    }

    pub fn bytes(&self, line: &str, headers: &str, body: &[u8]) -> Vec<u8> {
        let account = match self.account {
            "" => String::new(),
            account => format!(
                "Authorization: Basic {}\r\n",
                BASE64_STANDARD.encode(account)
            ),
        };
        let address = self.address;
        let head = format!(
            "{line} HTTP/1.1\r\nHost: {address}\r\nAccept: text/html\r\n{account}{headers}\r\n"
        );
        [head.as_bytes(), body].concat()
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request(
            &format!("GET {path}"),
            "Sec-Fetch-Site: same-origin\r\n",
            b"",
        )
    }

    /// The token that the page's forms have.
    pub fn token(&self) -> String {
        let page = self.get("/").is(200, "</html>");
        let token = page.field("token");
        token
            .unwrap_or_else(|| panic!("no form: {page:?}"))
            .to_owned()
    }

    /// A form of this account's, sent from the page.
    pub fn send(&self, fields: &[(&str, &str)]) -> Answer {
        let token = self.token();
        self.send_forged(&[fields, &[("token", &token)]].concat(), "")
    }

    /// A form with these fields alone, and further headers.
    pub fn send_forged(&self, fields: &[(&str, &str)], headers: &str) -> Answer {
        let mut form = form_urlencoded::Serializer::new(String::new());
        let body = form.extend_pairs(fields).finish();
        let headers = format!(
            "Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {}\r\n{headers}",
            body.len()
        );
        self.request("POST /act", &headers, body.as_bytes())
    }

    /// The page that the operator is sent to, which says this.
    #[track_caller]
    pub fn done(&self, answer: &Answer, text: &str) -> Answer {
        assert_eq!(answer.status, 303, "{answer:?}");
        self.get(answer.header("Location").unwrap()).is(200, text)
    }
}
