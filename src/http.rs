//! The health endpoint, and the question that Docker asks it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use jiff::Timestamp;
use log::{debug, info};
use tiny_http::{Header, Method, Request, Response, Server};

use crate::health::Health;

/// Listens at `address`.
///
/// # Errors
/// The address is taken or not this machine's.
pub fn listen(address: SocketAddr) -> anyhow::Result<Server> {
    let server = Server::http(address)
        .map_err(|error| anyhow!(error))
        .with_context(|| format!("listening at {address} (HTTP_BIND)"))?;
    info!("health at http://{}/health/ready", server.server_addr());
    Ok(server)
}

/// Answers until [`Server::unblock`] is called.
pub fn serve(server: &Server, health: &Health) {
    for request in server.incoming_requests() {
        // A client that hangs up before its answer is no news.
        if let Err(error) = answer(request, health) {
            debug!("answering over HTTP: {error}");
        }
    }
}

fn answer(request: Request, health: &Health) -> io::Result<()> {
    let path = request.url().split('?').next().unwrap_or_default();
    let (status, body) = match (request.method(), path) {
        (Method::Get | Method::Head, "/health/live") => (200, serde_json::json!({"live": true})),
        (Method::Get | Method::Head, "/health/ready") => {
            let (ready, body) = health.ready(Timestamp::now());
            (if ready { 200 } else { 503 }, body)
        }
        (_, "/health/live" | "/health/ready") => {
            (405, serde_json::json!({"error": "only GET and HEAD"}))
        }
        _ => (
            404,
            serde_json::json!({"error": "there are /health/live and /health/ready"}),
        ),
    };
    let json = Header::from_bytes("Content-Type", "application/json").expect("a valid header");
    request.respond(
        Response::from_string(format!("{body:#}\n"))
            .with_status_code(status)
            .with_header(json),
    )
}

/// Asks the service that listens at `bind` whether it is ready.
///
/// # Errors
/// It is not, or does not answer; the text says why.
pub fn check(bind: SocketAddr) -> anyhow::Result<()> {
    let mut address = bind;
    match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V4(_) | IpAddr::V6(_) => {}
    }
    let url = format!("http://{address}/health/ready");
    let mut response = ureq::get(&url)
        .config()
        .timeout_global(Some(Duration::from_secs(5)))
        .http_status_as_error(false)
        .build()
        .call()
        .with_context(|| url.clone())?;
    if response.status() != 200 {
        bail!("{url}: {}", response.body_mut().read_to_string()?.trim());
    }
    Ok(())
}
