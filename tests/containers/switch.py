"""The rehearsal of examples/deployment/switch.md: from the Python service to this one and back, under load."""

import json
import os
import re
import shlex
import shutil
import subprocess
from contextlib import contextmanager

from docker import HERE, ROOT, LeftOut, run
from deployment import PYTHON, Site, eventually, free_port

WORKERS = 4


@contextmanager
def omotes_deployment(site, name, image):
    """An OMOTES deployment with this image in the orchestrator's place, which does not run yet."""
    omotes = Site(site.folder.with_name(name))
    omotes.daemon = site.daemon
    # Two RabbitMQs at once only cost time.
    site.end_children()
    site.compose("stop")
    try:
        run("cp", "-r", ROOT / "tests/containers/omotes", omotes.folder)
        (omotes.folder / "config").mkdir()
        (omotes.folder / "config/workflow_config.json").write_text((PYTHON / "workflows.json").read_text())
        port = free_port()
        env = (omotes.folder / ".env").read_text().replace("RABBITMQ_PORT=5672", f"RABBITMQ_PORT={port}")
        (omotes.folder / ".env").write_text(f"{env}ORCHESTRATOR_IMAGE={image}\n")
        omotes.limit_files()
        omotes.up("rabbitmq", "omotes_postgres", "omotes_influxdb")
        omotes.compose("cp", "rabbitmq-init.sh", "rabbitmq:/tmp/init.sh")
        omotes.compose("exec", "-T", "rabbitmq", "sh", "/tmp/init.sh", "somepass1", "somepass2")
        common = {"PORT": str(port)}
        omotes.client = {**common, "USERNAME": "omotes", "PASSWORD": "somepass1", "VIRTUALHOST": "omotes"}
        omotes.worker = {**common, "USERNAME": "celery", "PASSWORD": "somepass2", "VIRTUALHOST": "omotes_celery"}
        yield omotes
    except Exception as error:
        raise AssertionError(f"{error}{omotes.logs()}") from error
    finally:
        omotes.remove()


def python_image(site):
    """The image that stands for the Python service, the real one where somebody names it."""
    given = os.environ.get("PYTHON_ORCHESTRATOR_IMAGE")
    if given:
        return given
    folder = site.folder.with_name("python-orchestrator")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "stand-ins/python-orchestrator", folder)
    shutil.copy(PYTHON / "tables.py", folder)
    shutil.copytree(PYTHON / "alembic", folder / "alembic")
    # The place of the authorities is the container's own, and wheels of this machine stay on it.
    told = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    told |= {"PIP_CERT": "/etc/ssl/certs/ca-certificates.crt"}
    told.pop("PIP_FIND_LINKS", None)
    secret = folder.with_name("pip.env")
    secret.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in told.items()))
    base = re.search(r"^FROM (debian:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    try:
        run("docker", "build", "-q", "--build-arg", f"BASE={base}", "-t", site.python_image,
            "--secret", f"id=pip,src={secret}", "--secret", "id=authorities,src=/etc/ssl/certs/ca-certificates.crt",
            folder)
    except RuntimeError as error:
        raise LeftOut(f"the stand-in of the Python service cannot be made: {str(error)[-600:]}") from error
    finally:
        secret.unlink()
        shutil.rmtree(folder)
    return site.python_image


class Load:
    """Jobs in phases, each of which begins when it is told to."""

    def __init__(self, site):
        self.site = site
        self.orders = []
        self.expected = []
        self.begin = []

    def phase(self, *behaviours, cancels=()):
        """Jobs with these behaviours and results; `cancels` are places of jobs in the order of their making."""
        begin = self.site.gate()
        self.begin.append(begin)
        first = len(self.expected)
        for behaviour, result in behaviours:
            params = {"behaviour": behaviour, "number": 1.5}
            self.orders.append({"workflow": "steerable", "params": params, "after": str(begin)})
            self.expected.append(result)
        self.orders += [{"cancel": place, "after": str(begin)} for place in cancels]
        return first

    def start(self):
        return self.site.submit_orders(self.orders)


def usual(*others):
    return [("succeed", "SUCCEEDED")] * 6 + [("raise", "ERROR")] + list(others)


def rehearsal(omotes):
    """The load, and the files that let its waiting tasks go on, one for each switch."""
    first_gate, second_gate = omotes.gate(), omotes.gate()
    waits = [(f"wait for {first_gate}", "SUCCEEDED")] * 2
    waits_longer = [(f"wait for {second_gate}", "SUCCEEDED")] * 2
    cancelled = [("sleep", "CANCELLED")]
    load = Load(omotes)
    before = load.phase(*usual(*waits, *cancelled))
    # One that runs since before, and one of its own, whose cancel arrives as early as its submission.
    last = len(load.expected) + 9
    load.phase(*usual(*waits, *cancelled), cancels=[before + 9, last])
    between = load.phase(*usual(*waits_longer, *cancelled))
    load.phase(*usual(*waits_longer), ("succeed", "SUCCEEDED"), cancels=[between + 9])
    load.phase(*usual(), *[("succeed", "SUCCEEDED")] * 3)
    return load, first_gate, second_gate


def switch(omotes, direction, images, while_nobody_runs):
    """Runs switch.sh, which is held up while nobody runs."""
    go_on = omotes.folder / f"go-{direction}"
    files = " ".join(f"-f {name}" for name in omotes.files)
    wrapper = omotes.folder / f"compose-{direction}"
    wrapper.write_text("\n".join([
        "#!/bin/sh",
        f'if [ "$1" = up ]; then until [ -e {go_on} ]; do sleep 0.1; done; fi',
        f'exec docker compose -p {omotes.project} {files} "$@"',
    ]) + "\n")
    wrapper.chmod(0o755)
    output = omotes.folder / f"switch-{direction}.log"
    with open(output, "w") as file:
        script = subprocess.Popen(
            [ROOT / "examples/deployment/switch.sh", direction], cwd=omotes.folder, stdout=file, stderr=file,
            start_new_session=True, env={**os.environ, **images, "COMPOSE": str(wrapper)},
        )
    omotes.children.append(script)
    try:
        eventually("the old service is stopped", lambda: "starting " in said(script, output))
        while_nobody_runs()
    finally:
        go_on.touch()
    assert script.wait(180) == 0, output.read_text()
    text = output.read_text()
    print("".join(f"    {line}\n" for line in text.splitlines() if re.match(r"switch\.sh|\w+ +Switch", line)), end="")
    return text


def said(script, output):
    text = output.read_text()
    assert script.poll() is None, text
    return text


def waiting(omotes, queue):
    listed = omotes.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "list_queues", "-p", "omotes", "name", "messages")
    found = re.search(rf"^{queue}\s+(\d+)$", listed, re.MULTILINE)
    return int(found[1]) if found else 0


