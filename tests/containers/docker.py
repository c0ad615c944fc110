"""The docker daemon that the checks use, and the images that it is to have.

A daemon that answers and pulls the official images is used as it is. Otherwise root on a Debian starts one of
its own, with everything below a folder that goes at the end, and makes images of the same names out of Debian's
packages.
"""

import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import tarfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROGRAMS = ["dockerd", "debootstrap", "iptables", "ip"]
BRIDGE = pathlib.Path("/sys/class/net/docker0")
FORWARDING = pathlib.Path("/proc/sys/net/ipv4/ip_forward")
# The stand-in of the Rust image does not optimise as a release does: of two images of the service, that is most
# of what these checks take.
QUICKLY = {"CARGO_PROFILE_RELEASE_OPT_LEVEL": "1", "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "256"}
# What this machine's cargo is told about its registries goes into the stand-in of the Rust image.
CARGO_VARIABLES = ("CARGO_HTTP_", "CARGO_NET_", "CARGO_REGISTR", "CARGO_SOURCE_")


class LeftOut(Exception):
    """Why this can't be done here, in one line."""


def run(*command, quiet=True, **options):
    """Runs a program to its end and gives what it said; its failure is an error with all of that."""
    ended = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        **options,
    )
    if ended.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: code {ended.returncode}\n{ended.stdout or ''}")
    return ended.stdout


def debian_mirror():
    """Where this machine's apt has Debian 12 from."""
    try:
        known = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Codename: bookworm", "Component: main")
        return known.split()[0]
    except (RuntimeError, IndexError) as error:
        raise LeftOut("apt knows no archive of Debian 12 to make stand-ins from") from error


def succeeds(*command, seconds=600):
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=seconds)
    return ended.returncode == 0


