//! Points of the pipeline at which a test can hold the service up, to kill it or what it talks to
//! just there. Release builds have none.

/// A test names the point in `OMOTES_FAULT_POINT`. With `OMOTES_FAULT_FILE`, the first thread to
/// come by makes that file and waits there until it is gone. With `OMOTES_FAULT_MILLISECONDS`,
/// every thread waits that long each time it comes by. Without either, every thread panics.
#[cfg(debug_assertions)]
pub(crate) fn reached(point: &str) {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;
    use std::{env, fs};

    static PASSED: AtomicBool = AtomicBool::new(false);
    if env::var("OMOTES_FAULT_POINT").as_deref() != Ok(point) {
        return;
    }
    if let Ok(pause) = env::var("OMOTES_FAULT_MILLISECONDS") {
        let pause = pause.parse().expect("the test gives a whole number");
        let _ = crossbeam_channel::after(Duration::from_millis(pause)).recv();
        return;
    }
    let Some(file) = env::var_os("OMOTES_FAULT_FILE") else {
        panic!("the fault point {point:?} was reached");
    };
    if PASSED.swap(true, Ordering::Relaxed) {
        return;
    }
    fs::write(&file, point).expect("the test gives a file that can be written");
    while fs::exists(&file).is_ok_and(|exists| exists) {
        let _ = crossbeam_channel::after(Duration::from_millis(5)).recv();
    }
}

#[cfg(not(debug_assertions))]
pub(crate) fn reached(_: &str) {}
