"""A Dockerfile built, and containers run from it, without an engine: by chroot and namespaces, as root on Linux.

In place of the base image stands this machine's own /usr, read-only, with the Python that runs the tests; all else is
as the Dockerfile says: folders, users, environment, working folder, exec form, process 1. The network is the machine's.
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
OF_THE_HOST = [
    *("passwd", "group", "shadow", "gshadow", "login.defs", "ssl", "ca-certificates", "nsswitch.conf", "hosts"),
    *("resolv.conf", "localtime", "pip.conf", "alternatives", "ld.so.cache"),
]
OF_THE_NETWORK = ("PIP_", "HTTP", "http", "NO_PROXY", "no_proxy", "SSL_CERT", "REQUESTS_CA")  # how the index is reached


def missing() -> str | None:
    """Why no container can be run here, or None."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return "Containers are rehearsed on Linux and as root only."
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "This machine lets nobody make namespaces; containers can't be rehearsed."
    return None


@dataclass
class Image:
    """What an instruction changes. A stage begins as the base image; the last one is the image."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": BASE_PATH, "LANG": "C.UTF-8"})
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    stop_signal: signal.Signals = signal.SIGTERM


def build(project: Path, folder: Path) -> Image:
    """Runs each instruction of the project's Dockerfile. Raises AssertionError with what a failed one printed."""
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
    for name in OF_THE_HOST:
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
            given = {name: value for name, value in os.environ.items() if name.startswith(OF_THE_NETWORK)}
            command = instruction.words if instruction.is_exec else ["/bin/sh", "-c", instruction.text]
            ran = Container(image, command, given).finish()
            assert ran.returncode == 0, f"RUN {instruction.text}\n{ran.stdout}"
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
        to = target / (file.name if (project / source).is_file() else file.relative_to(source))
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(project / file, to)


class Container:
    """A command in a file system and a process tree of its own, as process 1.

    is_hardened: the root is read-only with a fresh /tmp, no capability is left and none can be gained.
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
        """Once it has ended by itself."""
        output, _ = self.process.communicate(timeout=seconds)
        return subprocess.CompletedProcess([], self.process.returncode, output)

    @property
    def first(self) -> int:
        """Process 1, as this machine numbers it."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        first = int(until(lambda: children.read_text().split())[0])
        until(lambda: os.readlink(f"/proc/{first}/root") != "/")  # it has come through chroot
        return first

    def execute(self, command: Iterable[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        """A further command in it, as a healthcheck or ``docker compose exec``."""
        enter = ["/usr/bin/nsenter", f"--target={self.first}", "--mount", "--pid", "--root"]
        return subprocess.run(
            [*enter, *self._as_user(command)], env=self._environment, input=stdin, capture_output=True, text=True
        )

    def stop(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """The stop signal to process 1; it has to end by that."""
        os.kill(self.first, self._image.stop_signal)
        return self.finish(seconds)

    def kill(self) -> None:
        """Does nothing where it has ended."""
        if self.process.poll() is None:
            os.kill(self.first, signal.SIGKILL)  # with process 1 end all
        self.process.communicate()
