//! A day's work in the database, for whoever looks at the page.

use std::fs;
use std::path::PathBuf;

use postgres::Client;
use postgres::error::SqlState;
use serde_json::json;

use crate::harness::deployment::{Deployment, eventually};

/// The running job of two steps, and a job that failed.
pub const RUNNING: &str = "7d2f1c04-5a68-4f0e-9d1b-2f6a6a1f0001";
pub const FAILED: &str = "7d2f1c04-5a68-4f0e-9d1b-2f6a6a1f0002";

/// The workflows of it.
pub fn workflows(deployment: &Deployment) -> PathBuf {
    let parameters = json!([
        {"key_name": "timestep", "parameter_type": "duration", "title": "Time step",
         "description": "How far apart the points of the time series are.", "default": 3600, "minimum": 60, "maximum": 86400},
        {"key_name": "start_time", "parameter_type": "datetime", "default": "2026-01-01T00:00:00",
         "constraints": [{"other_key_name": "end_time", "relation": "smaller"}]},
        {"key_name": "end_time", "parameter_type": "datetime"},
        {"key_name": "solver", "parameter_type": "string", "default": "highs",
         "enum_options": [{"key_name": "highs", "display_name": "HiGHS"}, {"key_name": "gurobi", "display_name": "Gurobi"}]},
        {"key_name": "pipes", "parameter_type": "integer", "title": "Pipe classes at most", "minimum": 1, "maximum": 20, "default": 8},
        {"key_name": "losses", "parameter_type": "boolean", "title": "With heat losses", "default": true},
    ]);
    let file = json!([
        {"workflow_type_name": "simulator", "workflow_type_description_name": "Conceptual design, simulation",
         "workflow_parameters": parameters},
        {"workflow_type_name": "optimise_and_simulate", "workflow_type_description_name": "Draft design",
         "steps": [{"task": "optimiser", "title": "Optimise"}, {"task": "simulator", "title": "Simulate"}]},
        {"workflow_type_name": "optimiser", "workflow_type_description_name": "Draft design, optimisation only"},
    ]);
    let path = deployment.folder.join("planted.json");
    fs::write(&path, file.to_string()).unwrap();
    path
}

