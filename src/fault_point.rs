//! Points of the pipeline at which a test can hold the service up, to kill it or what it talks to
//! just there. Release builds have none.

/// A test names the point in `OMOTES_FAULT_POINT`. With `OMOTES_FAULT_FILE`, the first thread to
/// come by makes that file and waits there until it is gone; with `OMOTES_FAULT_SPIN` it uses the
/// processor meanwhile. With `OMOTES_FAULT_MILLISECONDS`, every thread waits that long each time it
/// comes by. Without either, every thread panics.
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
    let spins = env::var_os("OMOTES_FAULT_SPIN").is_some();
    while fs::exists(&file).is_ok_and(|exists| exists) {
        if spins {
            spin();
            continue;
        }
        let _ = crossbeam_channel::after(Duration::from_millis(5)).recv();
    }
}

#[cfg(debug_assertions)]
#[inline(never)]
fn spin() {
    for _ in 0..10_000_000 {
        std::hint::spin_loop();
    }
}

/// How long something is waited for that takes long to come. A test that is about it makes it a
/// tenth by setting `OMOTES_FAULT_HASTE`.
#[cfg(debug_assertions)]
pub(crate) fn patience(time: std::time::Duration) -> std::time::Duration {
    match std::env::var_os("OMOTES_FAULT_HASTE") {
        Some(_) => time / 10,
        None => time,
    }
}

#[cfg(not(debug_assertions))]
pub(crate) fn patience(time: std::time::Duration) -> std::time::Duration {
    time
}

#[cfg(not(debug_assertions))]
pub(crate) fn reached(_: &str) {}