def rows(omotes, sql):
    said = omotes.compose("exec", "-T", "omotes_postgres", "psql", "-At", "-F", " ", "-U", "root", "-d", "omotes_jobs", "-c", sql)
    return [line.split(" ") for line in said.splitlines()]


def runs(omotes):
    """How many jobs have a row and run."""
    return int(rows(omotes, "SELECT count(*) FROM job WHERE status = 'RUNNING'")[0][0])


def switches(site):
    """the switch from the Python service and back, under load"""
    python = python_image(site)
    print(f"    the Python service: {python if python != site.python_image else 'a stand-in'}")
    images = {"OUR_IMAGE": site.image, "PYTHON_IMAGE": python}
    with omotes_deployment(site, "switch", python) as omotes:
        # As the Python service's image does not tell when it is ready.
        omotes.compose("up", "-d", "--no-build", "orchestrator")
        workers = [omotes.start_worker() for _ in range(WORKERS)]
        load, first_gate, second_gate = rehearsal(omotes)
        results = load.start()
        begin = iter(load.begin)
        next(begin).touch()
        # The two that wait, and the one that is cancelled later.
        eventually("jobs run", lambda: runs(omotes) >= 3)

        def nobody_runs():
            next(begin).touch()
            eventually("submissions and cancels wait", lambda: waiting(omotes, "job_submissions") == 10)
            eventually("cancels wait", lambda: waiting(omotes, "job_deletions") >= 1)

        told = switch(omotes, "here", images, nobody_runs)
        assert "jobs are in flight" in told, told
        first_gate.touch()
        next(begin).touch()
        eventually("jobs run", lambda: runs(omotes) >= 3)
        switch(omotes, "back", images, nobody_runs)
        second_gate.touch()
        next(begin).touch()
        judge(omotes, load.expected, results(), workers)


def judge(omotes, expected, stories, workers):
    """Each job has run once and ended as it should, for its client and for the history, and nothing is left."""
    assert len(stories) == 50
    found = [story["result"] for story in stories]
    wrong = [(place, story) for place, story in enumerate(stories) if story["result"] != expected[place]]
    assert found == expected, wrong
    assert all('id="output-' in story["output_esdl"] for story in stories if story["result"] == "SUCCEEDED")
    history = dict(rows(omotes, "SELECT job_id, outcome FROM job_history"))
    by_id = {story["id"]: story["result"] for story in stories}
    told = {job: {"ERROR": "FAILED"}.get(by_id[job], by_id[job]) for job in history}
    assert history and told == history, (history, told)
    eventually("no row is left", lambda: rows(omotes, "SELECT count(*) FROM job") == [["0"]])
    assert waiting(omotes, "job_submissions") == 0 and waiting(omotes, "omotes_dead_letters") == 0
    executions = "".join((omotes.folder / f"worker-{place}.log").read_text() for place in range(len(workers)))
    executed = re.findall(r"Worker started new task (\S+) ", executions)
    assert len(executed) == len(set(executed)), sorted(executed)
    # One that is cancelled before it is taken is never run.
    missing = set(by_id) - set(executed) - {job for job, result in by_id.items() if result == "CANCELLED"}
    assert not missing, missing
    print(f"    {len(stories)} jobs, {len(history)} of them ended by this service")
