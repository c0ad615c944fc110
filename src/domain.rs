//! What jobs, workflows and their data are, and what is decided about them. Knows no broker, database,
//! clock or environment.

pub mod activity;
pub mod acts;
pub mod alerts;
pub mod batch;
pub mod esdl;
pub mod estimate;
pub mod job;
pub mod overview;
pub mod parameters;
pub mod switch;
pub mod text;
pub mod time_series;
pub mod turns;
pub mod vhost;
pub mod worker;
pub mod workflow;
