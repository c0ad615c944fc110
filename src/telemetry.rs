//! What the service tells of itself: its log, its health, its metrics.

mod gauges;
pub mod health;
pub mod logger;
pub mod metrics;
pub mod report;
