//! The program: hands over to the command line, and turns what comes of it into an exit code.

use std::process::ExitCode;

use clap::Parser;

mod cli;

/// glibc's gives large buffers back to the kernel at each message, which costs as much again as all
/// that is done with them.
#[cfg(unix)]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    cli::complete();
    match cli::run(cli::Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            cli::complain(&error);
            ExitCode::FAILURE
        }
    }
}