/// Jobs of all kinds.
pub fn plant(sql: &mut Client) {
    let steps = json!([
        {"task": "optimiser", "title": "Optimise"},
        {"task": "simulator", "title": "Simulate"},
    ]);
    sql.batch_execute(&format!(
        "INSERT INTO queue_limit VALUES ('optimiser', 4, 2, true, now());
         -- A day of work.
         INSERT INTO job_history (job_id, job_reference, workflow_type, registered_at, submitted_at,
                                  running_at, finished_at, starts, outcome, result_bytes, why)
         SELECT gen_random_uuid(), 'heat network ' || chr(65 + number % 26) || ', variant ' || number,
                (ARRAY['simulator', 'optimise_and_simulate'])[1 + number % 2],
                at - interval '9 min', at - interval '9 min', at - interval '6 min', at, 1,
                CASE WHEN number % 17 = 3 THEN 'FAILED' WHEN number % 41 = 5 THEN 'CANCELLED'
                     WHEN number % 53 = 11 THEN 'TIMED_OUT' ELSE 'SUCCEEDED' END,
                12345 * number,
                CASE WHEN number % 17 = 3 THEN 'ValueError: the network has no producer' END
         FROM generate_series(1, 240) AS number,
              LATERAL (SELECT now() - make_interval(secs => 70 + 340 * number + 60 * (number % 7))) AS moment (at);
         INSERT INTO job_history (job_id, job_reference, workflow_type, registered_at, submitted_at,
                                  running_at, finished_at, starts, outcome, result_bytes, why)
         VALUES ('{FAILED}', 'Delft south, 4th try', 'optimise_and_simulate', now() - interval '50 min',
                 now() - interval '50 min', now() - interval '48 min', now() - interval '12 min', 2, 'FAILED', 5120,
                 'InfeasibleError: demand of Household_7 cannot be met');
         INSERT INTO job_step (job_id, number, attempt, fallback, title, task, celery_id, submitted_at,
                               started_at, finished_at, outcome, starts, output_bytes, logs, why)
         VALUES ('{FAILED}', 1, 1, 0, 'Optimise', 'optimiser', 'a-1', now() - interval '50 min',
                 now() - interval '48 min', now() - interval '30 min', 'SUCCEEDED', 1, 40960, 'solved', NULL),
                ('{FAILED}', 2, 1, 0, 'Simulate', 'simulator', 'a-2', now() - interval '30 min',
                 now() - interval '28 min', now() - interval '12 min', 'FAILED', 1, 0,
                 E'reading\\nInfeasibleError: demand of Household_7 cannot be met',
                 'InfeasibleError: demand of Household_7 cannot be met');
         -- What runs: one of two steps, one that says nothing, one that takes too long, one as ever.
         INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at, submitted_at, running_at,
                          timeout_after_ms, job_reference, priority, progress, progress_message, progress_at)
         VALUES ('{RUNNING}', 't-1', 'optimise_and_simulate', 'RUNNING', now() - interval '7 min',
                 now() - interval '7 min', now() - interval '6 min', NULL, 'Rotterdam harbour, phase 2', 'HIGH', 0.62,
                 'Simulating: hour 2104 of 8760, 3 iterations in the last one, the residual is 1.2e-5', now()),
                (gen_random_uuid(), 't-2', 'simulator', 'RUNNING', now() - interval '22 min', now() - interval '22 min',
                 now() - interval '21 min', 7200000, 'Groningen, all variants of the return temperature', 'MEDIUM', 0.4,
                 'Assembling', now() - interval '14 min'),
                (gen_random_uuid(), 't-3', 'simulator', 'RUNNING', now() - interval '2 h', now() - interval '2 h',
                 now() - interval '100 min', 7200000, 'Zwolle', 'MEDIUM', 0.97, 'Writing the time series', now()),
                (gen_random_uuid(), 't-4', 'simulator', 'RUNNING', now() - interval '3 min', now() - interval '3 min',
                 now() - interval '1 min', 1800000, '', 'MEDIUM', 0.05, 'Reading the ESDL', now());
         INSERT INTO job_input VALUES ('{RUNNING}', '{steps}', '{{}}', '', NULL);
         INSERT INTO job_step (job_id, number, attempt, fallback, title, task, celery_id, submitted_at,
                               started_at, finished_at, outcome, starts, output_bytes)
         VALUES ('{RUNNING}', 1, 1, 0, 'Optimise', 'optimiser', 't-0', now() - interval '7 min',
                 now() - interval '6 min', now() - interval '3 min', 'SUCCEEDED', 1, 40960),
                ('{RUNNING}', 2, 1, 0, 'Simulate', 'simulator', 't-1', now() - interval '3 min',
                 now() - interval '170 s', NULL, NULL, NULL, NULL);
         INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at, submitted_at, job_reference, priority)
         SELECT gen_random_uuid(), 'w-' || number, 'simulator', 'SUBMITTED', now() - make_interval(secs => 400 - 40 * number),
                now() - make_interval(secs => 400 - 40 * number), 'Utrecht, connection ' || number, 'MEDIUM'
         FROM generate_series(1, 5) AS number;
         WITH held AS (
             INSERT INTO job (job_id, workflow_type, status, registered_at, job_reference, priority)
             SELECT gen_random_uuid(), 'optimiser', 'REGISTERED', now() - make_interval(mins => 9 - number),
                    'anna/district ' || number, CASE number WHEN 3 THEN 'LOW' ELSE 'MEDIUM' END
             FROM generate_series(1, 3) AS number RETURNING job_id, registered_at, job_reference, priority
         )
         INSERT INTO job_turn (job_id, queue, owner, priority, held_at, on_hold)
         SELECT job_id, 'optimiser', 'anna', priority, registered_at, job_reference LIKE '%2' FROM held"
    ))
    .unwrap();
}

/// Workers, as of now: until they are asked themselves, some of whom are not there.
pub fn plant_workers(sql: &mut Client) {
    let workers = format!(
        "DELETE FROM worker; DELETE FROM worker_task; DELETE FROM absent_task; DELETE FROM worker_look;
         INSERT INTO worker_look (looked_at) VALUES (now() - interval '8 s');
         INSERT INTO worker (host, state, state_since, first_seen, last_seen, misses, pool, pool_size, celery,
                             queues, serves, process_count, begun, samples)
         SELECT host, state, now() - make_interval(mins => minutes), now() - interval '2 d', now(), 0, 'prefork', 1,
                '5.4.0', queues, queues, 40, 40, '[]'
         FROM (VALUES ('worker-simulator@a1', 'busy', 3, '[\"simulator\"]'), ('worker-simulator@a2', 'busy', 21, '[\"simulator\"]'),
                      ('worker-optimiser@b1', 'idle', 12, '[\"optimiser\"]'), ('worker-optimiser@b2', 'draining', 2, '[\"optimiser\"]'))
              AS workers (host, state, minutes, queues);
         INSERT INTO worker_task VALUES ('worker-simulator@a1', 't-1', 'simulator', '{RUNNING}', now() - interval '3 min', now(), true)"
    );
    // The service may write about workers at the same time, in another order.
    eventually("workers are planted", || {
        match sql.batch_execute(&workers) {
            Ok(()) => Some(()),
            Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => None,
            Err(error) => panic!("{error:?}"),
        }
    });
}
