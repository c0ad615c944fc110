//! The service from outside: its real binary against real RabbitMQ, Postgres and InfluxDB
//! processes, which `./run.sh test` starts. Each test has two vhosts and a database of its own.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    unreachable_pub,
    reason = "a test fails by panicking, says why, and is nobody's library"
)]

mod harness;

mod acting;
mod acts;
mod admission;
mod alerts;
mod attention;
mod cancelling;
mod cli;
mod cluster;
mod commands;
mod connect;
mod crashes;
mod crowd;
mod dead_letters;
mod doctor;
mod events;
mod faults;
mod following;
mod glance;
mod guarded_stream;
mod http;
mod inquiry;
mod kept;
mod looks;
mod maintenance;
mod memory;
mod migrate;
mod outage;
mod outcome_delay;
mod pipeline;
mod pooler;
mod python;
mod quorum;
mod rabbitmq4;
mod requests;
mod servers;
mod stalled;
mod steps;
mod stopping;
mod story;
mod submitting;
mod switch;
mod time_series;
mod tls;
mod turns;
mod unacked;
mod views;
mod watchdog;
mod watching;
mod why;
mod workers;
mod workflow;
