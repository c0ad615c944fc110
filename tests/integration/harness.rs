//! What the tests share: a deployment to themselves, and everybody that the service talks to.

pub mod authority;
pub mod browser;
pub mod cluster;
pub mod deployment;
pub mod operator;
pub mod peers;
pub mod planted;
pub mod pooler;
#[path = "../../examples/chaos/proxy.rs"]
pub mod proxy;
pub mod raw;
pub mod standby;
