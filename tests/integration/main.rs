//! The service from outside: its real binary against real RabbitMQ, Postgres and InfluxDB
//! processes, which `./run.sh test` starts. Each test has two vhosts and a database of its own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    unreachable_pub,
    reason = "a test fails by panicking, says why, and is nobody's library"
)]

mod acknowledging;
mod authority;
mod browser;
mod cancelling;
mod commands;
mod copies;
mod crashes;
mod dead_letters;
mod deployment;
mod doctor;
mod events;
mod faults;
mod http;
mod jobs;
mod limits;
mod memory;
mod operating;
mod outcome_delay;
mod peers;
mod poison;
#[path = "../../examples/chaos/proxy.rs"]
mod proxy;
mod python;
mod raw;
mod requests;
mod revisions;
mod servers;
mod settings;
mod stopping;
mod time_series;
mod tls;
mod waiting;
mod watchdog;
mod workflows;
