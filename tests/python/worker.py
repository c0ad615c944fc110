"""A Celery worker made with the SDK's own `initialize_worker`; its tasks do what they are told."""

import inspect
import os
import re
import signal
import socket
import time

# Workers on one host need host names of their own: Celery 5.7 names an exclusive queue after it.
socket.gethostname = lambda: os.environ["WORKER_HOST"]

from omotes_sdk.internal.orchestrator_worker_events.esdl_messages import (  # noqa: E402
    EsdlMessage,
    MessageSeverity,
)
from omotes_sdk.internal.worker import worker as sdk  # noqa: E402
from omotes_sdk.internal.worker.worker import initialize_worker  # noqa: E402


# The Celery task that it takes, which leaves its mark in what it puts out.
TASK = os.environ.get("WORKER_TASK", "steerable")
# The kind of Celery's pool, where it is not to be the SDK's.
POOL = os.environ.get("WORKER_POOL")


class CeleryWithPool(sdk.Celery):
    """As somebody may have changed the SDK for a worker that cannot be forked."""

    def Worker(self, autoscale=None, **options):
        return super().Worker(pool=POOL, concurrency=1, **options)


if POOL:
    sdk.Celery = CeleryWithPool


def steerable(input_esdl, params, update_progress, *_task_name):
    behaviour = params["behaviour"]
    print(f"asked to {behaviour}")
    update_progress(0.5, "half way")
    if behaviour == "raise":
        raise RuntimeError("as it was told to")
    if behaviour == "sleep":
        while True:
            time.sleep(0.1)
    if behaviour == "compute":
        while True:
            sum(range(10_000))
    if behaviour == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    waits = behaviour.startswith("wait for ")
    while waits and not os.path.exists(behaviour.removeprefix("wait for ")):
        time.sleep(0.05)
    message = EsdlMessage("a remark", MessageSeverity.WARNING, "an-asset")
    output = input_esdl.replace('id="input"', f'id="output-{time.time_ns()}"')
    if TASK != "steerable":
        # The name is the SDK's.
        before = re.search('description="(.*?)"', output)
        marks = [before[1]] if before else []
        output = re.sub(' description=".*?"', "", output)
        marks = " ".join(marks + [TASK])
        output = output.replace(' id="', f' description="{marks}" id="', 1)
    return (output if waits or behaviour == "succeed" else None), [message]


if __name__ == "__main__":
    # Until SDK 4.2 a worker has one type of task, from 4.3 on a list of them.
    several = "task_types" in inspect.signature(initialize_worker).parameters
    initialize_worker([TASK] if several else TASK, steerable)
