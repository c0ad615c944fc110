//! The OMOTES job orchestrator: what stands between SDK clients and Celery workers.
//!
//! `main → app → session → handler → {store, broker} → the pure files`. The pure ones are [`job`],
//! [`workflow`], [`parameters`], [`time_series`], [`wire`], [`celery`], [`esdl`] and [`text`]: they know
//! no broker, database, clock or environment.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test fails by panicking"))]

pub mod app;
#[cfg(test)]
#[path = "../tests/integration/authority.rs"]
mod authority;
pub mod broker;
pub mod busy;
pub mod celery;
pub mod cleaner;
pub mod client;
pub mod config;
pub mod doctor;
pub mod environment;
pub mod esdl;
pub mod estimate;
mod fault_point;
pub mod handler;
pub mod health;
pub mod http;
pub mod influx;
pub mod inquiry;
pub mod job;
pub mod logger;
pub mod maintenance;
pub mod metrics;
pub mod overview;
pub mod page;
pub mod parameters;
pub mod proto;
pub mod queues;
pub mod report;
mod requests;
pub mod session;
pub mod store;
mod stuck;
pub mod text;
pub mod text_file;
pub mod time_series;
pub mod tls;
pub mod wire;
pub mod workflow;
