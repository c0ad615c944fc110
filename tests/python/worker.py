"""A Celery worker made with the SDK's own `initialize_worker`; its tasks do what they are told."""

import inspect
import os
import signal
import socket
import time

# Workers on one host need host names of their own: Celery 5.7 names an exclusive queue after it.
socket.gethostname = lambda: os.environ["WORKER_HOST"]

from omotes_sdk.internal.orchestrator_worker_events.esdl_messages import (  # noqa: E402
    EsdlMessage,
    MessageSeverity,
)
from omotes_sdk.internal.worker.worker import initialize_worker  # noqa: E402


def steerable(input_esdl, params, update_progress, *_task_name):
    behaviour = params["behaviour"]
    print(f"asked to {behaviour}")
    update_progress(0.5, "half way")
    if behaviour == "raise":
        raise RuntimeError("as it was told to")
    if behaviour == "sleep":
        while True:
            time.sleep(0.1)
    if behaviour == "wait":
        while not os.path.exists(params["file"]):
            time.sleep(0.1)
    if behaviour == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    message = EsdlMessage("a remark", MessageSeverity.WARNING, "an-asset")
    output = input_esdl.replace('id="input"', f'id="output-{time.time_ns()}"')
    return (output if behaviour in ("succeed", "wait") else None), [message]


if __name__ == "__main__":
    # Until SDK 4.2 a worker has one type of task, from 4.3 on a list of them.
    several = "task_types" in inspect.signature(initialize_worker).parameters
    initialize_worker(["steerable"] if several else "steerable", steerable)
