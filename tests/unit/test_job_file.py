"""A file of jobs may be JSON Lines, or one JSON document that holds a job or a list of jobs."""

import json
from pathlib import Path

import pytest

from models.job import read_job
from tests.support.system import PROJECT, job
from worker.errors import EnqueueError
from worker.messaging.job_file import BadLine, Source, check, good_records

ONE, TWO = job("one"), job("two")


def read(path: Path, content: bytes) -> tuple[list[bytes], list[BadLine]]:
    """The bodies of the valid jobs, and the bad lines."""
    path.write_bytes(content)
    bad: list[BadLine] = []
    with path.open("rb") as file:
        source = Source(file, is_csv=False)
        checked = check(source, bad.append, lambda _: None)
        return [record.body for record in good_records(source, checked, after=0)], bad


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([ONE, TWO], indent=2),
        json.dumps([ONE, TWO]),
        f"\n{json.dumps(ONE)}\n{json.dumps(TWO)}",
        f"\ufeff\n[{json.dumps(ONE, indent=1)} ,\r\n{json.dumps(TWO)}]\n",
    ],
    ids=["indented", "one line", "lines", "byte order mark"],
)
def test_two_jobs_are_read_from_lines_and_documents(content: str, tmp_path: Path) -> None:
    bodies, bad = read(tmp_path / "jobs.json", content.encode())

    assert [json.loads(body) for body in bodies] == [ONE, TWO]
    assert bad == []


def test_the_example_is_a_file_of_one_job(tmp_path: Path) -> None:
    bodies, bad = read(tmp_path / "job.json", (PROJECT / "examples/job.json").read_bytes())

    assert [read_job(body).offer_id for body in bodies] == [
        json.loads((PROJECT / "examples/job.json").read_text())["offer_id"]
    ]
    assert bad == []


def test_numbers_of_a_document_keep_their_digits(tmp_path: Path) -> None:
    text = json.dumps([job("one", quotes=[{"id": "q", "x": "NUMBER"}])], indent=2).replace(
        '"NUMBER"', "0.1234567890123456789"
    )

    (body,), _ = read(tmp_path / "jobs.json", text.encode())

    assert b"0.1234567890123456789" in body


def test_a_bad_job_of_a_document_is_named_with_its_key_and_can_be_read_again(tmp_path: Path) -> None:
    _, bad = read(
        tmp_path / "jobs.json", json.dumps([ONE, {**TWO, "colour": 1}, {**TWO, "coler": 1}], indent=2).encode()
    )

    assert [(line.number, line.detail) for line in bad] == [(2, "colour: unknown key"), (3, "coler: unknown key")]
    _, again = read(tmp_path / "again.json", b"".join(line.raw for line in bad))
    assert [line.detail for line in again] == ["colour: unknown key", "coler: unknown key"]


def test_neither_lines_nor_a_document_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(EnqueueError, match=r"neither JSON Lines nor one JSON document \(line \d+: "):
        read(tmp_path / "jobs.json", json.dumps(ONE, indent=2).encode()[:-3])


def test_a_bad_first_line_of_json_lines_is_named(tmp_path: Path) -> None:
    bodies, bad = read(tmp_path / "jobs.json", f"{json.dumps(ONE)[:-1]}\n{json.dumps(TWO)}\n".encode())

    assert ([json.loads(body) for body in bodies], [line.number for line in bad]) == ([TWO], [1])
