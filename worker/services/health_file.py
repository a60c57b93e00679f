"""Vitals: what a worker notes of itself in a file, and how ``confirm-offer health`` reads it on the same machine.

The worker holds a lock on its file. The lock ends with its process, however that ends, and is seen from any container
that shares the folder; a process id would say nothing there. A probe runs every few seconds: this module imports
nothing of ours.
"""

import fcntl
import json
import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

STALE = 30.0  # seconds since a part was well: longer than the longest pause of a duty that fails
FROZEN = 60.0  # seconds since a worker has noted anything
STUCK = 300.0  # seconds since a part has come round at all, well or not: longer than any wait for a server
SIZE = 4096  # bytes; all is written at once


class PartHealth(NamedTuple):
    """A part of a worker. Times are of time.time(), 0 where it never was."""

    succeeded_at: float = 0.0
    ran_at: float = 0.0  # it came round, well or not; before it did, since when it could have
    waits_for: str | None = None


class WorkerHealth(NamedTuple):
    """A worker that runs on this machine as this user."""

    pid: int
    noted_at: float
    is_stopping: bool
    parts: dict[str, PartHealth]

    @property
    def unwell(self) -> list[str]:
        """The parts that were not well lately."""
        now = time.time()
        return [name for name, part in self.parts.items() if now - part.succeeded_at > STALE]

    @property
    def is_well(self) -> bool:
        return not self.unwell and not self.is_stopping

    @property
    def stuck(self) -> list[str]:
        """The parts that have not come round for so long that only a restart helps."""
        now = time.time()
        return [name for name, part in self.parts.items() if now - part.ran_at > STUCK and not self.is_stopping]

    @property
    def is_frozen(self) -> bool:
        return time.time() - self.noted_at > FROZEN

    @property
    def is_alive(self) -> bool:
        return not self.is_frozen and not self.stuck


def directory() -> Path:
    return Path(tempfile.gettempdir()) / f"confirm-offer-{os.getuid()}"


class HealthFile:
    """The file of one worker. Raises OSError where it can't be written."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file = -1

    def write(self, parts: dict[str, PartHealth], is_stopping: bool) -> None:
        if self._path is None or not self._path.exists():
            self._create()
        noted = {"pid": os.getpid(), "noted_at": time.time(), "is_stopping": is_stopping, "parts": parts}
        os.pwrite(self._file, json.dumps(noted).encode().ljust(SIZE), 0)

    def _create(self) -> None:
        self.close()
        where = directory()
        where.mkdir(mode=0o700, exist_ok=True)
        if where.stat().st_uid != os.getuid():
            raise PermissionError(f"{where} belongs to another user")
        path = where / f"{os.getpid()}-{secrets.token_hex(4)}.json"
        new = path.with_suffix(".new")
        self._file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(path)  # only now that it is locked: whoever finds it free removes it
        self._path = path

    def close(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
        self._path = None


def read_workers() -> list[WorkerHealth]:
    """The workers of this machine and user. What a killed one has left is removed."""
    found = []
    for path in sorted(directory().glob("*.json")):
        with suppress(FileNotFoundError):  # it has just ended
            if (noted := _read(path)) is not None:
                found.append(noted)
            else:
                path.unlink()
    return found


def _read(path: Path) -> WorkerHealth | None:
    """What stands in a file; None where its worker has ended."""
    with path.open("rb") as file:
        with suppress(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        noted: dict[str, Any] = json.loads(file.read())
    return WorkerHealth(**{**noted, "parts": {name: PartHealth(*part) for name, part in noted["parts"].items()}})
