"""Publishes the jobs of a file with confirms, many at a time, and continues where an earlier run was interrupted."""

import errno
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Self, TextIO

from kombu import Connection

from worker.messaging.batching import in_batches
from worker.messaging.job_file import Checked, Source, good_records
from worker.messaging.publisher import Message, Publisher
from worker.messaging.topology import JOBS, confirm_offer

BATCH = 2000  # jobs


@dataclass
class Enqueued:
    """published: jobs that the broker has; refused: numbers of the lines that it did not take, which ended the run."""

    published: int
    refused: list[int]


def publish(
    source: Source, checked: Checked, after: int, publisher: Publisher, confirmed: Callable[[int, int], None]
) -> Enqueued:
    """Publishes the valid jobs after line number ``after`` to the jobs queue, batch by batch.

    confirmed: called after each batch that the broker has, with the number of its last line and of its jobs. Raises
    EnqueueError where the file has changed, and the connection's error where the broker can't be reached.
    """
    result = Enqueued(0, [])
    for batch in in_batches(good_records(source, checked, after), BATCH):
        source.ensure_unchanged()
        properties = {"timestamp": int(time.time())}
        taken = publisher.publish(
            Message(record.number, record.body, confirm_offer.name, JOBS, properties=properties) for record in batch
        )
        result.published += len(taken)
        result.refused = [record.number for record in batch if record.number not in taken]
        if result.refused:
            break
        confirmed(batch[-1].number, len(batch))
    return result


@dataclass(frozen=True)
class Mark:
    """The broker has all valid jobs up to ``line``. digest: SHA-256 of the file; broker: its address."""

    line: int
    published: int
    digest: str
    broker: str


class Progress:
    """The file that holds a Mark. It is replaced atomically: after a kill it holds the last Mark or the new one."""

    def __init__(self, path: Path, digest: str, broker_url: str) -> None:
        self.path = path
        self._new_path = path.with_name(path.name + ".new")
        self._mark = Mark(0, 0, digest, _address(broker_url))

    def begin(self) -> tuple[int, int] | None:
        """Line and number of jobs after which to continue.

        0, 0 where there is no progress yet; None where the progress is that of another content or broker.
        """
        try:
            with os.fdopen(_open_own(self.path, os.O_RDONLY), "rb") as file:
                mark = Mark(**json.load(file))
        except FileNotFoundError:
            return 0, 0
        except (ValueError, TypeError):
            return None
        if (mark.digest, mark.broker) != (self._mark.digest, self._mark.broker):
            return None
        self._mark = mark
        return mark.line, mark.published

    def advance(self, line: int, jobs: int) -> None:
        self._mark = Mark(line, self._mark.published + jobs, self._mark.digest, self._mark.broker)
        with self._create() as file:
            json.dump(asdict(self._mark), file)
        self._new_path.replace(self.path)

    def ensure_writable(self) -> None:
        """Raises OSError where the file can't be written."""
        with suppress(FileNotFoundError):
            os.close(_open_own(self.path, os.O_RDONLY))
        self._create().close()
        self._new_path.unlink()

    def _create(self) -> TextIO:
        """The new file, in place of one that a killed command left."""
        self._new_path.unlink(missing_ok=True)
        return os.fdopen(_open_own(self._new_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w")

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


def _open_own(path: Path, flags: int) -> int:
    """Opens a file for its owner only. Raises OSError where it is a link or another user's: the folder may be /tmp."""
    handle = os.open(path, flags | os.O_NOFOLLOW, 0o600)
    found = os.fstat(handle)
    if found.st_uid != os.geteuid() and not stat.S_ISCHR(found.st_mode):  # such as /dev/null
        os.close(handle)
        raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
    return handle


def _address(broker_url: str) -> str:
    """Host, port and virtual host, without user and password."""
    connection = Connection(broker_url)
    return f"{connection.hostname}:{connection.port}/{connection.virtual_host}"


class Rejected:
    """The file of rejected lines, unchanged. It is created with the first of them, readable for its owner only."""

    def __init__(self, path: Path | None, header: Callable[[], bytes]) -> None:
        self.path = path
        self._header = header
        self._file: BinaryIO | None = None

    def add(self, raw: bytes) -> None:
        if self.path is None:
            return
        if self._file is None:
            handle = _open_own(self.path, os.O_WRONLY | os.O_CREAT)
            self._file = os.fdopen(handle, "wb")
            if stat.S_ISREG(os.fstat(handle).st_mode):  # it may have existed
                os.fchmod(handle, 0o600)
                os.ftruncate(handle, 0)
            self._file.write(self._header())
        self._file.write(raw if raw.endswith(b"\n") else raw + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
