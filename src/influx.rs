//! InfluxDB 1.x over HTTP: which databases there are, and dropping one.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::Value;

use crate::config;

const TIMEOUT: Duration = Duration::from_secs(30);

/// How to ask an InfluxDB.
pub struct Influx {
    agent: ureq::Agent,
    url: String,
    authorization: Option<String>,
}

impl Influx {
    pub fn new(config: &config::InfluxDb) -> Influx {
        let agent = ureq::Agent::config_builder()
            .timeout_connect(Some(config::CONNECT_TIMEOUT))
            .timeout_global(Some(TIMEOUT))
            // The body says what is wrong.
            .http_status_as_error(false)
            .build()
            .new_agent();
        let authorization = config.username.as_ref().map(|username| {
            let password = config.password.as_ref().map_or("", config::Secret::reveal);
            let credentials = BASE64_STANDARD.encode(format!("{username}:{password}"));
            format!("Basic {credentials}")
        });
        Influx {
            agent,
            url: format!("http://{}:{}/query", config.host, config.port),
            authorization,
        }
    }

    /// The names of all databases.
    ///
    /// # Errors
    /// InfluxDB does not answer, or refuses to.
    pub fn databases(&self) -> anyhow::Result<Vec<String>> {
        let answer = self.show("SHOW DATABASES")?;
        let rows = &answer["results"][0]["series"][0]["values"];
        Ok(rows
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|row| row[0].as_str().map(str::to_owned))
            .collect())
    }

    fn show(&self, query: &str) -> anyhow::Result<Value> {
        let mut request = self.agent.get(&self.url).query("q", query);
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        self.answer(request.call())
    }

    /// Whether the user may list and drop all databases.
    ///
    /// # Errors
    /// As [`Influx::databases`]; or the user may not.
    pub fn check_rights(&self) -> anyhow::Result<()> {
        // Needs the same rights, and changes nothing.
        self.show("SHOW USERS").map(drop)
    }

    /// Drops a database with all that is in it; one that is not there is as good as dropped.
    ///
    /// # Errors
    /// As [`Influx::databases`].
    pub fn drop_database(&self, name: &str) -> anyhow::Result<()> {
        let mut request = self.agent.post(&self.url);
        if let Some(authorization) = &self.authorization {
            request = request.header("Authorization", authorization);
        }
        let query = format!("DROP DATABASE {}", identifier(name));
        self.answer(request.send_form([("q", query)]))?;
        Ok(())
    }

    fn answer(
        &self,
        response: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> anyhow::Result<Value> {
        let response = response.with_context(|| format!("InfluxDB at {}", self.url))?;
        let status = response.status();
        let text = response.into_body().read_to_string()?;
        let answer: Value = serde_json::from_str(&text)
            .map_err(|_| anyhow!("InfluxDB at {}: {status}: {text:.200}", self.url))?;
        for error in [&answer["error"], &answer["results"][0]["error"]] {
            if let Some(error) = error.as_str() {
                bail!("InfluxDB at {}: {status}: {error:.200}", self.url);
            }
        }
        Ok(answer)
    }
}

/// A name as InfluxQL quotes it.
fn identifier(name: &str) -> String {
    let escaped = name
        .replace('\\', r"\\")
        .replace('"', r#"\""#)
        .replace('\n', r"\n");
    format!("\"{escaped}\"")
}

#[cfg(test)]
mod tests {
    use super::identifier;

    #[test]
    fn a_name_cannot_end_its_quotes() {
        assert_eq!(identifier("plain"), r#""plain""#);
        assert_eq!(identifier(r#"a"; DROP \"#), r#""a\"; DROP \\""#);
    }
}
