"""Builds a Dockerfile and runs containers without an engine, with chroot and namespaces, as root on Linux.

This machine's /usr, read-only and with the Python that runs the tests, replaces the base image. All else is as the
Dockerfile says: folders, users, environment, working folder, exec form, process 1. The network is the machine's.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from tests.support import dockerfile
from tests.support.dockerfile import Ignore, Instruction
from tests.support.system import until

BASE_PATH = "/opt/python/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOST_FILES = [
    *("passwd", "group", "shadow", "gshadow", "login.defs", "ssl", "ca-certificates", "nsswitch.conf", "hosts"),
    *("resolv.conf", "localtime", "pip.conf", "alternatives", "ld.so.cache"),
]
NETWORK_VARIABLES = (
    "PIP_",
    "HTTP",
    "http",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT",
    "REQUESTS_CA",
)  # settings to reach the package index


def missing() -> str | None:
    """Why this machine can't run containers, or None."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return "Containers are rehearsed on Linux and as root only."
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "This machine lets nobody make namespaces; containers can't be rehearsed."
    return None


@dataclass
class Image:
    """The state that instructions change. A stage begins as the base image; the last stage is the image."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": BASE_PATH, "LANG": "C.UTF-8"})
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    stop_signal: signal.Signals = signal.SIGTERM


def build(project: Path, folder: Path) -> Image:
    """Runs each instruction of the project's Dockerfile. Raises AssertionError with the output of one that fails."""
    ignore = Ignore((project / ".dockerignore").read_text())
    named: dict[str, Image] = {}
    image = Image(folder)
    for number, stage in enumerate(dockerfile.stages(dockerfile.read(project / "Dockerfile"))):
        image = _base(folder / str(number))
        named[stage[0].words[-1]] = image
        for instruction in stage[1:]:
            _carry_out(instruction, image, named, project, ignore)
    return image


def _base(root: Path) -> Image:
    (root / "etc").mkdir(parents=True)
    for name in HOST_FILES:
        source = Path("/etc") / name
        if source.is_dir():
            shutil.copytree(source, root / "etc" / name, symlinks=True)
        elif source.exists():
            shutil.copy2(source, root / "etc" / name)
    for name in ("dev", "proc", "tmp", "root", "run"):
        (root / name).mkdir(exist_ok=True)
    (root / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        if Path("/", name).is_symlink():
            (root / name).symlink_to(Path("/", name).readlink())
    for mounted in _mounts():
        (root / mounted.relative_to("/")).mkdir(parents=True, exist_ok=True)
    python = root / "opt/python/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec {sys._base_executable} "$@"\n')  # type: ignore[attr-defined]
    python.chmod(0o755)
    return Image(root)


def _mounts() -> list[Path]:
    usual = [path for path in map(Path, ("/usr", "/bin", "/sbin", "/lib", "/lib64")) if path.is_dir()]
    real = [path for path in usual if not path.is_symlink()]
    prefix = Path(sys.base_prefix)
    return real if any(prefix.is_relative_to(path) for path in real) else [*real, prefix]


def _carry_out(
    instruction: Instruction, image: Image, named: Mapping[str, Image], project: Path, ignore: Ignore
) -> None:
    match instruction.name:
        case "RUN":
            network_settings = {name: value for name, value in os.environ.items() if name.startswith(NETWORK_VARIABLES)}
            command = instruction.words if instruction.is_exec else ["/bin/sh", "-c", instruction.text]
            done = Container(image, command, network_settings).finish()
            assert done.returncode == 0, f"RUN {instruction.text}\n{done.stdout}"
        case "COPY" if "from" in instruction.flags:
            source, target = instruction.words
            shutil.copytree(_inside(named[instruction.flags["from"]], source), _inside(image, target), symlinks=True)
        case "COPY":
            *sources, target = instruction.words
            for source in sources:
                _copy(project, source, _inside(image, target), ignore)
        case "ENV":
            for pair in instruction.words:
                name, value = pair.split("=", 1)
                image.env[name] = Template(value).substitute(image.env)
        case "WORKDIR":
            image.workdir = instruction.text
            _inside(image, ".").mkdir(parents=True, exist_ok=True)
        case "USER":
            image.user = instruction.text
        case "ENTRYPOINT":
            image.entrypoint = instruction.words
        case "CMD":
            image.cmd = instruction.words
        case "HEALTHCHECK":
            image.healthcheck = Instruction("CMD", {}, instruction.text.removeprefix("CMD ")).words
        case "STOPSIGNAL":
            image.stop_signal = signal.Signals[instruction.text]
        case _:
            raise NotImplementedError(instruction.name)


def _inside(image: Image, path: str) -> Path:
    return image.root / os.path.join(image.workdir, path).lstrip("/")


def _copy(project: Path, source: str, target: Path, ignore: Ignore) -> None:
    files = list(ignore.files(project, source))
    assert files, f"COPY {source}: nothing of it gets into the build"
    for file in files:
        destination = target / (file.name if (project / source).is_file() else file.relative_to(source))
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / file, destination)


class Container:
    """A command as process 1, with its own file system and process tree.

    is_hardened: the root is read-only with a new /tmp, and the process has no capabilities and can gain none.
    """

    def __init__(
        self, image: Image, command: Iterable[str], environment: Mapping[str, str], is_hardened: bool = False
    ) -> None:
        self._image = image
        self._environment = {**image.env, **environment}
        self._drop = ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"] if is_hardened else []
        script = [f"mount --bind {image.root} {image.root}", f"mount --rbind /dev {image.root}/dev"]
        for path in _mounts():
            inside = f"{image.root}{path}"
            script += [f"mount --bind {path} {inside}", f"mount -o remount,bind,ro {inside}"]
        if is_hardened:
            script += [f"mount -o remount,bind,ro {image.root}", f"mount -t tmpfs tmpfs {image.root}/tmp"]
        script += [f"mount -t proc proc {image.root}/proc", f'exec chroot {image.root} "$@"']
        self.process = subprocess.Popen(
            [
                *("/usr/bin/unshare", "--mount", "--pid", "--fork"),
                *("/bin/sh", "-ec", "\n".join(script), "sh", *self._as_user(command)),
            ],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def _as_user(self, command: Iterable[str]) -> list[str]:
        uid, gid = self._image.user.split(":")
        enter = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', self._image.workdir, *command]
        return ["/usr/bin/setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *self._drop, *enter]

    def finish(self, seconds: float = 300.0) -> subprocess.CompletedProcess[str]:
        """Waits until it ends by itself. Returns its exit code and output."""
        output, _ = self.process.communicate(timeout=seconds)
        return subprocess.CompletedProcess([], self.process.returncode, output)

    @property
    def process_1(self) -> int:
        """The process id of process 1 on this machine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        process_1 = int(until(lambda: children.read_text().split())[0])
        until(lambda: os.readlink(f"/proc/{process_1}/root") != "/")  # it has passed chroot
        return process_1

    def execute(self, command: Iterable[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs another command in the container, as a healthcheck or ``docker compose exec`` does."""
        enter = ["/usr/bin/nsenter", f"--target={self.process_1}", "--mount", "--pid", "--root"]
        return subprocess.run(
            [*enter, *self._as_user(command)], env=self._environment, input=stdin, capture_output=True, text=True
        )

    def stop(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """Sends the stop signal to process 1, and waits for the end."""
        os.kill(self.process_1, self._image.stop_signal)
        return self.finish(seconds)

    def kill(self) -> None:
        """Ends the container, if it runs."""
        if self.process.poll() is None:
            os.kill(self.process_1, signal.SIGKILL)  # all processes end with process 1
        self.process.communicate()
