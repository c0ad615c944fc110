"""A deployment as an operator makes it: a copy of the project, an .env, `docker compose up`; and its clients
and workers, which run beside it and reach it through the ports that it publishes."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

from docker import ROOT, run, succeeds

PYTHON = ROOT / "tests/python"
# What compose expands, begins a comment, or ends a quotation means itself in single quotes. RabbitMQ's are milder,
# for the SDK's workers write theirs into a URL as it is.
PASSWORD = 'so#me "pa$$" w${HOME}rd'
RABBITMQ_PASSWORD = 'some$$"${HOME}'


def images_named():
    """The images that Dockerfile and docker-compose.yml name."""
    text = (ROOT / "Dockerfile").read_text() + (ROOT / "docker-compose.yml").read_text()
    named = re.findall(r"^(?:FROM| +image:) (\S+:\S+)", text, re.MULTILINE)
    return [image for image in named if image.split(":")[0] in ("debian", "rust", "rabbitmq", "postgres", "influxdb")]


def eventually(what, attempt, seconds=120):
    """Waits until `attempt` gives something; the bound only guards against hanging."""
    patience = time.monotonic() + seconds
    while True:
        try:
            found, why = attempt(), ""
        except (OSError, RuntimeError, ValueError) as error:
            found, why = None, f": {error}"
        if found:
            return found
        assert time.monotonic() < patience, f"{what}: not within {seconds} s{why}"
        time.sleep(0.2)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outside():
    """The environment without what would go before an .env."""
    ours = ("SDK_", "TASK_", "CELERY_", "POSTGRES", "INFLUXDB_", "RABBITMQ_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


class Site:
    def __init__(self, folder):
        self.folder = folder
        self.project = f"omotes-check-{uuid.uuid4().hex[:8]}"
        self.daemon = None
        self.files = ["docker-compose.yml"]
        self.children = []
        self.gates = []
        self.client = {}
        self.worker = {}
        # Whether an image of an earlier version is wanted. Set by the first check: whether there is an image of an earlier version, and what the build said.
        self.wants_before = False
        self.has_before = False
        self.build_output = ""
        shutil.rmtree(folder, ignore_errors=True)

    # --- Files ------------------------------------------------------------------------------------

    def copy_project(self, folder=None, commit=None):
        """What the image is built from, and what a deployment takes from it; of an earlier commit its program."""
        folder = folder or self.folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if commit:
            archive = subprocess.run(
                ["git", "-C", ROOT, "-c", "tar.umask=0022", "archive", commit, "Cargo.toml", "Cargo.lock", "build.rs", "src", "migrations", "config"],
                check=True, stdout=subprocess.PIPE,
            ).stdout
            subprocess.run(["tar", "-C", folder, "-x"], input=archive, check=True)
        else:
            for name in ["Cargo.toml", "Cargo.lock", "build.rs", ".env-template", "docker-compose.yml"]:
                shutil.copy(ROOT / name, folder)
            for name in ["src", "migrations", "config"]:
                shutil.copytree(ROOT / name, folder / name)
        for name in ["Dockerfile", ".dockerignore"]:
            shutil.copy(ROOT / name, folder)
        return folder

    def configure(self):
        """`cp .env-template .env`, with free ports and passwords of its own."""
        ports = {name: free_port() for name in
                 ["SDK_RABBITMQ_PORT", "POSTGRESQL_PORT", "INFLUXDB_PORT", "RABBITMQ_MANAGEMENT_PORT"]}
        lines = (self.folder / ".env-template").read_text().splitlines()
        env = [line for line in lines if line.split("=")[0] not in ports]
        env = [re.sub(r"^(\w+_RABBITMQ_PASSWORD)=.*", lambda found: f"{found[1]}='{RABBITMQ_PASSWORD}'", line) for line in env]
        env = [re.sub(r"^(POSTGRESQL_PASSWORD|INFLUXDB_PASSWORD)=.*", lambda found: f"{found[1]}='{PASSWORD}'", line) for line in env]
        env += [f"{name}={port}" for name, port in ports.items()]
        (self.folder / ".env").write_text("\n".join(env) + "\n")
        shutil.copy(PYTHON / "workflows.json", self.folder / "config/workflow_config.json")
        common = {"PORT": str(ports["SDK_RABBITMQ_PORT"]), "USERNAME": "omotes", "PASSWORD": RABBITMQ_PASSWORD}
        self.client = {**common, "VIRTUALHOST": "omotes"}
        self.worker = {**common, "VIRTUALHOST": "omotes_celery"}
        self.limit_files()

    def limit_files(self):
        """A daemon that may not open as many files as docker-compose.yml asks for gives what it has."""
        allowed = self.daemon.files_allowed()
        if allowed is not None and allowed < 65536:
            self.override("files.yml", {"rabbitmq": {"ulimits": {"nofile": {"soft": allowed, "hard": allowed}}}})

    def override(self, name, services, **others):
        text = json.dumps({"services": services, **others})
        # In place of the other one, not in addition to it.
        (self.folder / name).write_text(text.replace('"env_file": [', '"env_file": !override ['))
        if name not in self.files:
            self.files.append(name)

    # --- docker compose ---------------------------------------------------------------------------

    def compose(self, *arguments, quiet=True):
        files = [part for name in self.files for part in ["-f", name]]
        return run("docker", "compose", "-p", self.project, *files, *arguments, quiet=quiet,
                   cwd=self.folder, env=outside())

    def up(self, *arguments):
        return self.compose("up", "-d", "--wait", "--no-build", *arguments)

    def containers(self, service="orchestrator"):
        return self.compose("ps", "-a", "-q", service).split()

    def restart_rest(self):
        """One orchestrator, as docker-compose.yml has it, whatever a check has left."""
        self.files = [name for name in self.files if name in ("docker-compose.yml", "files.yml")]
        self.up("--force-recreate", "--no-deps", "--scale", "orchestrator=1", "orchestrator")

    def recover(self):
        """For the checks that follow one that has failed."""
        for gate in self.gates:
            gate.touch()
        try:
            if self.containers():
                self.restart_rest()
        except RuntimeError as error:
            print(f"recovering: {error}")

    @property
    def image(self):
        return f"{self.project}-orchestrator"

    @property
    def python_image(self):
        return f"{self.project}-python"

    def page(self, path="/", index=1):
        address = self.compose("port", "--index", str(index), "orchestrator", "8080").strip()
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.read().decode()

    def log(self):
        return self.compose("logs", "--no-color", "--no-log-prefix", "orchestrator")

    def logs(self):
        try:
            said = self.compose("ps", "-a") + "".join(self.log().splitlines(keepends=True)[-40:])
            return "\nThe containers and the orchestrator's last words:\n" + said
        except (RuntimeError, OSError):
            return ""

    # --- Clients and workers ------------------------------------------------------------------------

    def python(self, program, *arguments, **variables):
        name = f"{program}-{len(self.children)}"
        output = self.folder / f"{name}.log"
        with open(output, "w") as file:
            child = subprocess.Popen(
                [sys.executable, PYTHON / f"{program}.py", *arguments], stdin=subprocess.DEVNULL, stdout=file,
                stderr=file, start_new_session=True,
                env={"PATH": os.environ["PATH"], "LOG_LEVEL": "INFO", "PYTHONDONTWRITEBYTECODE": "1",
                     "PYTHONUNBUFFERED": "1", **variables},
            )
        self.children.append(child)
        return child, output

    def start_worker(self):
        variables = {f"RABBITMQ_{name}": value for name, value in self.worker.items()}
        child, output = self.python("worker", RABBITMQ_HOSTNAME="127.0.0.1", WORKER_HOST=f"host-{uuid.uuid4().hex}",
                                    TASK_RESULT_QUEUE_NAME="omotes_task_result_events",
                                    TASK_PROGRESS_QUEUE_NAME="omotes_task_progress_events", **variables)
        eventually(f"a worker that is ready: {output}", lambda: " ready." in output.read_text())
        return child

    def gate(self):
        """A file that does not exist yet: a task can be told to wait for it."""
        self.gates.append(self.folder / f"gate-{uuid.uuid4().hex}")
        return self.gates[-1]

    def submit(self, behaviours, workflow="steerable"):
        """An SDK client with a job for each of these; what it gives waits for their results."""
        return self.submit_orders(
            [{"workflow": workflow, "params": {"behaviour": one, "number": 1.5}} for one in behaviours]
        )

    def submit_orders(self, jobs):
        """The same of orders as tests/python/client.py has them."""
        stories = self.folder / f"stories-{uuid.uuid4().hex}.json"
        variables = {f"SDK_RABBITMQ_{name}": value for name, value in self.client.items()}
        child, output = self.python("client", json.dumps({"jobs": jobs}), str(stories), **variables)

        def results():
            assert child.wait(330) == 0, output.read_text()[-3000:]
            return json.loads(stories.read_text())

        return results

    def job_succeeds(self):
        [story] = self.submit(["succeed"])()
        assert story["result"] == "SUCCEEDED", story
        assert 'id="output-' in story["output_esdl"], story
        assert "RUNNING" in story["statuses"], story

    def end_children(self):
        for child in self.children:
            if child.poll() is None:
                os.killpg(child.pid, 9)
                child.wait()
        self.children = []

    def remove(self):
        self.end_children()
        if (self.folder / ".env").exists():
            try:
                self.compose("down", "-v", "--timeout", "5", "--remove-orphans")
            except RuntimeError as error:
                print(f"cleaning up: {error}")
        # The build's cache in a private daemon is what `keep` is about; it holds these images' layers.
        for image in [self.image, f"{self.image}-before", self.python_image]:
            succeeds("docker", "image", "rm", "-f", image)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(pathlib.Path(f"{self.folder}-before"), ignore_errors=True)
