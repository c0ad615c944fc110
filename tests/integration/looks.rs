//! How the page looks and whom it serves: twelve situations in a real browser, light, dark and on a phone, each
//! held against axe's rules.

use std::path::Path;
use std::{env, fs};

use rstest::rstest;
use serde_json::Value;

use crate::acting::{ACCOUNTS, ANNA};
use crate::harness::browser::Browser;
use crate::harness::deployment::{Deployment, Service, eventually};
use crate::harness::peers::{Client, Worker};
use crate::harness::planted::{FAILED, RUNNING, plant, plant_workers, workflows};
use crate::harness::proxy::{End, Proxy, Weather};

/// axe-core, which `./run.sh test` fetches.
fn axe() -> Option<String> {
    let path = env::var("OMOTES_TEST_AXE").ok()?;
    fs::read_to_string(path).ok()
}

/// Asserts that nothing is off-screen, that axe finds nothing, and keeps a picture if that is wanted: in the
/// folder that `OMOTES_SCREENSHOTS` names.
fn looked_at(browser: &Browser, name: &str) {
    let fits = "return document.documentElement.scrollWidth <= innerWidth";
    assert_eq!(browser.run(fits), true, "{name} is too wide");
    let fits = "const jobs = document.querySelector('.jobs')?.parentElement; \
                return !jobs || jobs.scrollWidth <= jobs.clientWidth";
    assert_eq!(browser.run(fits), true, "the list of {name} is too wide");
    if let Ok(folder) = env::var("OMOTES_SCREENSHOTS") {
        for format in ["webp", "png"] {
            let path = Path::new(&folder).join(format!("{name}.{format}"));
            fs::write(path, browser.screenshot(format)).unwrap();
        }
    }
    let axe = axe().expect("axe-core, which ./run.sh test installs");
    let found = browser.run_long(&format!(
        "{axe}; return axe.run(document, {{resultTypes: ['violations']}}).then((all) => all.violations.map(\
         (one) => one.id + ': ' + one.nodes.map((node) => node.target + ' ' + node.failureSummary).join('; ')))"
    ));
    assert_eq!(found, Value::Array(Vec::new()), "{name}");
}

/// Dropped in this order.
struct Scene {
    service: Service,
    proxy: Proxy,
    _workers: [Worker; 2],
    deployment: Deployment,
}

fn scene() -> Scene {
    let deployment = Deployment::new();
    let workers = ["simulator", "optimiser"].map(|task| Worker::new(&deployment, task));
    let proxy = Proxy::new(deployment.postgres_door()).unwrap();
    let port = proxy.port().to_string();
    let file = workflows(&deployment);
    let own = [
        ("WORKFLOW_CONFIG_PATH", file.to_str().unwrap()),
        ("WORKERS_PERIOD_SEC", "60"),
        ("POSTGRESQL_PORT", &port),
    ];
    let service = deployment.start_with(&[&own[..], &ACCOUNTS].concat());
    Scene {
        service,
        proxy,
        _workers: workers,
        deployment,
    }
}

#[rstest]
#[case::light("light", 1400, 900, false)]
#[case::dark("dark", 1400, 900, true)]
#[case::phone("phone", 390, 844, true)]
fn twelve_situations(
    #[case] kind: &str,
    #[case] width: u32,
    #[case] height: u32,
    #[case] dark: bool,
) {
    let browser = Browser::new(width, height, dark);
    let open = |scene: &Scene, account: &str, path: &str| {
        browser.open(&format!("http://{account}@{}{path}", scene.service.http()));
    };
    let look = |name: &str| looked_at(&browser, &format!("{name}-{kind}"));
    let empty = scene();
    open(&empty, "ben:look", "/");
    browser.shows("Nothing waits and nothing runs.");
    look("empty");
    // What its service has counted for the charts is kept for minutes where that took long.
    drop(empty);
    let scene = scene();
    let client = Client::new(&scene.deployment);
    let page = |account: &str, path: &str| open(&scene, account, path);
    let mut sql = scene.deployment.sql();
    plant(&mut sql);
    plant_workers(&mut sql);
    page("ben:look", "/");
    browser.shows("Rotterdam harbour, phase 2");
    assert!(!browser.text().contains("none has ended"));
    plant_workers(&mut sql);
    page("ben:look", "/");
    browser.shows("silent");
    browser.shows("overdue");
    look("list");
    page(ANNA, "/");
    browser.shows("Submit a job");
    look("operator");
    page(ANNA, "/?finished=true");
    browser.shows("Delft south");
    look("finished");
    page(ANNA, "/?workflow=simulator&state=REGISTERED");
    browser.shows("None matches the filter.");
    look("no-match");
    page(ANNA, &format!("/jobs/{RUNNING}"));
    browser.shows("62 %");
    look("job");
    page(ANNA, &format!("/jobs/{FAILED}"));
    browser.shows("Household_7");
    look("failed");
    page(ANNA, "/confirm?do=hold-all&list=");
    browser.shows("Hold 2 jobs?");
    look("confirm");
    page(ANNA, "/submit?workflow=simulator");
    browser.shows("Pipe classes at most");
    look("submit");
    client.peer.send("job_deletions", b"\xff");
    eventually("a dead letter", || {
        page(ANNA, "/dead-letters");
        browser.text().contains("1 dead letter").then_some(())
    });
    look("dead-letters");
    page(ANNA, "/confirm?do=requeue");
    browser.shows("Requeue 1 dead letter?");
    look("requeue");
    page(ANNA, "/nothing");
    browser.shows("There is no such page");
    look("refused");
    page(ANNA, "/");
    browser.shows("Rotterdam");
    scene.proxy.set(Weather::Refuse);
    scene.proxy.cut(End::Rst);
    browser.shows("Postgres does not answer");
    look("trouble");
}

