"""Reads jobs from a file: JSON Lines or CSV, or one JSON document with a job or a list of jobs.

The file is read twice, a line at a time, so that its size does not matter: once to check all jobs, once to publish them
(worker.messaging.bulk_publish).
"""

import csv
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from typing import Any, BinaryIO

from models.job import MAX_INSURED, MAX_QUOTES, Job, JobRejected, read_job
from worker.errors import EnqueueError

MAX_LINE = 16 * 1024 * 1024  # bytes


@dataclass(frozen=True)
class Record:
    """A line of JSON, or a row of CSV.

    number: of its first line, from 1, or of the job in a JSON document; raw: the bytes in the file, of a job in a
    document in one line; body: of the job's message; problem: why it is none.
    """

    number: int
    raw: bytes
    body: bytes
    problem: str | None = None


@dataclass(frozen=True)
class BadLine:
    """A line without a valid job. code, detail: as of JobRejected, or "invalid-csv"; raw: the bytes in the file."""

    number: int
    code: str
    detail: str
    raw: bytes


@dataclass(frozen=True)
class Checked:
    """The result of the check. good: number of valid jobs; bad: numbers of bad lines; digest: SHA-256 of the file."""

    good: int
    bad: "array[int]"
    digest: str


class Source:
    """A seekable file of jobs.

    header: the first line of a CSV file, once it has been read; unit: what the numbers of records count.
    """

    unit = "line"

    def __init__(self, file: BinaryIO, is_csv: bool) -> None:
        self._file = file
        self._is_csv = is_csv
        self._state = self._size_and_mtime()
        self._digest = sha256()
        self.header = b""

    @property
    def size(self) -> int:
        """In bytes."""
        return self._state[0]

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of what was read so far."""
        return self._digest.hexdigest()

    def records(self) -> Iterator[Record]:
        """Yields all records, without empty lines. Raises EnqueueError where the rest of the file can't be read."""
        self._file.seek(0)
        self._digest = sha256()
        if self._is_csv:
            return self._rows()
        if (document := self._document()) is not None:
            return document
        self._file.seek(0)
        return self._json_lines()

    def ensure_unchanged(self) -> None:
        """Raises EnqueueError where size or time of the file has changed."""
        if self._size_and_mtime() != self._state:
            raise EnqueueError("the file was changed while it was read; run the same command again")

    def _size_and_mtime(self) -> tuple[int, int]:
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def _lines(self) -> Iterator[bytes]:
        number = 0
        while line := self._file.readline(MAX_LINE):
            number += 1
            if len(line) == MAX_LINE:
                raise EnqueueError(f"line {number} is longer than {MAX_LINE} bytes; is there a job on each line?")
            self._digest.update(line)
            yield line

    def _json_lines(self) -> Iterator[Record]:
        for number, line in enumerate(self._lines(), start=1):
            if body := line.strip():
                yield Record(number, line, body)

    def _document(self) -> Iterator[Record] | None:
        """The jobs of a file that is one JSON document, a job or a list of jobs; None for JSON Lines."""
        lines = (line.decode("utf-8-sig", "replace") for line in iter(lambda: self._file.readline(MAX_LINE), b""))
        first, second = (next((line for line in lines if line.strip()), "") for _ in range(2))
        if self.size > MAX_LINE or isinstance(_value(first), dict) or not first.lstrip().startswith(("{", "[")):
            return None
        self._file.seek(0)
        content = self._file.read()
        try:
            jobs = _jobs_in(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if isinstance(_value(second), dict):
                return None  # JSON Lines, and the first one is bad
            place = f" (line {error.lineno}: {error.msg})" if isinstance(error, json.JSONDecodeError) else ""
            raise EnqueueError(f"this is neither JSON Lines nor one JSON document{place}") from None
        self._digest.update(content)
        self.unit = "job"
        one_line = (job.replace("\r", " ").replace("\n", " ").encode() for job in jobs)  # no string has a line break
        return (Record(number, job + b"\n", job) for number, job in enumerate(one_line, start=1))

    def _rows(self) -> Iterator[Record]:
        lines = self._lines()
        self.header = next(lines, b"")
        try:
            first = self.header.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise EnqueueError("the first line is not UTF-8") from None
        delimiter = max(",;\t", key=first.count)
        columns = [Column(name.strip()) for name in next(csv.reader([first], delimiter=delimiter), [])]
        check_header(columns)
        row_lines: list[bytes] = []

        def texts() -> Iterator[str]:
            for line in lines:
                row_lines.append(line)
                yield line.decode("utf-8", "surrogateescape")

        rows = csv.reader(texts(), delimiter=delimiter, strict=True)
        begins_at = 2
        try:
            for cells in rows:
                raw = b"".join(row_lines)
                row_lines.clear()
                if any(cell.strip() for cell in cells):
                    yield _of_row(begins_at, raw, columns, cells)
                begins_at = rows.line_num + 2
        except csv.Error as error:
            raise EnqueueError(
                f"the row that begins in line {begins_at} is no CSV ({error}); nothing can be read behind it"
            ) from None


def _value(text: str) -> Any:
    """The JSON value that a text is; None where it is none, or goes on behind this line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _jobs_in(text: str) -> list[str]:
    """The texts of the jobs in a JSON document: its elements, if it is a list, else itself. Raises ValueError."""
    if not isinstance(json.loads(text), list):
        return [text.strip()]
    jobs, decoder = [], json.JSONDecoder()
    at = text.index("[") + 1
    while text[at := _between_jobs(text, at)] != "]":
        end = decoder.raw_decode(text, at)[1]
        jobs.append(text[at:end])
        at = end
    return jobs


def _between_jobs(text: str, at: int) -> int:
    """The place behind white space and commas."""
    found = re.compile(r"[\s,]*").match(text, at)
    assert found is not None
    return found.end()


class Column:
    """A column of a CSV file. path: the place of its values in the job; ``quotes.0.id`` is ("quotes", 0, "id")."""

    def __init__(self, name: str) -> None:
        top, _, rest = name.partition(".")
        steps = [rest] if top == "metadata" else rest.split(".") if rest else []
        self.path: tuple[str | int, ...] = (top, *(_step(step) for step in steps))


def _step(text: str) -> str | int:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else text


_SHAPES = {
    "partner_id": "partner_id",
    "offer_id": "offer_id",
    "order_reference": "order_reference",
    "quotes": "quotes.0.id, quotes.0.insured.0.first_name …",
    "policyholder": "policyholder.first_name …",
    "metadata": "metadata.channel …",
    "confirm_by": "confirm_by",
}


def check_header(columns: list[Column]) -> None:
    """Raises EnqueueError for a column that is no part of a job, or a repeated one.

    The message names the column by its position: in a file without a header, its text is personal data.
    """
    paths = [column.path for column in columns]
    for place, path in enumerate(paths, start=1):
        if path[0] not in _SHAPES:
            close = get_close_matches(str(path[0]), Job.model_fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; the first line should name the columns"
            raise EnqueueError(f"column {place} is no part of a job{hint}")
        if not _is_well_formed(path):
            raise EnqueueError(f"column {place} is no part of a job; of {path[0]} there are {_SHAPES[str(path[0])]}")
    for place, path in enumerate(paths, start=1):
        if any(path[: len(other)] == other for other in (*paths[: place - 1], *paths[place:])):
            raise EnqueueError(f"column {place} ({path[0]} …) is there twice, or within another column")


def _is_well_formed(path: tuple[str | int, ...]) -> bool:
    match path:
        case ("quotes", int(quote), "insured", int(insured), str(name)):
            return quote < MAX_QUOTES and insured < MAX_INSURED and bool(name)
        case ("quotes", int(quote), "insured", *_):
            return False
        case ("quotes", int(quote), *names):
            return quote < MAX_QUOTES and bool(names) and all(isinstance(name, str) and name for name in names)
        case ("policyholder", *names):
            return bool(names) and all(isinstance(name, str) and name for name in names)
        case ("metadata", str(name)):
            return bool(name)
        case (_,):
            return path[0] not in ("quotes", "metadata")
    return False


def _of_row(number: int, raw: bytes, columns: list[Column], cells: list[str]) -> Record:
    if len(cells) != len(columns):
        return Record(number, raw, b"", f"{len(cells)} cells, where the first line names {len(columns)}")
    return Record(number, raw, job_of_row(columns, cells))


def job_of_row(columns: list[Column], cells: list[str]) -> bytes:
    """The JSON of a row, without empty cells, and without a quote or insured person whose cells are all empty."""
    job: dict[str | int, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        if not cell:
            continue
        place = job
        for step in column.path[:-1]:
            place = place.setdefault(step, {})
        place[column.path[-1]] = cell
    return json.dumps(_lists(job), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape")


def _lists(content: Any) -> Any:
    """Turns objects whose keys are numbers into lists, in the order of the numbers."""
    if not isinstance(content, dict):
        return content
    if any(isinstance(key, int) for key in content):
        return [_lists(content[key]) for key in sorted(content)]
    return {key: _lists(value) for key, value in content.items()}


def check(source: Source, on_bad: Callable[[BadLine], None], advance: Callable[[int], None]) -> Checked:
    """Checks all jobs of a source. on_bad: called with each bad line; advance: called with the bytes read.

    Raises EnqueueError where the file can't be read to its end, or changes meanwhile.
    """
    good, bad = 0, array("Q")
    for record in source.records():
        problem = _problem(record)
        if problem is None:
            good += 1
        else:
            bad.append(record.number)
            on_bad(BadLine(record.number, *problem, record.raw))
        advance(len(record.raw))
    source.ensure_unchanged()
    return Checked(good, bad, source.digest)


def _problem(record: Record) -> tuple[str, str] | None:
    if record.problem is not None:
        return "invalid-csv", record.problem
    try:
        read_job(record.body, names_keys=True)
    except JobRejected as rejection:
        return rejection.code, rejection.detail
    return None


def good_records(source: Source, checked: Checked, after: int) -> Iterator[Record]:
    """Yields the valid records after line number ``after``, without checking them again."""
    bad = iter(checked.bad)
    next_bad = next(bad, None)
    for record in source.records():
        if record.number == next_bad:
            next_bad = next(bad, None)
        elif record.number > after:
            yield record
