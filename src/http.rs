//! The health endpoint, and the question that Docker asks it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use log::{error, info};
use serde_json::json;

use crate::health::Health;

mod server;

pub use server::{Request, Response, Server};

/// Listens at `address`.
///
/// # Errors
/// The address is taken or not this machine's.
pub fn listen(address: SocketAddr) -> anyhow::Result<Server> {
    let server =
        Server::listen(address).with_context(|| format!("listening at {address} (HTTP_BIND)"))?;
    info!("health at http://{}/health/ready", server.address());
    Ok(server)
}

/// Answers until [`Server::stop`] is called.
pub fn serve(server: &Server, health: &Health) {
    if let Err(error) = server.serve(|request| answer(request, health)) {
        error!("the HTTP endpoint has ended: {error}");
    }
}

fn answer(request: &Request, health: &Health) -> Response {
    let path = request.target.split('?').next().unwrap_or_default();
    let (status, body) = match (request.method.as_str(), path) {
        ("GET" | "HEAD", "/health/live") => (200, json!({"live": true})),
        ("GET" | "HEAD", "/health/ready") => {
            let (ready, body) = health.ready(Timestamp::now());
            (if ready { 200 } else { 503 }, body)
        }
        (_, "/health/live" | "/health/ready") => (405, json!({"error": "only GET and HEAD"})),
        _ => (
            404,
            json!({"error": "there are /health/live and /health/ready"}),
        ),
    };
    Response {
        status,
        content_type: "application/json",
        body: format!("{body:#}\n").into_bytes(),
    }
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