/// A list tells all that one comes for at every width: nothing of it is left out, and no sentence is cut off
/// before its end.
#[rstest]
#[case::wide(1680)]
#[case::usual(1440)]
#[case::narrow(1280)]
#[case::small(1024)]
fn the_list_is_whole(#[case] width: u32) {
    let scene = scene();
    let mut sql = scene.deployment.sql();
    plant(&mut sql);
    plant_workers(&mut sql);
    let browser = Browser::new(width, 900, false);
    browser.open(&format!("http://{ANNA}@{}/", scene.service.http()));
    browser.shows("Rotterdam harbour, phase 2");
    let cut = "return [...document.querySelectorAll('.jobs .second, .jobs .first, .jobs .does *')] \
               .filter((one) => !one.closest('.icon, .label, [type=hidden]') && one.type !== 'hidden') \
               .filter((one) => one.offsetParent === null \
                   || (one.matches('.first') && one.scrollHeight > one.clientHeight + 1) \
                   || one.getBoundingClientRect().right > document.querySelector('.card').getBoundingClientRect().right) \
               .map((one) => one.outerHTML)";
    assert_eq!(browser.run(cut), serde_json::json!([]));
    let text = browser.text();
    for what in ["optimise_and_simulate", "takes "] {
        assert!(text.contains(what), "{what}: {text}");
    }
    let acts = "return [...document.querySelectorAll('.does [aria-label]')].map((one) => one.ariaLabel.split(':')[0])";
    let acts = browser.run(acts).to_string();
    for what in ["Move first", "Hold", "Release", "Cancel"] {
        assert!(acts.contains(what), "{what}: {acts}");
    }
    if let Ok(folder) = env::var("OMOTES_SCREENSHOTS") {
        let path = Path::new(&folder).join(format!("operator-{width}.png"));
        fs::write(path, browser.screenshot("png")).unwrap();
    }
}

/// Whoever has no mouse gets to all of it, and first past what is on every page.
#[test]
fn the_keyboard_is_enough() {
    let deployment = Deployment::new();
    let _client = Client::new(&deployment);
    let service = deployment.start();
    let browser = Browser::new(1400, 900, false);
    browser.open(&format!("http://{}/", service.http()));
    browser.shows("Not finished");
    browser.press("\u{e004}");
    assert_eq!(
        browser.run("return document.activeElement.className"),
        "skip"
    );
    browser.press("\u{e007}");
    assert_eq!(browser.run("return location.hash"), "#main");
    browser.press("/");
    let focused = "return document.activeElement.name";
    assert_eq!(browser.run(focused), "text");
    // A filter survives the other tab and the way back from a job.
    browser.open(&format!("http://{}/?workflow=workflow_1", service.http()));
    let other = browser.run("return document.querySelectorAll('.tabs a')[1].href");
    browser.open(other.as_str().unwrap());
    let kept = "return [document.querySelector('select[name=workflow]').value, location.search]";
    assert_eq!(
        browser.run(kept),
        serde_json::json!(["workflow_1", "?finished=true&workflow=workflow_1"])
    );
    // Times are the reader's own.
    let time = "const time = document.querySelector('#as-of time'); \
                return time.textContent === new Intl.DateTimeFormat(undefined, \
                {dateStyle: 'medium', timeStyle: 'medium'}).format(new Date(time.dateTime))";
    assert_eq!(browser.run(time), true);
}
