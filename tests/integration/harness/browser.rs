//! A headless Chromium, driven over the WebDriver protocol.

use std::io::Write;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

use crate::harness::deployment::eventually;

/// A browser with one window; gone when dropped.
pub struct Browser {
    driver: Child,
    session: String,
}

impl Browser {
    /// `dark` is what the visitor prefers.
    pub fn new(width: u32, height: u32, dark: bool) -> Browser {
        let port = {
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap().port()
        };
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("chromedriver, which ./run.sh test installs");
        let base = format!("http://127.0.0.1:{port}");
        let scheme = if dark { "dark" } else { "light" };
        let arguments = [
            "--headless=new".to_owned(),
            // Its sandbox needs rights that a container does not give.
            "--no-sandbox".to_owned(),
            "--disable-gpu".to_owned(),
            "--disable-dev-shm-usage".to_owned(),
            "--hide-scrollbars".to_owned(),
            format!("--window-size={width},{height}"),
            format!("--blink-settings=preferredColorScheme={}", u8::from(!dark)),
        ];
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments, "binary": "/usr/bin/chromium"},
        }}});
        let id = eventually(&format!("a browser that prefers {scheme}"), || {
            let answer = post(&format!("{base}/session"), &wanted)?;
            answer["value"]["sessionId"].as_str().map(str::to_owned)
        });
        let browser = Browser {
            driver,
            session: format!("{base}/session/{id}"),
        };
        // No window is narrower than 500 pixels by itself.
        let metrics = json!({
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": false,
        });
        browser.devtools("Emulation.setDeviceMetricsOverride", &metrics);
        browser
    }

    fn devtools(&self, command: &str, parameters: &Value) -> Value {
        let url = format!("{}/goog/cdp/execute", self.session);
        let wanted = json!({"cmd": command, "params": parameters});
        let mut answer = post(&url, &wanted).unwrap();
        answer["value"].take()
    }

    /// Where its visitor is.
    pub fn in_zone(&self, zone: &str) {
        self.devtools(
            "Emulation.setTimezoneOverride",
            &json!({"timezoneId": zone}),
        );
    }

    pub fn open(&self, url: &str) {
        post(&format!("{}/url", self.session), &json!({"url": url})).unwrap();
    }

    /// The same of one that is long: a body of half a megabyte the driver does not get from `ureq`.
    pub fn run_long(&self, script: &str) -> Value {
        let body = json!({"script": script, "args": []}).to_string();
        let mut curl = Command::new("curl")
            .args(["-sS", "-m", "60", "--data-binary", "@-"])
            .arg(format!("{}/execute/sync", self.session))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        curl.stdin
            .take()
            .unwrap()
            .write_all(body.as_bytes())
            .unwrap();
        let output = curl.wait_with_output().unwrap();
        let mut answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        answer["value"].take()
    }

    /// What the body of a function without arguments returns.
    pub fn run(&self, script: &str) -> Value {
        let body = json!({"script": script, "args": []});
        let mut answer = post(&format!("{}/execute/sync", self.session), &body).unwrap();
        answer["value"].take()
    }

    /// Presses a key.
    pub fn press(&self, key: &str) {
        let actions = ["keyDown", "keyUp"].map(|kind| json!({"type": kind, "value": key}));
        let body = json!({"actions": [{"type": "key", "id": "keyboard", "actions": actions}]});
        post(&format!("{}/actions", self.session), &body).unwrap();
    }

    /// Chooses a file in the field that a selector names.
    pub fn choose(&self, selector: &str, path: &str) {
        let wanted = json!({"using": "css selector", "value": selector});
        let found = post(&format!("{}/element", self.session), &wanted).unwrap();
        let element = found["value"].as_object().unwrap().values().next().unwrap();
        let element = element.as_str().unwrap();
        let url = format!("{}/element/{element}/value", self.session);
        post(&url, &json!({"text": path})).unwrap();
    }

    /// What the window shows, as `webp` or `png`.
    pub fn screenshot(&self, format: &str) -> Vec<u8> {
        let mut how = json!({"format": format});
        if format == "webp" {
            how["quality"] = 35.into();
        }
        let answer = self.devtools("Page.captureScreenshot", &how);
        let picture = answer["data"].as_str().unwrap();
        BASE64_STANDARD.decode(picture).unwrap()
    }

    /// Waits until the page's text has this in it.
    pub fn shows(&self, text: &str) {
        eventually(&format!("{text:?} on the page"), || {
            self.text().contains(text).then_some(())
        });
    }

    pub fn text(&self) -> String {
        let text = self.run("return document.body.innerText");
        text.as_str().unwrap_or_default().to_owned()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Ends the browser, which the driver would leave behind.
        let _ = ureq::delete(&self.session).call();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

fn post(url: &str, body: &Value) -> Option<Value> {
    let mut response = ureq::post(url)
        .config()
        .timeout_global(Some(Duration::from_secs(60)))
        .build()
        // Not in chunks, which the driver does not understand.
        .send(body.to_string())
        .ok()?;
    response.body_mut().read_json().ok()
}
