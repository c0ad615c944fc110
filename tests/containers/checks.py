"""The checks, in their order: each goes on with what the one before has left, a deployment with one orchestrator."""

import json
import os
import re
import shutil
import subprocess

from docker import ROOT, LeftOut, run
from deployment import PASSWORD, PYTHON, RABBITMQ_PASSWORD, eventually, free_port, outside
from switch import omotes_deployment, switches

MEGABYTE = 1_000_000
PASSWORDS = {
    **dict.fromkeys(["SDK_RABBITMQ", "TASK_RABBITMQ", "CELERY_RABBITMQ"], RABBITMQ_PASSWORD),
    **dict.fromkeys(["POSTGRESQL", "INFLUXDB"], PASSWORD),
}


def inspect(container, what):
    return json.loads(run("docker", "inspect", "--format", f"{{{{json .{what}}}}}", container))


def kill(container):
    """As a crash, and from outside: a kill through docker would count as a wish to stop it."""
    run("docker", "run", "--rm", "--pid=host", "--entrypoint", "sh", "--user", "0",
        re.search(r"^FROM (debian:\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1],
        "-c", f"kill -KILL {inspect(container, 'State.Pid')}")


def compiled(output):
    return set(re.findall(r" Compiling (\S+) v", output))


def commit_before():
    """The last release; before the first one, the commit since which the dependencies are the same, so that they
    are built once for both images."""
    git = ["git", "-C", str(ROOT)]
    try:
        tags = run(*git, "tag", "--list", "v*", "--sort=-version:refname", "--merged", "HEAD~1").split()
        return tags[0] if tags else run(*git, "log", "-1", "--format=%H", "HEAD~1", "--", "Cargo.toml", "Cargo.lock").strip()
    except RuntimeError:
        return ""


def builds(site):
    """the image is built, after one of an earlier version"""
    if not site.wants_before:
        site.copy_project()
        site.configure()
        site.build_output = site.compose("--progress", "plain", "build", "orchestrator")
        return
    before = commit_before()
    if before:
        folder = site.copy_project(site.folder.with_name("site-before"), before)
        run("docker", "build", "-q", "-t", f"{site.image}-before", folder)
    site.copy_project()
    site.configure()
    if not before:
        main = site.folder / "src/main.rs"
        text = main.read_text()
        main.write_text(text + "// Changed.\n")
        run("docker", "build", "-q", "-t", f"{site.image}-before", site.folder)
        main.write_text(text)
    site.has_before = bool(before)
    site.build_output = site.compose("--progress", "plain", "build", "orchestrator")


def caches_dependencies(site):
    """a change in the sources compiles the program alone"""
    anew = compiled(site.build_output)
    print(f"    compiled anew: {', '.join(sorted(anew)) or 'nothing'}")
    assert anew <= {"omotes-orchestrator"}, anew


def is_small_and_labelled(site):
    """the image is small, labelled, pinned and not root's"""
    size = inspect(site.image, "Size")
    print(f"    {size / MEGABYTE:.0f} MB")
    assert size < 120 * MEGABYTE, size
    labels = inspect(site.image, "Config.Labels")
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    assert labels["org.opencontainers.image.version"] == version, labels
    assert inspect(site.image, "Config.User") == "orchestrator"
    for image in re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE):
        assert re.search(r":\d+\.\d+", image), f"{image} names no fixed version"


