-- What would take hours: five hours' history, and jobs whose troubles need time.
INSERT INTO job_history (job_id, job_reference, workflow_type, registered_at, submitted_at, running_at, finished_at,
                         starts, outcome, result_bytes, why)
SELECT gen_random_uuid(), 'dirk/variant ' || number, (ARRAY['simulate', 'calculator'])[1 + number % 2],
       at - interval '6 min', at - interval '6 min', at - make_interval(secs => 200 + 5 * (number % 20)), at, 1,
       CASE WHEN number % 17 = 3 THEN 'FAILED' ELSE 'SUCCEEDED' END, 12345,
       CASE WHEN number % 17 = 3 THEN 'ValueError: the network has no producer' END
FROM generate_series(1, 60) AS number, LATERAL (SELECT now() - make_interval(mins => 10 + 5 * number)) AS moment (at);

-- Runs for much longer than all before it; has said nothing for fourteen minutes; has a task that no worker has.
INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at, submitted_at, running_at, timeout_after_ms,
                 job_reference, priority, progress, progress_message, progress_at)
VALUES ('00000001-5a68-4f0e-9d1b-2f6a6a1f0000', 's-1', 'simulate', 'RUNNING', now() - interval '2 h',
        now() - interval '2 h', now() - interval '100 min', 14400000, 'dirk/overdue', 'MEDIUM', 0.97, 'Writing', now()),
       ('00000002-5a68-4f0e-9d1b-2f6a6a1f0000', 's-2', 'design', 'RUNNING', now() - interval '22 min',
        now() - interval '22 min', now() - interval '21 min', NULL, 'dirk/silent', 'MEDIUM', 0.4, 'Assembling',
        now() - interval '14 min'),
       ('00000003-5a68-4f0e-9d1b-2f6a6a1f0000', 's-3', 'calculator', 'RUNNING', now() - interval '3 min',
        now() - interval '3 min', now() - interval '2 min', NULL, 'dirk/lost while it ran', 'MEDIUM', 0.2, 'Reading', now());
-- Waits for three hours; waits, and its task is nowhere.
INSERT INTO job (job_id, celery_id, workflow_type, status, registered_at, submitted_at, job_reference, priority)
VALUES ('00000004-5a68-4f0e-9d1b-2f6a6a1f0000', 's-4', 'orphan', 'SUBMITTED', now() - interval '3 h',
        now() - interval '3 h', 'dirk/since this morning', 'MEDIUM'),
       ('00000005-5a68-4f0e-9d1b-2f6a6a1f0000', 's-5', 'checker', 'SUBMITTED', now() - interval '4 min',
        now() - interval '4 min', 'dirk/lost while it waited', 'MEDIUM');
