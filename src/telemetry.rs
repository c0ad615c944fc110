//! What the service tells of itself: its log, its health, its metrics.

mod gauges;
pub mod health;
pub mod logger;
pub mod metrics;
pub mod report;
pub mod trouble;

/// How the names of all metrics begin.
const PREFIX: &str = "omotes_orchestrator";
/// The label of all undefined workflows: names made up by clients must not become time series.
const OTHER_WORKFLOW: &str = "other";
