//! Submitting a job through the page: checked first, published as a client would, and told in the log with
//! who it was.

use log::{info, warn};
use serde_json::json;

use super::accounts::Accounts;
use super::acting::{done, failed};
use super::admission::{Visit, check_token};
use super::form::Back;
use super::page::acting::Acting;
use super::page::{self, Frame};
use super::server::Response;
use super::submission::{self, Filled};
use super::{html, json_response, refusal};
use crate::actions::submission::submit as publish;
use crate::service::shared::Service;
use crate::telemetry::report::one_line;

/// The form, for a workflow if one is chosen.
pub(super) fn form(
    service: &Service,
    frame: &Frame<'_>,
    acting: &Acting,
    workflow: Option<&str>,
) -> Response {
    let filled = Filled {
        workflow: workflow.unwrap_or_default().to_owned(),
        ..Filled::default()
    };
    shown(service, frame, acting, &filled, &[], 200)
}

fn shown(
    service: &Service,
    frame: &Frame<'_>,
    acting: &Acting,
    filled: &Filled,
    faults: &[String],
    status: u16,
) -> Response {
    let catalogue = service.catalogue.get();
    let workflows = catalogue.announcement();
    let sheet = page::submit(frame, acting, workflows, filled, faults);
    html(status, frame.nonce, sheet.document(frame))
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
    let (filled, esdl) = match submission::read(kind, body) {
        Ok(read) => read,
        Err(why) => return refusal(visit.html, 400, &why),
    };
    if let Err(refusal) = check_token(accounts, visit, &filled.token) {
        return refusal;
    }
    let order = match submission::order(&filled, esdl, &service.catalogue.get()) {
        Ok(order) => order,
        Err(faults) if visit.html => {
            return shown(service, frame, acting, &filled, &faults, 400);
        }
        Err(faults) => return json_response(400, &json!({"error": faults})),
    };
    let (who, account) = (visit.who(), visit.account());
    let what = format!("submit a job to {}", one_line(&order.workflow));
    info!(account; "{who} asks: {what}");
    match publish(&service.config, &order) {
        Ok(id) => {
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
