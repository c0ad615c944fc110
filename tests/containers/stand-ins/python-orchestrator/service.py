"""Stands in for the Python orchestrator 1.2.6 on a deployment: the same queues, messages and rows.

Real in it are the SDK's own consumer with its prefetch of 1, its messages, names and definitions, Celery as the one
who sends tasks and revokes, SQLAlchemy's statements on the tables and Alembic at the start. Written anew, after what
is known of that service, is what goes on in between. It has no timeouts, no retention and no InfluxDB.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import uuid
from urllib.parse import quote

from celery import Celery
from google.protobuf import json_format
from omotes_sdk.config import RabbitMQConfig
from omotes_sdk.internal.common.broker_interface import AMQPQueueType, BrokerInterface
from omotes_sdk.queue_names import OmotesQueueNames as Names
from omotes_sdk.workflow_type import WorkflowTypeManager
from omotes_sdk_protocol.internal.task_pb2 import TaskProgressUpdate, TaskResult
from omotes_sdk_protocol.job_pb2 import JobDelete, JobProgressUpdate, JobResult, JobStatusUpdate, JobSubmission
from sqlalchemy import create_engine, delete, func, select
from sqlalchemy.orm import Session

from tables import Job, JobStart, JobStatus, now

log = logging.getLogger("stand-in")
CRASH_LOOP = "Job cannot be processed due to being retried the maximum number of times."
STARTS = int(os.environ.get("DELIVERY_LIMIT_THRESHOLD_PER_JOB", "1"))
PRIORITIES = {JobSubmission.LOW: 2, JobSubmission.MEDIUM: 4, JobSubmission.HIGH: 6}


def rabbitmq(prefix):
    def value(name, default):
        return os.environ.get(f"{prefix}_RABBITMQ_{name}", default)

    return RabbitMQConfig(
        host=value("HOSTNAME", "localhost"), port=int(value("PORT", "5672")), username=value("USERNAME", "omotes"),
        password=value("PASSWORD", "guest"), virtual_host=value("VIRTUALHOST", "omotes"),
    )


def database_url():
    env = os.environ
    user, password = quote(env["POSTGRESQL_USERNAME"], safe=""), quote(env["POSTGRESQL_PASSWORD"], safe="")
    return f"postgresql://{user}:{password}@{env['POSTGRESQL_HOST']}:{env['POSTGRESQL_PORT']}/{env['POSTGRESQL_DATABASE']}"


class Orchestrator:
    def __init__(self):
        self.workflows = WorkflowTypeManager.from_json_config_file(os.environ["WORKFLOW_CONFIG_PATH"])
        self.engine = create_engine(database_url())
        celery = rabbitmq("CELERY")
        self.celery = Celery(
            broker=f"pyamqp://{celery.username}:{celery.password}@{celery.host}:{celery.port}/{celery.virtual_host}"
        )
        self.celery.conf.task_queue_max_priority = 10
        self.sdk = BrokerInterface(rabbitmq("SDK"))
        self.workers = BrokerInterface(rabbitmq("TASK"))
        # Of a job, its row included, one message is handled at a time.
        self.lock = threading.RLock()

    def start(self):
        self.workers.start()
        for variable, default, handle in [
            ("TASK_RESULT_QUEUE_NAME", "omotes_task_result_events", self.on_result),
            ("TASK_PROGRESS_QUEUE_NAME", "omotes_task_progress_events", self.on_progress),
        ]:
            self.workers.declare_queue_and_add_subscription(
                os.environ.get(variable, default), self.one_by_one(handle), AMQPQueueType.DURABLE
            )
        self.sdk.start()
        exchange = Names.omotes_exchange_name()
        self.sdk.declare_exchange(exchange)
        requests = Names.request_available_workflows_queue_name()
        for queue, handle, kind in [
            (Names.job_submission_queue_name(), self.on_submission, AMQPQueueType.DURABLE),
            (Names.job_delete_queue_name(), self.on_cancel, AMQPQueueType.DURABLE),
            (requests, lambda _: self.announce(), AMQPQueueType.EXCLUSIVE),
        ]:
            self.sdk.declare_queue_and_add_subscription(
                queue, self.one_by_one(handle), kind, bind_to_routing_key=queue, exchange_name=exchange
            )
        self.announce()

    def stop(self):
        self.sdk.stop()
        self.workers.stop()
        self.celery.close()

    def one_by_one(self, handle):
        def handler(body):
            with self.lock:
                handle(body)

        return handler

    def tell(self, key, message):
        self.sdk.send_message_to(Names.omotes_exchange_name(), key, message.SerializeToString())

    def announce(self):
        self.tell(Names.available_workflows_routing_key(), self.workflows.to_pb_message())

    def tell_status(self, job_id, status):
        update = JobStatusUpdate(uuid=str(job_id), status=status)
        self.tell(Names.job_status_queue_name(job_id), update)

    def end(self, session, job_id, **result):
        self.tell(Names.job_results_queue_name(job_id), JobResult(uuid=str(job_id), **result))
        session.execute(delete(JobStart).where(JobStart.job_id == job_id))
        session.execute(delete(Job).where(Job.job_id == job_id))
        session.commit()

    def revoke(self, task_id):
        self.celery.control.revoke(task_id=task_id, terminate=True, signal="SIGTERM")

    def on_submission(self, body):
        message = JobSubmission.FromString(body)
        job_id = uuid.UUID(message.uuid)
        name = message.workflow_type
        if self.workflows.get_workflow_by_name(name) is None:
            logs = f"Workflow type {name} is unknown by orchestrator at the time this submission was received."
            result = JobResult(uuid=message.uuid, result_type=JobResult.ERROR, logs=logs)
            self.tell(Names.job_results_queue_name(job_id), result)
            return
        with Session(self.engine) as session:
            job = session.get(Job, job_id)
            if job is not None and job.status != JobStatus.REGISTERED:
                log.warning("job %s was submitted before", job_id)
                return
            if job is None:
                timeout = message.timeout_ms if message.HasField("timeout_ms") else None
                job = Job(
                    job_id=job_id, workflow_type=name, status=JobStatus.REGISTERED, registered_at=now(),
                    timeout_after_ms=timeout, job_reference=message.job_reference,
                )
                session.add(job)
                session.commit()
            reference = message.job_reference if message.HasField("job_reference") else None
            arguments = (job_id, reference, message.esdl, json_format.MessageToDict(message.params_dict))
            priority = PRIORITIES[message.job_priority if message.HasField("job_priority") else JobSubmission.MEDIUM]
            task = self.celery.signature(name, arguments, queue=name, priority=priority).delay()
            job.celery_id, job.status, job.submitted_at = task.task_id, JobStatus.SUBMITTED, now()
            session.commit()
        log.info("job %s is submitted", job_id)

    def on_cancel(self, body):
        job_id = uuid.UUID(JobDelete.FromString(body).uuid)
        with Session(self.engine) as session:
            job = session.get(Job, job_id)
            if job is None or job.celery_id is None:
                log.warning("nothing to cancel: job %s", job_id)
                return
            self.revoke(job.celery_id)
            self.tell_status(job_id, JobStatusUpdate.CANCELLED)
            self.end(session, job_id, result_type=JobResult.CANCELLED, logs="")
        log.info("job %s is cancelled", job_id)

    def current(self, session, event):
        """The row of the job whose current task an event of a worker is about."""
        if self.workflows.get_workflow_by_name(event.celery_task_type) is None:
            log.error("an event of %s, which is no workflow", event.celery_task_type)
            return None
        job = session.get(Job, uuid.UUID(event.job_id))
        if job is not None and job.celery_id == event.celery_task_id:
            return job
        log.warning("an event of a task that is not job %s's", event.job_id)
        return None

    def on_progress(self, body):
        event = TaskProgressUpdate.FromString(body)
        with Session(self.engine) as session:
            job = self.current(session, event)
            if job is None:
                self.revoke(event.celery_task_id)
                return
            if event.HasField("status") and event.status == TaskProgressUpdate.START:
                starts = session.scalar(select(func.count()).where(JobStart.job_id == job.job_id))
                if starts >= STARTS:
                    self.revoke(job.celery_id)
                    self.tell_status(job.job_id, JobStatusUpdate.CANCELLED)
                    self.end(session, job.job_id, result_type=JobResult.ERROR, logs=CRASH_LOOP)
                    return
                job.status, job.running_at = JobStatus.RUNNING, now()
                session.add(JobStart(job_id=job.job_id, started_at=now()))
                session.commit()
                self.tell_status(job.job_id, JobStatusUpdate.RUNNING)
            if event.HasField("progress"):
                update = JobProgressUpdate(uuid=event.job_id, progress=event.progress, message=event.message)
                self.tell(Names.job_progress_queue_name(job.job_id), update)

    def on_result(self, body):
        event = TaskResult.FromString(body)
        with Session(self.engine) as session:
            job = self.current(session, event)
            if job is None:
                return
            succeeded = event.result_type == TaskResult.SUCCEEDED
            self.end(
                session, job.job_id, result_type=JobResult.SUCCEEDED if succeeded else JobResult.ERROR,
                output_esdl=event.output_esdl, logs=event.logs, esdl_messages=event.esdl_messages,
            )
        log.info("job %s has ended", event.job_id)


def main():
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    environment = {**os.environ, "DATABASE_URL": database_url()}
    subprocess.run(["alembic", "-c", "alembic/alembic.ini", "upgrade", "head"], check=True, env=environment)
    orchestrator = Orchestrator()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    orchestrator.start()
    log.info("ready")
    stop.wait()
    orchestrator.stop()


if __name__ == "__main__":
    main()
