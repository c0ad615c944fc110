"""An SDK client that submits jobs as its first argument says and tells what it hears of each.

The argument is JSON: `jobs`, a list of objects with `workflow`, `params` and optionally `priority`,
`reference`, `cancel_on` (a status, or "submission") and `after` (a file that has to be there first); an
object with `cancel`, a number, is a cancel of the job in this place of those so far. A JSON list with an object
for each job goes to the file that the second argument names.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
import uuid

from omotes_sdk.config import RabbitMQConfig
from omotes_sdk.omotes_interface import OmotesInterface, UnknownWorkflowException
from omotes_sdk.workflow_type import WorkflowType
from omotes_sdk_protocol.job_pb2 import JobResult, JobStatusUpdate

ESDL = """<?xml version='1.0' encoding='UTF-8'?>
<esdl:EnergySystem xmlns:esdl="http://www.tno.nl/esdl" id="input" name="network"/>
"""
PATIENCE_SECONDS = 300

logging.getLogger("omotes_sdk").setLevel(logging.WARNING)


class Story:
    """What becomes of one job."""

    def __init__(self, order):
        self.order = order
        self.heard = {"statuses": [], "progress": []}
        self.finished = threading.Event()
        self.changed = threading.Condition()

    def on_status(self, job, update):
        with self.changed:
            self.heard["statuses"].append(JobStatusUpdate.JobStatus.Name(update.status))
            self.changed.notify_all()

    def on_progress(self, job, update):
        self.heard["progress"].append([update.progress, update.message])

    def on_finished(self, job, result):
        self.heard["result"] = JobResult.ResultType.Name(result.result_type)
        self.heard["output_esdl"] = result.output_esdl
        self.heard["logs"] = result.logs
        self.heard["messages"] = [
            [one.technical_message, one.severity, one.esdl_object_id]
            for one in result.esdl_messages
        ]
        self.finished.set()

    def wait_for_status(self, status):
        with self.changed:
            heard = self.changed.wait_for(
                lambda: status in self.heard["statuses"], PATIENCE_SECONDS
            )
        assert heard, f"no status {status}: {self.heard}"


def main():
    orders = json.loads(sys.argv[1])["jobs"]
    config = RabbitMQConfig(
        host="127.0.0.1",
        port=int(os.environ["SDK_RABBITMQ_PORT"]),
        username=os.environ["SDK_RABBITMQ_USERNAME"],
        password=os.environ["SDK_RABBITMQ_PASSWORD"],
        virtual_host=os.environ["SDK_RABBITMQ_VIRTUALHOST"],
    )
    sdk = OmotesInterface(config, f"client-{uuid.uuid4()}")
    sdk.start()
    workflows = sdk.get_workflow_type_manager()
    stories = []
    for order in orders:
        while "after" in order and not os.path.exists(order["after"]):
            time.sleep(0.05)
        if "cancel" in order:
            sdk.delete_job(stories[order["cancel"]].job)
            continue
        story = Story(order)
        stories.append(story)
        workflow = workflows.get_workflow_by_name(order["workflow"])
        if workflow is None:
            # The SDK refuses it; a client with an older list of workflows does not.
            workflow = WorkflowType(order["workflow"], "unknown")
            workflows._workflows[order["workflow"]] = workflow
        job = sdk.submit_job(
            esdl=ESDL,
            params_dict=order["params"],
            workflow_type=workflow,
            job_timeout=None,
            callback_on_finished=story.on_finished,
            callback_on_progress_update=story.on_progress,
            callback_on_status_update=story.on_status,
            # The client would delete the queue of a status that it has not read yet.
            auto_disconnect_on_result=False,
            job_reference=order.get("reference"),
            **({"job_priority": order["priority"]} if "priority" in order else {}),
        )
        story.job = job
        story.heard["id"] = str(job.id)
        if "cancel_on" in order:
            if order["cancel_on"] != "submission":
                story.wait_for_status(order["cancel_on"])
            sdk.delete_job(job)
    for story in stories:
        assert story.finished.wait(PATIENCE_SECONDS), f"no result: {story.heard}"
        if story.heard["result"] == "CANCELLED":
            story.wait_for_status("CANCELLED")
    sdk.stop()
    # Not to standard output: to which the SDK logs, at any time.
    with open(sys.argv[2], "w") as file:
        json.dump([story.heard for story in stories], file)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        # The SDK's threads would keep the process alive.
        sys.stderr.flush()
        os._exit(1)
