//! What somebody has done to jobs. Of each job its first acts are kept and its last ones, however many there
//! are.

use anyhow::Context;
use jiff::Timestamp;
use postgres::Row;
use serde_json::json;
use uuid::Uuid;

use super::rows::named;
use super::{Connection, StoreError, Transaction};
use crate::domain::acts::{Act, Deed, Done, Run};
use crate::domain::job::{Origin, Priority};

/// Acts of a job that are kept: so many at their beginning, and so many at their end.
const FIRST: i32 = 10;
const LAST: i32 = 40;
/// Other runs of one job that are told of, the last ones.
const RUNS: i64 = 20;

/// A deed as its row has it.
fn name(deed: &Deed) -> &'static str {
    match deed {
        Deed::Submitted => "SUBMIT",
        Deed::RanAgain(_) => "AGAIN",
        Deed::Held => "HOLD",
        Deed::Released => "RELEASE",
        Deed::LetGo => "LET_GO",
        Deed::MovedFirst => "FIRST",
        Deed::Prioritised { .. } => "PRIORITY",
    }
}

/// None of one that only a later version knows.
fn deed(row: &Row) -> anyhow::Result<Option<Deed>> {
    let priority = |column| -> anyhow::Result<Option<Priority>> {
        let name: Option<&str> = row.try_get(column)?;
        let priority = name.map(|name| named(Priority::ALL, Priority::name, name));
        priority.transpose()
    };
    Ok(Some(match row.try_get("act")? {
        "SUBMIT" => Deed::Submitted,
        "AGAIN" => Deed::RanAgain(row.try_get("other")?),
        "HOLD" => Deed::Held,
        "RELEASE" => Deed::Released,
        "LET_GO" => Deed::LetGo,
        "FIRST" => Deed::MovedFirst,
        "PRIORITY" => Deed::Prioritised {
            was: priority("was")?,
            priority: priority("priority")?.context("it has no priority")?,
        },
        _ => return Ok(None),
    }))
}

/// Whose it was, as far as it can be read.
fn origin(row: &Row) -> anyhow::Result<Option<Origin>> {
    let text: Option<&str> = row.try_get("origin")?;
    Ok(text.and_then(|text| serde_json::from_str(text).ok()))
}

/// Who does not let a job go, in a row of jobs that are on hold.
pub(super) fn hold(row: &Row) -> anyhow::Result<Option<Done>> {
    let at: Option<Timestamp> = row.try_get("hold_at")?;
    let text: Option<&str> = row.try_get("hold_origin")?;
    let by = text.and_then(|text| serde_json::from_str(text).ok());
    Ok(at.zip(by).map(|(at, by)| Done { at, by }))
}

impl Transaction<'_> {
    /// Notes what somebody has done to these jobs, whose rows this transaction has locked.
    pub(super) fn note_acts(
        &mut self,
        acts: &[(Uuid, Deed)],
        by: &Origin,
    ) -> Result<(), StoreError> {
        if acts.is_empty() {
            return Ok(());
        }
        let ids: Vec<_> = acts.iter().map(|(id, _)| *id).collect();
        let names: Vec<_> = acts.iter().map(|(_, deed)| name(deed)).collect();
        let (mut was, mut priorities, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for (_, deed) in acts {
            let (before, after) = match deed {
                Deed::Prioritised { was, priority } => (*was, Some(*priority)),
                Deed::Submitted
                | Deed::RanAgain(_)
                | Deed::Held
                | Deed::Released
                | Deed::LetGo
                | Deed::MovedFirst => (None, None),
            };
            was.push(before.map(Priority::name));
            priorities.push(after.map(Priority::name));
            others.push(deed.ran_again());
        }
        self.execute(
            "INSERT INTO job_act (job_id, number, at, act, origin, was, priority, other)
             SELECT job_id,
                    1 + coalesce((SELECT max(number) FROM job_act AS earlier
                                  WHERE earlier.job_id = new.job_id), 0),
                    clock_timestamp(), act, $2, was, priority, other
             FROM unnest($1::uuid[], $3::varchar[], $4::varchar[], $5::varchar[], $6::uuid[])
                  AS new (job_id, act, was, priority, other)
             ON CONFLICT (job_id, number) DO NOTHING",
            &[
                &ids,
                &json!(by).to_string(),
                &names,
                &was,
                &priorities,
                &others,
            ],
        )?;
        // The first change of the priority says what the job was submitted with.
        self.execute(
            "DELETE FROM job_act USING (
                 SELECT job_id, max(number) AS last,
                        min(number) FILTER (WHERE act = 'PRIORITY') AS first_priority
                 FROM job_act WHERE job_id = ANY($1) GROUP BY job_id HAVING count(*) > $2::integer + $3::integer
             ) AS of_job
             WHERE job_act.job_id = of_job.job_id AND number > $2 AND number <= last - $3
               AND number IS DISTINCT FROM first_priority",
            &[&ids, &FIRST, &LAST],
        )?;
        Ok(())
    }

    /// Notes by whom these jobs were submitted, each with the job that it runs again.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn note_submissions(
        &mut self,
        submissions: &[(Uuid, &Origin, Option<Uuid>)],
    ) -> Result<(), StoreError> {
        let (mut ids, mut names) = (Vec::new(), Vec::new());
        let (mut origins, mut others) = (Vec::new(), Vec::new());
        for (job_id, by, again) in submissions {
            ids.push(*job_id);
            names.push(name(&again.map_or(Deed::Submitted, Deed::RanAgain)));
            origins.push(json!(by).to_string());
            others.push(*again);
        }
        // It is there if the submission has come before.
        self.execute(
            "INSERT INTO job_act (job_id, number, at, act, origin, other)
             SELECT job_id, 1, clock_timestamp(), act, origin, other
             FROM unnest($1::uuid[], $2::varchar[], $3::text[], $4::uuid[])
                  AS new (job_id, act, origin, other)
             ON CONFLICT (job_id, number) DO NOTHING",
            &[&ids, &names, &origins, &others],
        )?;
        Ok(())
    }
}

impl Connection {
    /// What has been done to a job, oldest first, and how much of it is left out.
    pub(super) fn acts(&mut self, job_id: Uuid) -> Result<(Vec<Act>, usize), StoreError> {
        let rows = self.client.query(
            "SELECT number, at, act, origin, was, priority, other FROM job_act
             WHERE job_id = $1 ORDER BY number",
            &[&job_id],
        )?;
        let mut acts = Vec::with_capacity(rows.len());
        let mut count = 0;
        for row in &rows {
            count = row.try_get::<_, i32>("number")?;
            let deed = deed(row).map_err(StoreError::Transient)?;
            let by = origin(row).map_err(StoreError::Transient)?;
            let at = row.try_get("at")?;
            acts.extend(deed.map(|deed| Act { at, deed, by }));
        }
        let count = usize::try_from(count).unwrap_or_default();
        Ok((acts, count.saturating_sub(rows.len())))
    }

    /// Other runs of a job, oldest first.
    pub(super) fn runs(&mut self, job_id: Uuid) -> Result<Vec<Run>, StoreError> {
        let rows = self.client.query(
            "SELECT job_id, at, origin FROM job_act WHERE other = $1 ORDER BY at DESC LIMIT $2",
            &[&job_id, &RUNS],
        )?;
        let runs = rows.iter().rev().map(|row| {
            Ok(Run {
                id: row.try_get("job_id")?,
                at: row.try_get("at")?,
                by: origin(row)?,
            })
        });
        let runs: anyhow::Result<_> = runs.collect();
        runs.map_err(StoreError::Transient)
    }
}
