//! Which job is meant by the beginning of its id.

use uuid::Uuid;

use super::Failure;
use crate::domain::overview::JobName;
use crate::store::Connection;
use crate::telemetry::report::one_line;

/// Jobs that are told where several may be meant.
const TOLD: i64 = 6;

/// The ids of the jobs that are named so. A whole id is taken for one, whether there is such a job
/// or not.
///
/// # Errors
/// No job is named so, or several are; or the connection is lost.
pub fn resolve(connection: &mut Connection, names: &[JobName]) -> Result<Vec<Uuid>, Failure> {
    let mut ids = Vec::with_capacity(names.len());
    for name in names {
        ids.push(match name.whole() {
            Some(id) => id,
            None => the_one(name, &connection.jobs_named(name, TOLD)?)?,
        });
    }
    Ok(ids)
}

fn the_one(name: &JobName, found: &[(Uuid, String)]) -> Result<Uuid, Failure> {
    match found {
        [] => Err(Failure::Refused(format!("no job's id begins with {name}"))),
        [(id, _)] => Ok(*id),
        several => {
            let mut text = format!("the ids of several jobs begin with {name}:");
            let told = usize::try_from(TOLD - 1).unwrap_or(0);
            for (id, reference) in several.iter().take(told) {
                text += &format!("\n  {id} {}", one_line(reference));
            }
            if several.len() > told {
                text += "\n  and more";
            }
            Err(Failure::Refused(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_job_is_meant_or_those_that_may_be_are_told() {
        let name: JobName = "0e9b".parse().unwrap();
        let job = |last: u128| {
            (
                Uuid::from_u128(0x0e9b << 112 | last),
                format!("study-{last}"),
            )
        };
        assert_eq!(the_one(&name, &[job(1)]).unwrap(), job(1).0);
        let none = the_one(&name, &[]).unwrap_err().to_string();
        assert_eq!(none, "no job's id begins with 0e9b");
        let two = the_one(&name, &[job(1), job(2)]).unwrap_err().to_string();
        assert!(two.contains("study-1") && two.contains("study-2"), "{two}");
        assert!(!two.contains("more"), "{two}");
        let many: Vec<_> = (1..=6).map(job).collect();
        let many = the_one(&name, &many).unwrap_err().to_string();
        assert!(many.ends_with("study-5\n  and more"), "{many}");
    }
}
