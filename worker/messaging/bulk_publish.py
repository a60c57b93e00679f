"""Publishing the jobs of a file with confirms, many at a time, and going on where an earlier run was interrupted."""

import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Self

from kombu import Connection

from worker.messaging.job_file import Checked, Record, Source, good_records
from worker.messaging.publisher import Message, Publisher
from worker.messaging.topology import JOBS, confirm_offer

BATCH = 2000
BATCH_BYTES = 8 * 1024 * 1024


def in_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Batches that bound what is held in memory."""
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.body)
        if len(batch) == BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass
class Enqueued:
    """published: how many the broker has; refused: numbers of the lines it did not take, which ended it."""

    published: int
    refused: list[int]


def publish(
    source: Source, checked: Checked, after: int, publisher: Publisher, confirmed: Callable[[int, int], None]
) -> Enqueued:
    """Publishes the good jobs behind line ``after`` to the jobs queue, batch by batch.

    confirmed is told of each batch that the broker has: the number of its last line, and how many jobs.
    """
    result = Enqueued(0, [])
    for batch in in_batches(good_records(source, checked, after)):
        source.make_sure_it_is_the_same()
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
    """How far a file has come: all good jobs up to ``line`` are with the broker. digest: of the file; broker: whose."""

    line: int
    published: int
    digest: str
    broker: str


class Progress:
    """The file that holds a Mark. It is replaced as a whole: killed at any time, it holds the last Mark or this one."""

    def __init__(self, path: Path, digest: str, broker_url: str) -> None:
        self.path = path
        self._beside = path.with_name(path.name + ".new")
        self._mark = Mark(0, 0, digest, _address(broker_url))

    def begin(self) -> tuple[int, int] | None:
        """Line and number of jobs after which to go on; None where it belongs to another content or broker."""
        try:
            found = Mark(**json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return 0, 0
        except (ValueError, TypeError):
            return None
        if (found.digest, found.broker) != (self._mark.digest, self._mark.broker):
            return None
        self._mark = found
        return found.line, found.published

    def advance(self, line: int, jobs: int) -> None:
        self._mark = Mark(line, self._mark.published + jobs, self._mark.digest, self._mark.broker)
        self._beside.write_text(json.dumps(asdict(self._mark)))
        self._beside.replace(self.path)

    def try_it(self) -> None:
        """Raises OSError where nothing can be kept."""
        self._beside.touch()
        self._beside.unlink()

    def end(self) -> None:
        self.path.unlink(missing_ok=True)


def _address(broker_url: str) -> str:
    """Host, port and virtual host, without user and password."""
    connection = Connection(broker_url)
    return f"{connection.hostname}:{connection.port}/{connection.virtual_host}"


class Rejected:
    """The file of rejected lines, made with the first of them, for its owner only. Holds them as they came."""

    def __init__(self, path: Path | None, header: Callable[[], bytes]) -> None:
        self.path = path
        self._header = header
        self._file: BinaryIO | None = None

    def add(self, raw: bytes) -> None:
        if self.path is None:
            return
        if self._file is None:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            self._file = os.fdopen(handle, "wb")
            if stat.S_ISREG(os.fstat(handle).st_mode):
                os.fchmod(handle, 0o600)  # where it stood already
            self._file.write(self._header())
        self._file.write(raw if raw.endswith(b"\n") else raw + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