def traces_name_lines(site):
    """a stack trace from the image names file and line"""
    said = subprocess.run(
        ["docker", "run", "--rm", "-e", "WORKFLOW_CONFIG_PATH=/nowhere", site.image, "run"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    assert said.returncode == 1, said
    assert re.search(r" \./build/src/\S+\.rs:\d+", said.stdout), said.stdout


def comes_up(site):
    """docker compose up --wait: all services become healthy"""
    site.up()
    for container in site.containers():
        assert inspect(container, "State.Health.Status") == "healthy"
    site.start_worker()


def does_a_job(site):
    """a job from the SDK through a Celery worker and back"""
    site.job_succeeds()


def reads_env_as_compose(site):
    """a password of hard characters is the same to all of them"""
    [container] = site.containers()
    environment = inspect(container, "Config.Env")
    for name, password in PASSWORDS.items():
        assert f"{name}_PASSWORD={password}" in environment, environment
    eventually("InfluxDB is healthy", lambda: inspect(site.containers("influxdb")[0], "State.Health.Status") == "healthy")


def shows_its_page(site):
    """the status page through its published port"""
    assert "steerable" in site.page()
    assert site.page("/health/ready")


def tells_its_log(site):
    """the log has each job and no password"""
    log = site.log()
    assert " job " in log, log
    assert not any(password in log for password in PASSWORDS.values())


def survives_a_kill_of_one_of_three(site):
    """--scale orchestrator=3, one is killed and restarts: nothing is lost"""
    site.up("--scale", "orchestrator=3", "--no-recreate")
    assert len(site.containers()) == 3
    gate = site.gate()
    results = site.submit([f"wait for {gate}"] * 4 + ["succeed"] * 4)
    eventually("a job runs", lambda: "RUNNING" in site.page("/api/jobs"))
    victim = site.containers()[0]
    kill(victim)
    eventually("it is restarted", lambda: inspect(victim, "RestartCount") == 1)
    gate.touch()
    stories = results()
    assert [story["result"] for story in stories] == ["SUCCEEDED"] * 8, stories
    eventually("healthy again", lambda: inspect(victim, "State.Health.Status") == "healthy")
    site.up("--scale", "orchestrator=1", "--no-recreate")


def stops(site):
    """docker stop: code 0 within five seconds, also with a job in flight"""
    gate = site.gate()
    results = site.submit([f"wait for {gate}"])
    eventually("a job runs", lambda: "RUNNING" in site.page("/api/jobs"))
    [container] = site.containers()
    # After these seconds docker would kill it, and the code would be 137.
    run("docker", "stop", "--time", "5", container)
    assert inspect(container, "State.ExitCode") == 0
    gate.touch()
    run("docker", "start", container)
    assert results()[0]["result"] == "SUCCEEDED"


def more_workflows(name):
    workflows = json.loads((PYTHON / "workflows.json").read_text())
    return json.dumps([*workflows, {"workflow_type_name": name, "workflow_type_description_name": name}])


def reloads_definitions(site):
    """a folder of definitions is mounted; SIGHUP reloads it"""
    # As an editor does it: a new file takes the old one's place.
    (site.folder / "config/new").write_text(more_workflows("added_by_an_editor"))
    (site.folder / "config/new").rename(site.folder / "config/workflow_config.json")
    site.compose("kill", "-s", "HUP", "orchestrator")
    eventually("the new workflow is shown", lambda: "added_by_an_editor" in site.page())
    (site.folder / "config/workflow_config.json").write_text("[{]")
    site.compose("kill", "-s", "HUP", "orchestrator")
    eventually("the fault is told", lambda: "/config/workflow_config.json" in site.log())
    assert "added_by_an_editor" in site.page()
    (site.folder / "config/workflow_config.json").write_text((PYTHON / "workflows.json").read_text())


def runs_in_a_narrow_container(site):
    """read-only, no capabilities, 256 MiB, secrets, one file mounted"""
    (site.folder / "one.json").write_text(more_workflows("from_one_file"))
    environment, secrets = {}, {}
    for name, password in PASSWORDS.items():
        secret = name.lower()
        (site.folder / secret).write_text(password + "\n")
        environment[f"{name}_PASSWORD_FILE"] = f"/run/secrets/{secret}"
        secrets[secret] = {"file": f"./{secret}"}
    # Not both: a password besides its file is refused.
    env = (site.folder / ".env").read_text()
    (site.folder / "without-passwords.env").write_text(re.sub(r"^\w+_PASSWORD=.*\n", "", env, flags=re.MULTILINE))
    environment["WORKFLOW_CONFIG_PATH"] = "/definitions.json"
    narrow = {
        "read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"], "mem_limit": "256m",
        "env_file": ["without-passwords.env"], "environment": environment, "secrets": list(secrets),
        "volumes": ["./one.json:/definitions.json:ro"],
    }
    site.override("narrow.yml", {"orchestrator": narrow}, secrets=secrets)
    site.up("--force-recreate", "--no-deps", "orchestrator")
    [container] = site.containers()
    assert inspect(container, "HostConfig.ReadonlyRootfs") and inspect(container, "HostConfig.Memory") == 256 << 20
    assert run("docker", "exec", container, "id", "-u").strip() != "0"
    environment = "\n".join(inspect(container, "Config.Env"))
    assert not any(password in environment for password in PASSWORDS.values())
    site.job_succeeds()
    assert "from_one_file" in site.page()
    # In place, for the mount is of this very file.
    (site.folder / "one.json").write_text(more_workflows("changed_in_the_file"))
    site.compose("kill", "-s", "HUP", "orchestrator")
    eventually("the changed workflow is shown", lambda: "changed_in_the_file" in site.page())
    assert not inspect(container, "State.OOMKilled") and inspect(container, "RestartCount") == 0
    site.restart_rest()


def tells_a_broken_service(site):
    """the health check becomes unhealthy without RabbitMQ, and healthy again"""
    [container] = site.containers()
    site.compose("stop", "rabbitmq")
    eventually("unhealthy", lambda: inspect(container, "State.Health.Status") == "unhealthy")
    site.compose("start", "rabbitmq")
    eventually("healthy", lambda: inspect(container, "State.Health.Status") == "healthy", 180)
    assert inspect(container, "RestartCount") == 0


def upgrades(site):
    """an upgrade from the earlier version with jobs in flight"""
    if not site.has_before:
        raise LeftOut("this clone has no history to build an earlier version from")
    site.compose("rm", "-s", "-f", "orchestrator")
    # The earlier version is the first on its database, as it was.
    site.compose("exec", "-T", "postgres", "sh", "-c",
                 'for do in "dropdb --force" createdb; do $do -U "$POSTGRES_USER" --maintenance-db=postgres "$POSTGRES_DB"; done')
    site.override("before.yml", {"orchestrator": {"image": f"{site.image}-before"}})
    site.up("orchestrator")
    gate = site.gate()
    results = site.submit([f"wait for {gate}"] * 4)
    eventually("a job runs", lambda: "RUNNING" in site.page("/api/jobs"))
    site.restart_rest()
    assert inspect(site.containers()[0], "Image") == inspect(site.image, "Id")
    gate.touch()
    stories = results()
    assert [story["result"] for story in stories] == ["SUCCEEDED"] * 4, stories


def replaces_the_python_service(site):
    """in an OMOTES deployment's compose file, in the orchestrator's place"""
    with omotes_deployment(site, "omotes", site.image) as omotes:
        omotes.up("orchestrator")
        omotes.start_worker()
        omotes.job_succeeds()


def falls_back_to_programs(site):
    """./run.sh with a daemon that can pull nothing starts installed programs"""
    if not all(map(shutil.which, ["influxd", "psql"])) and os.getuid() != 0:
        raise LeftOut("this is not root, who could install the programs")
    folder = site.folder.with_name("without-images")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in ["run.sh", ".env-template"]:
        shutil.copy(ROOT / name, folder)
    compose = (ROOT / "docker-compose.yml").read_text()
    # From a registry that does not answer.
    (folder / "docker-compose.yml").write_text(compose.replace(" image: ", f" image: 127.0.0.1:{free_port()}/"))
    ports = {name: free_port() for name in ["SDK_RABBITMQ_PORT", "POSTGRESQL_PORT", "INFLUXDB_PORT"]}
    environment = {**outside(), **{name: str(port) for name, port in ports.items()}, "COMPOSE_PROJECT_NAME": f"{site.project}-none"}
    try:
        said = run("./run.sh", "services", "up", cwd=folder, env=environment)
        assert said.count("docker has no image for it and pulls none, so an installed program is used") == 3, said
        said = run("./run.sh", "services", "status", cwd=folder, env=environment)
        assert said.count("started by this script") == 3, said
        left = run("docker", "ps", "-aq", "--filter", f"label=com.docker.compose.project={site.project}-none")
        left += run("docker", "network", "ls", "-q", "--filter", f"label=com.docker.compose.project={site.project}-none")
        assert left == "", left
    finally:
        run("./run.sh", "services", "down", cwd=folder, env=environment)
        shutil.rmtree(folder)


ALWAYS = [builds, comes_up]
# For which an image of an earlier version is built first.
OF_BEFORE = [caches_dependencies, upgrades]
ALL = [
    builds,
    caches_dependencies,
    is_small_and_labelled,
    traces_name_lines,
    comes_up,
    does_a_job,
    reads_env_as_compose,
    shows_its_page,
    tells_its_log,
    survives_a_kill_of_one_of_three,
    stops,
    reloads_definitions,
    runs_in_a_narrow_container,
    tells_a_broken_service,
    upgrades,
    replaces_the_python_service,
    switches,
    falls_back_to_programs,
]
