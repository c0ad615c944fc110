//! The service at work: a session with RabbitMQ and its threads, and those that look after what is in
//! the databases.

pub mod alerts;
pub mod clients;
pub mod database;
pub mod handler;
pub mod inquiry;
pub mod looks;
pub mod maintenance;
pub mod queues;
mod requests;
pub mod session;
pub mod shared;
mod stuck;
pub mod time_series;
pub mod turns;
pub mod workers;
