"""What the Python orchestrator does with its tables, through SQLAlchemy models like its own.

Usage: tables.py DATABASE_URL TURN, where TURN is JSON: {"register": job, "submit": [job, task],
"start": job, "finish": job, "series": [esdl_id, job]}. Prints, as JSON, the jobs and series that it
found before.
"""

import enum
import json
import sys
import uuid
from datetime import datetime, timedelta, timezone

from sqlalchemy import (
    Column, DateTime, Enum, ForeignKey, Integer, String, Uuid, create_engine, delete, exists, func,
    select, update,
)
from sqlalchemy.orm import Session, declarative_base

Base = declarative_base()


class JobStatus(enum.Enum):
    REGISTERED = "registered"
    SUBMITTED = "submitted"
    RUNNING = "running"


class Job(Base):
    __tablename__ = "job"

    job_id = Column(Uuid(as_uuid=True), primary_key=True)
    celery_id = Column(String)
    workflow_type = Column(String, nullable=False)
    status = Column(Enum(JobStatus, name="jobstatus"), nullable=False)
    registered_at = Column(DateTime(timezone=True), nullable=False)
    submitted_at = Column(DateTime(timezone=True))
    running_at = Column(DateTime(timezone=True))
    timeout_after_ms = Column(Integer)
    job_reference = Column(String)


class JobStart(Base):
    __tablename__ = "job_starts"

    job_id = Column(Uuid(as_uuid=True), ForeignKey(Job.job_id), primary_key=True)
    started_at = Column(DateTime(timezone=True), primary_key=True)


class SeriesInfo(Base):
    __tablename__ = "esdl_time_series_info"

    row_id = Column(Uuid(as_uuid=True), primary_key=True)
    esdl_id = Column(String, unique=True)
    registered_at = Column(DateTime(timezone=True))
    deactivated_at = Column(DateTime(timezone=True))
    job_id = Column(Uuid(as_uuid=True))
    job_reference = Column(String)


def now():
    return datetime.now(timezone.utc)


def found(session):
    starts = dict(session.execute(
        select(JobStart.job_id, func.count()).group_by(JobStart.job_id)
    ).all())
    jobs = {
        str(job.job_id): {
            "status": job.status.name,
            "task": job.celery_id,
            "workflow": job.workflow_type,
            "reference": job.job_reference,
            "timeout": job.timeout_after_ms,
            "starts": starts.get(job.job_id, 0),
            "times": [
                time is not None for time in (job.registered_at, job.submitted_at, job.running_at)
            ],
        }
        for job in session.scalars(select(Job))
    }
    series = {
        info.esdl_id: [str(info.job_id), info.deactivated_at is None]
        for info in session.scalars(select(SeriesInfo))
    }
    return {"jobs": jobs, "series": series}


def register(session, job_id):
    assert not session.scalar(select(exists().where(Job.job_id == job_id)))
    session.add(Job(
        job_id=job_id,
        workflow_type="workflow_1",
        status=JobStatus.REGISTERED,
        registered_at=now() - timedelta(hours=1),
        timeout_after_ms=None,
        job_reference="",
    ))
    session.commit()


def take_turn(session, turn):
    job_id = {name: uuid.UUID(turn[name]) for name in ("register", "start", "finish")}
    register(session, job_id["register"])

    submitted, task = turn["submit"]
    register(session, uuid.UUID(submitted))
    session.execute(
        update(Job)
        .where(Job.job_id == uuid.UUID(submitted))
        .values(status=JobStatus.SUBMITTED, submitted_at=now(), celery_id=task)
    )
    session.commit()

    session.execute(
        update(Job)
        .where(Job.job_id == job_id["start"])
        .values(status=JobStatus.RUNNING, running_at=now())
    )
    session.add(JobStart(job_id=job_id["start"], started_at=now()))
    session.commit()

    # A job's end: its starts first, for the foreign key does not cascade.
    job = session.get(Job, job_id["finish"])
    session.execute(delete(JobStart).where(JobStart.job_id == job.job_id))
    session.delete(job)
    session.commit()

    esdl_id, owner = turn["series"]
    session.add(SeriesInfo(
        row_id=uuid.uuid4(),
        esdl_id=esdl_id,
        registered_at=now(),
        job_id=uuid.UUID(owner),
        job_reference="",
    ))
    session.commit()
    session.execute(
        update(SeriesInfo).where(SeriesInfo.esdl_id == esdl_id).values(deactivated_at=now())
    )
    session.commit()


def main():
    url, turn = sys.argv[1:]
    with Session(create_engine(url)) as session:
        print(json.dumps(found(session)))
        take_turn(session, json.loads(turn))


if __name__ == "__main__":
    main()