class Daemon:
    """A docker daemon with `docker compose`: `private` when it was started here."""

    def __init__(self, folder):
        self.folder = folder
        self.process = None
        self.private = False
        # What the network was like before, unless another daemon has it in its hands.
        self.network = None

    def find(self, images):
        os.environ["DOCKER_BUILDKIT"] = "1"
        if shutil.which("docker") and succeeds("docker", "info"):
            if not succeeds("docker", "compose", "version"):
                raise LeftOut("the docker here has no `docker compose`")
            if all(self.has(image) for image in images):
                return
            print("a docker daemon answers, but pulls nothing")
        if os.getuid() != 0 or not shutil.which("apt-get"):
            raise LeftOut("no docker daemon that has the images, and this is not root on a Debian to start one")
        self.start()
        if not all(self.has(image) for image in images):
            self.make_images(images)

    @staticmethod
    def has(image):
        return succeeds("docker", "image", "inspect", image) or succeeds("docker", "pull", "-q", image)

    def start(self):
        self.private = True
        self.folder.mkdir(parents=True, exist_ok=True)
        if not all(map(shutil.which, PROGRAMS)):
            print("installing Debian's docker.io, debootstrap, iptables, iproute2")
            self.apt("install", "-y", "--no-install-recommends", "docker.io", "debootstrap", "iptables", "iproute2")
        os.environ["DOCKER_HOST"] = f"unix://{self.folder}/docker.sock"
        os.environ["DOCKER_CONFIG"] = f"{self.folder}/config"
        if not succeeds("docker", "compose", "version") or not succeeds("docker", "buildx", "version"):
            self.add_plugins()
        if succeeds("docker", "info"):
            return
        if not BRIDGE.exists():
            try:
                self.network = run("iptables-save"), FORWARDING.read_text()
            except RuntimeError as error:
                raise LeftOut("this root may not change the network, which a docker daemon does") from error
        for driver in ["overlay2", "vfs"]:
            if self.serves(driver):
                print(f"started a docker daemon of its own ({driver})")
                return
        raise LeftOut(f"no docker daemon starts here, see {self.folder}/log")

    def apt(self, *arguments, **options):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        try:
            run("apt-get", "update", env=environment)
            run("apt-get", *arguments, env=environment, **options)
        except RuntimeError as error:
            raise LeftOut(f"Debian's packages cannot be fetched: {str(error).splitlines()[-1]}") from error

    def add_plugins(self):
        """Debian 12 has only the old docker-compose; the plugins are taken out of Debian 13's packages."""
        apt = self.folder / "apt"
        for name in ["lists/partial", "cache/archives/partial"]:
            (apt / name).mkdir(parents=True, exist_ok=True)
        keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {debian_mirror()} trixie main\n")
        options = ["-o", f"Dir::Etc::SourceList={apt}/sources.list", "-o", "Dir::Etc::SourceParts=/dev/null"]
        options += ["-o", f"Dir::State::Lists={apt}/lists", "-o", f"Dir::Cache={apt}/cache"]
        packages = ["docker-compose/trixie", "docker-buildx/trixie"]
        try:
            run("apt-get", *options, "update")
            run("apt-get", *options, "download", *packages, cwd=apt)
        except RuntimeError as error:
            raise LeftOut("docker's plugins cannot be fetched from Debian 13's packages") from error
        for package in apt.glob("*.deb"):
            run("dpkg-deb", "-x", package, apt)
        plugins = self.folder / "config/cli-plugins"
        shutil.rmtree(plugins, ignore_errors=True)
        shutil.copytree(apt / "usr/libexec/docker/cli-plugins", plugins)
        shutil.rmtree(apt)

    def serves(self, driver):
        command = ["dockerd", "--data-root", self.folder / "data", "--exec-root", self.folder / "exec"]
        command += ["--host", os.environ["DOCKER_HOST"], "--pidfile", self.folder / "pid"]
        command += ["--storage-driver", driver, "--oom-score-adjust", "0"]
        with open(self.folder / "log", "a") as log:
            # In a session of its own: Ctrl-C is for these checks, which stop it when they have cleaned up.
            self.process = subprocess.Popen(
                [str(part) for part in command], stdout=log, stderr=log, start_new_session=True
            )
        patience = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < patience:
            if succeeds("docker", "info"):
                return True
            time.sleep(0.2)
        self.stop()
        return False

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def remove(self, keep):
        self.stop()
        self.restore_network()
        if self.private and not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def restore_network(self):
        """A daemon leaves its bridge and its rules behind."""
        if not self.network:
            return
        rules, forwarding = self.network
        if BRIDGE.exists():
            run("ip", "link", "delete", "docker0")
        # A table that was not there before is emptied: no rules, and each chain of its own accepts.
        for table, chains in re.findall(r"^\*(\w+)\n((?::.*\n)*)", run("iptables-save"), re.MULTILINE):
            if f"*{table}\n" not in rules:
                accept = [f":{chain} ACCEPT\n" for chain in re.findall(r"^:(\S+) [A-Z]", chains, re.MULTILINE)]
                rules += f"*{table}\n{''.join(accept)}COMMIT\n"
        run("iptables-restore", input=rules)
        FORWARDING.write_text(forwarding)

    def files_allowed(self):
        """How many files a container may open at most: a daemon without CAP_SYS_RESOURCE cannot give more
        than it has itself."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[1] if self.private else None

    # --- Stand-ins --------------------------------------------------------------------------------

    def make_images(self, images):
        print("no registry answers: stand-ins for the official images, from Debian's packages")
        base = next(image for image in images if image.startswith("debian:"))
        try:
            if not self.has(base):
                self.make_debian(base)
            for image in images:
                if self.has(image):
                    continue
                name = image.split(":")[0]
                if name == "rust":
                    self.make_rust(image, base)
                else:
                    run("docker", "build", "-q", "--build-arg", f"BASE={base}", "-t", image,
                        HERE / "stand-ins" / name)
        except RuntimeError as error:
            raise LeftOut(f"a stand-in cannot be made: {error}") from error

    def make_debian(self, image):
        tree = self.folder / "debian"
        shutil.rmtree(tree, ignore_errors=True)
        run("debootstrap", "--variant=minbase", "bookworm", tree, debian_mirror())
        # What the official slim image leaves out.
        left_out = ["var/cache/apt/*", "var/lib/apt/lists/*", "var/log/*"]
        left_out += [f"usr/share/{name}/*" for name in ["doc", "info", "locale", "man"]]
        tar = ["tar", "-C", tree, *(f"--exclude=./{one}" for one in left_out), "-c", "."]
        with subprocess.Popen([str(part) for part in tar], stdout=subprocess.PIPE) as packed:
            run("docker", "import", "-", image, stdin=packed.stdout)
        shutil.rmtree(tree)

    def make_rust(self, image, base):
        """The toolchain of this machine, with the authorities and the registries that its cargo knows."""
        version = run("rustc", "--version").split()[1]
        if not version.startswith(re.search(r":([\d.]+)", image).group(1)):
            raise LeftOut(f"the image {image} cannot be made from Rust {version}")
        toolchain = pathlib.Path(run("rustc", "--print", "sysroot").strip())
        told = {name: value for name, value in os.environ.items() if name.startswith(CARGO_VARIABLES)}
        settings = {**QUICKLY, **told}
        home = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
        context = self.folder / "rust"
        shutil.rmtree(context, ignore_errors=True)
        context.mkdir()
        (context / "cargo").mkdir()
        if (home / "config.toml").exists():
            shutil.copy(home / "config.toml", context / "cargo")
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", context)
        with tarfile.open(context / "toolchain.tar", "w") as packed:
            for name in ["bin", "lib", "libexec"]:
                packed.add(toolchain / name, name)
        (context / "Dockerfile").write_text("\n".join([
            f"FROM {base}",
            "RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev",
            "ADD toolchain.tar /usr/local/",
            "COPY ca-certificates.crt /etc/ssl/certs/",
            "COPY cargo /usr/local/cargo",
            "ENV CARGO_HOME=/usr/local/cargo",
            *(f"ENV {name}={json.dumps(value)}" for name, value in settings.items()),
        ]))
        run("docker", "build", "-q", "-t", image, context)
        shutil.rmtree(context)
