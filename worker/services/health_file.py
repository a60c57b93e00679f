"""The health file: each worker writes its health to a file, and ``confirm-offer health`` reads it on the same machine.

The worker holds a lock on its file. The lock ends with the process, however that ends, and works across containers that
share the folder, where a process id means nothing. A probe runs every few seconds and must start fast: this module
imports nothing of ours.
"""

import errno
import fcntl
import json
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

UNWELL_AFTER = 30.0  # seconds since a part last succeeded: longer than the longest backoff of a service
FROZEN_AFTER = 60.0  # seconds since a worker last wrote its file
STUCK_AFTER = 300.0  # seconds since a part last ran, with an error or not: longer than any wait for a server
FILE_SIZE = 8192  # bytes, written at once


class PartHealth(NamedTuple):
    """The health of one part of a worker. Times are those of time.time(), 0.0 for never."""

    succeeded_at: float = 0.0
    ran_at: float = 0.0  # with an error or not; before the first run, the start
    waits_for: str | None = None  # an unavailable dependency
    well_for: float | None = None  # seconds after the last success; None: UNWELL_AFTER

    @property
    def is_well(self) -> bool:
        """Whether it has succeeded lately."""
        return time.time() - self.succeeded_at <= (self.well_for or UNWELL_AFTER)


class WorkerHealth(NamedTuple):
    """The health of a worker that runs on this machine as this user.

    noted_at: when it was written. stopped: what keeps its calls to XONE from passing: code, since, and both in a text.
    """

    pid: int
    noted_at: float
    is_stopping: bool
    parts: dict[str, PartHealth]
    stopped: list[dict[str, str]]

    @property
    def unwell(self) -> list[str]:
        """The parts that have not succeeded lately."""
        return [name for name, part in self.parts.items() if not part.is_well]

    @property
    def is_well(self) -> bool:
        return not self.unwell and not self.is_stopping

    @property
    def stuck(self) -> list[str]:
        """The parts that have not run for so long that only a restart helps."""
        now = time.time()
        return [name for name, part in self.parts.items() if now - part.ran_at > STUCK_AFTER and not self.is_stopping]

    @property
    def is_frozen(self) -> bool:
        return time.time() - self.noted_at > FROZEN_AFTER

    @property
    def is_alive(self) -> bool:
        return not self.is_frozen and not self.stuck


def directory(parent: Path | None = None) -> Path:
    """The folder of this user's files in ``parent``; for health files, in the folder for temporary files."""
    return (parent or Path(tempfile.gettempdir())) / f"confirm-offer-{os.getuid()}"


def own_directory(parent: Path | None = None) -> Path:
    """``directory()``, which is created if it is missing. Raises OSError where somebody else could put files into it.

    The folder around it is for all users: another one may have made this first, as a link or with a file in it.
    """
    folder = directory(parent)
    folder.mkdir(mode=0o700, parents=parent is not None, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        reason = f"{folder} is not a folder of this user that nobody else can write to: remove it"
        raise PermissionError(errno.EPERM, reason)
    return folder


class HealthFile:
    """The file of one worker."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file = -1

    def write(self, parts: dict[str, PartHealth], is_stopping: bool, stopped: Sequence[dict[str, str]] = ()) -> None:
        """Replaces the content. Creates the file if there is none. Raises OSError where it can't be written."""
        health = {
            "pid": os.getpid(),
            "noted_at": time.time(),
            "is_stopping": is_stopping,
            "parts": parts,
            "stopped": list(stopped),
        }
        content = json.dumps(health).encode().ljust(FILE_SIZE)
        if self._path is None or not self._path.exists():
            self._create(content)
        else:
            os.pwrite(self._file, content, 0)

    def _create(self, content: bytes) -> None:
        self.close()
        path = own_directory() / f"{os.getpid()}-{secrets.token_hex(4)}.json"
        new = path.with_suffix(".new")
        self._file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(self._file, content, 0)
        new.rename(path)  # not before it is locked and has its content: a reader removes unlocked files
        self._path = path

    def close(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
        self._path = None


def read_workers() -> list[WorkerHealth]:
    """The health of all workers of this machine and user. Removes the files of killed workers.

    Raises OSError where the files can't be read.
    """
    workers: list[WorkerHealth] = []
    if not os.path.lexists(directory()):
        return workers
    for path in sorted(own_directory().glob("*.json")):
        with suppress(FileNotFoundError):  # the worker has just ended
            if (worker := _read(path)) is not None:
                workers.append(worker)
            else:
                path.unlink()
    return workers


def _read(path: Path) -> WorkerHealth | None:
    """Reads a file; None where its worker has ended."""
    with path.open("rb") as file:
        with suppress(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        content: dict[str, Any] = json.loads(file.read())
    # Workers of other versions note less, or more.
    parts = {name: PartHealth(*part[: len(PartHealth._fields)]) for name, part in content["parts"].items()}
    known = {name: value for name, value in content.items() if name in WorkerHealth._fields}
    return WorkerHealth(**{"stopped": [], **known, "parts": parts})
