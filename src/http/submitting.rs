//! Submitting a job through the page: checked first, published as a client would, and told in the log with
//! who it was.

use jiff::Timestamp;
use log::{info, warn};
use serde_json::json;
use uuid::Uuid;

use super::accounts::{Accounts, Purpose, SealFault};
use super::acting::{done, failed};
use super::admission::{Visit, check_token};
use super::form::Back;
use super::page::acting::Acting;
use super::page::{self, Frame};
use super::server::Response;
use super::submission::{self, Filled};
use super::{html, json_response, refusal};
use crate::actions::derived_id;
use crate::actions::submission::submit as publish;
use crate::service::shared::Service;
use crate::telemetry::report::one_line;

/// The form, for a workflow if one is chosen.
pub(super) fn form(
    service: &Service,
    accounts: &Accounts,
    frame: &Frame<'_>,
    acting: &Acting,
    workflow: Option<&str>,
) -> Response {
    let filled = Filled {
        workflow: workflow.unwrap_or_default().to_owned(),
        ticket: ticket(accounts, frame.now),
        ..Filled::default()
    };
    shown(service, frame, acting, &filled, &[])
}

fn shown(
    service: &Service,
    frame: &Frame<'_>,
    acting: &Acting,
    filled: &Filled,
    faults: &[String],
) -> Response {
    let status = if faults.is_empty() { 200 } else { 400 };
    let catalogue = service.catalogue.get();
    let workflows = catalogue.announcement();
    let sheet = page::submit(frame, acting, workflows, filled, faults);
    html(status, frame.nonce, sheet.document(frame))
}

/// The id of the job that a form submits, sealed.
fn ticket(accounts: &Accounts, now: Timestamp) -> String {
    let id = Uuid::new_v4();
    let seal = accounts.seal(Purpose::Job, &id.to_string(), now);
    format!("{id}.{seal}")
}

/// The id under which a form is submitted: whenever it is sent with the same content the same one.
fn job_id(
    accounts: &Accounts,
    filled: &Filled,
    esdl: &[u8],
    now: Timestamp,
) -> Result<Uuid, &'static str> {
    const FORGED: &str =
        "The job's id in this form is not of this service. Nothing was done: load its page again.";
    const OLD: &str = "This form is too old. Nothing was done: load its page again.";
    if filled.ticket.is_empty() {
        return Ok(Uuid::new_v4());
    }
    let (id, seal) = filled.ticket.split_once('.').ok_or(FORGED)?;
    match accounts.check_seal(Purpose::Job, id, seal, now) {
        Ok(()) => {}
        Err(SealFault::Old) => return Err(OLD),
        Err(SealFault::Forged) => return Err(FORGED),
    }
    let id: Uuid = id.parse().map_err(|_| FORGED)?;
    // Somebody who goes back and fills in something else means another job.
    Ok(derived_id(id, &[filled.content().as_bytes(), b"\0", esdl]))
}

/// Submits what a form asks for, which is its type and its body, and leads to the job.
pub(super) fn submit(
    service: &Service,
    accounts: &Accounts,
    visit: &Visit,
    frame: &Frame<'_>,
    acting: &Acting,
    (kind, body): (&str, &[u8]),
) -> Response {
    let (mut filled, esdl) = match submission::read(kind, body) {
        Ok(read) => read,
        Err(why) => return refusal(visit.html, 400, &why),
    };
    if let Err(refusal) = check_token(accounts, visit, &filled.token) {
        return refusal;
    }
    let order = match submission::order(&filled, esdl, &service.catalogue.get()) {
        Ok(order) => order,
        Err(faults) if visit.html => {
            filled.ticket = ticket(accounts, frame.now);
            return shown(service, frame, acting, &filled, &faults);
        }
        Err(faults) => return json_response(400, &json!({"error": faults})),
    };
    let id = match job_id(accounts, &filled, esdl, frame.now) {
        Ok(id) => id,
        Err(why) => return refusal(visit.html, 403, why),
    };
    let (who, account) = (visit.who(), visit.account());
    let what = format!("submit a job to {}", one_line(&order.workflow));
    info!(account; "{who} asks: {what}");
    match publish(&service.config, &order, id, &visit.origin()) {
        Ok(()) => {
            let told = format!("job {id} is submitted to {}", one_line(&order.workflow));
            info!(account; "{who}: {what}: {told}");
            done(accounts, visit, &Back::Job(id), &[told], frame.now)
        }
        Err(failure) => {
            warn!(account; "{who}: {what}: failed: {}", one_line(&failure.to_string()));
            failed(visit, &failure)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn a_form_that_is_sent_twice_submits_one_job() {
        let lookup = |name: &str| (name == "HTTP_BASIC_AUTH").then(|| "anna:s3cret".to_owned());
        let accounts = Accounts::new(&Config::read(&lookup).unwrap());
        let now = Timestamp::now();
        let filled = |token: &str, reference: &str, ticket: &str| Filled {
            token: token.to_owned(),
            reference: reference.to_owned(),
            ticket: ticket.to_owned(),
            ..Filled::default()
        };
        let one = ticket(&accounts, now);
        let id = |filled: &Filled, esdl: &[u8]| job_id(&accounts, filled, esdl, now);
        let first = id(&filled("t", "a", &one), b"<e/>").unwrap();
        assert_eq!(id(&filled("u", "a", &one), b"<e/>"), Ok(first));
        let others = [
            id(&filled("t", "b", &one), b"<e/>"),
            id(&filled("t", "a", &one), b"<f/>"),
            id(&filled("t", "a", &ticket(&accounts, now)), b"<e/>"),
            id(&filled("t", "a", ""), b"<e/>"),
        ];
        for other in others {
            assert_ne!(other.unwrap(), first);
        }
        let forged = one.replacen(|letter: char| letter.is_ascii_digit(), "a", 1);
        for ticket in ["x", &forged] {
            assert!(id(&filled("t", "a", ticket), b"<e/>").is_err(), "{ticket}");
        }
    }
}
