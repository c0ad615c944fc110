//! The OMOTES job orchestrator: what stands between SDK clients and Celery workers.
//!
#![doc = include_str!("README.md")]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

/// Which version this is, with its commit where that is known.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), env!("OMOTES_BUILD"));

pub mod actions;
pub mod app;
#[cfg(test)]
#[path = "../tests/integration/harness/authority.rs"]
mod authority;
pub mod broker;
pub mod config;
pub mod doctor;
pub mod domain;
mod fault_point;
pub mod healthcheck;
pub mod http;
pub mod influx;
pub mod proto;
pub mod service;
pub mod store;
pub mod telemetry;
pub mod text_file;
pub mod threads;
pub mod tls;
pub mod webhook;
pub mod wire;
