"""Health: a worker notes when each of its parts was last well; ``confirm-offer health`` reads it on the same machine.

A part is well when it has come round: the consumer with a connection to RabbitMQ, Scheduler and Relay with a turn that
did not fail. The notes stand in a file for each worker, in a folder of its user's.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from worker.loop import Loop

STALE = 30.0  # seconds since a part was well: longer than the longest pause of a duty that fails
CONSUMER = "consumer"


def folder() -> Path:
    return Path(tempfile.gettempdir()) / f"confirm-offer-{os.getuid()}"


class Health(Loop):
    """Writes the notes of one worker. ``consumer_well`` is called by the consumer as it comes round."""

    name = "health"
    interval = 2.0

    def __init__(self, duties: Iterable[Loop], consumes: bool) -> None:
        super().__init__()
        self._duties = list(duties)
        self._consumer: dict[str, float] = {CONSUMER: 0.0} if consumes else {}
        self._path = folder() / f"{os.getpid()}.json"

    def consumer_well(self) -> None:
        self._consumer[CONSUMER] = time.time()

    def notes(self) -> dict[str, float]:
        """When each part was last well (time.time()); 0 where it never was."""
        return {duty.name: duty.well_at for duty in self._duties} | self._consumer

    def turn(self) -> bool:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self.notes()))
        new.replace(self._path)
        return False

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


class Worker(NamedTuple):
    """A worker of this machine: how long ago each of its parts was well, in seconds; None where it never was."""

    pid: int
    parts: dict[str, float | None]

    @property
    def unwell(self) -> list[str]:
        return [part for part, ago in self.parts.items() if ago is None or ago > STALE]


def workers() -> list[Worker]:
    """The workers that run on this machine as this user. Notes that a killed one left are removed."""
    found = []
    for path in sorted(folder().glob("*.json")):
        pid = int(path.stem)
        if not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
            continue
        notes: dict[str, float] = json.loads(path.read_text())
        found.append(Worker(pid, {part: time.time() - at if at else None for part, at in notes.items()}))
    return found
