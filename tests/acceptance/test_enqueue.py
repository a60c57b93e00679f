"""Jobs are enqueued from files: checked, published, and continued after an interruption."""

import csv
import io
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from sqlalchemy import select

from models.job import read_job
from models.tables import AuditEntry
from tests.support.commands import run
from tests.support.queues import as_bytes, drain, length
from tests.support.system import PROJECT, job, until
from worker.errors import EnqueueError
from worker.messaging import broker, topology
from worker.messaging.bulk_publish import BATCH, Progress
from worker.messaging.job_file import Column, Source, check_header, job_of_row
from worker.storage import database

pytestmark = pytest.mark.slow


def jobs_file(path: Path, offers: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps(job(offer)) + "\n" for offer in offers))
    return path


def enqueued(url: str) -> list[str]:
    return [json.loads(message.body)["offer_id"] for message in drain(url, topology.JOBS)]


def start(*arguments: str, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "worker", "enqueue", *arguments],
        env={**os.environ, "COLUMNS": "80", **settings},
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


COLUMNS = (
    "partner_id,offer_id,order_reference,quotes.0.id,quotes.0.insured.0.first_name,quotes.0.insured.1.first_name,"
    "quotes.1.id,quotes.0.brightwrite_details.bw_variant_id,policyholder.first_name,policyholder.last_name,"
    "policyholder.country,policyholder.email,metadata.channel,metadata.shop.floor"
)
ROW = [
    "P-1",
    "offer-1",
    "",
    "q-1",
    "Ada",
    "",
    "",
    "B",
    'Ada "the first"',
    "Love,\nlace",
    "GB",
    "ada@example.com",
    "web",
    "2",
]


def test_csv_rows_are_enqueued_and_rejected_rows_are_written_as_csv(broker_url: str, tmp_path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerows([COLUMNS.split(","), ROW, ["P/2", *ROW[1:]], [], ["P-3"], ["P-4", *ROW[1:6], "q-2", *ROW[7:]]])
    file = tmp_path / "jobs.csv"
    file.write_text("\ufeff" + text.getvalue(), newline="")

    done = run("enqueue", str(file), "--json", BROKER_URL=broker_url)

    report = json.loads(done.stdout)
    assert (done.returncode, report["published"]) == (1, 2)
    assert [(bad["line"], bad["code"]) for bad in report["bad"]] == [(4, "invalid-job"), (7, "invalid-csv")]
    assert report["bad"][1]["detail"] == "1 cells, where the first line names 14"
    rejected = Path(report["rejected_file"])
    assert rejected == tmp_path / "jobs.csv.rejected"
    assert stat.S_IMODE(rejected.stat().st_mode) == 0o600
    with rejected.open(newline="", encoding="utf-8-sig") as rows:
        assert list(csv.reader(rows)) == [COLUMNS.split(","), ["P/2", *ROW[1:]], ["P-3"]]
    first, fourth = (json.loads(message.body) for message in drain(broker_url, topology.JOBS))
    assert first == {
        "partner_id": "P-1",
        "offer_id": "offer-1",
        "quotes": [{"id": "q-1", "insured": [{"first_name": "Ada"}], "brightwrite_details": {"bw_variant_id": "B"}}],
        "policyholder": {
            "first_name": 'Ada "the first"', "last_name": "Love,\nlace", "country": "GB", "email": "ada@example.com",
        },
        "metadata": {"channel": "web", "shop.floor": "2"},
    }  # fmt: skip
    assert [quote["id"] for quote in fourth["quotes"]] == ["q-1", "q-2"]
    assert not (tmp_path / "jobs.csv.progress").exists()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("partner,offer_id", "column 1 is no part of a job; did you mean partner_id?"),
        ("P-100,ada@example.com", "column 1 is no part of a job; the first line should name the columns"),
        ("partner_id,quotes.id", "column 2 is no part of a job; of quotes there are quotes.0.id"),
        ("quotes.0.insured.0.first_name,quotes.0.insured", "column 2"),
        ("quotes.100.id", "column 1"),
        ("offer_id,offer_id", "column 1 (offer_id …) is there twice"),
        ("policyholder.a,policyholder.a.b", "column 2 (policyholder …) is there twice, or within another column"),
        ("metadata", "column 1"),
        ("offer_id.x", "column 1"),
    ],
)
def test_an_unknown_header_is_named(header: str, message: str) -> None:
    with pytest.raises(EnqueueError) as raised:
        check_header([Column(name) for name in header.split(",")])

    assert message in str(raised.value)
    assert "ada@" not in str(raised.value)


def test_any_job_of_texts_is_read_from_its_row() -> None:
    columns = [Column(name) for name in COLUMNS.split(",")]
    for cells in (ROW, [*ROW[:5], "Eve", "q-2", *ROW[7:]]):
        read_job(job_of_row(columns, cells))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'offer_id\n"half', "the row that begins in line 2 is no CSV"),
        (b"\xff\xfe", "the first line is not UTF-8"),
    ],
)
def test_a_broken_csv_is_an_error_and_nothing_is_published(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.csv"
    file.write_bytes(content)

    with file.open("rb") as opened, pytest.raises(EnqueueError, match=message):
        list(Source(opened, is_csv=True).records())


def test_an_endless_line_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_bytes(b"x" * (17 * 1024 * 1024))

    with file.open("rb") as opened, pytest.raises(EnqueueError, match="line 1 is longer"):
        list(Source(opened, is_csv=False).records())


def test_invalid_utf8_is_a_rejected_row(tmp_path: Path) -> None:
    file = tmp_path / "jobs.csv"
    file.write_bytes(b"offer_id\n\xff\xff\n")

    with file.open("rb") as opened:
        (record,) = Source(opened, is_csv=True).records()

    assert record.body == b'{"offer_id":"\xff\xff"}'


def interrupt(file: Path, url: str, signal_number: signal.Signals) -> subprocess.Popen[str]:
    program = start(str(file), BROKER_URL=url)
    until(lambda: file.with_name(file.name + ".progress").exists(), every=0.002)
    program.send_signal(signal_number)
    return program


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_enqueue_continues_and_loses_nothing(
    signal_number: signal.Signals, broker_url: str, tmp_path: Path
) -> None:
    total = 12 * BATCH
    file = jobs_file(tmp_path / "jobs.jsonl", (f"offer-{n}" for n in range(total)))
    program = interrupt(file, broker_url, signal_number)
    _, errors = program.communicate(timeout=30)

    mark = json.loads((tmp_path / "jobs.jsonl.progress").read_text())
    assert mark["line"] % BATCH == 0
    assert 0 < mark["line"] < total
    assert mark["line"] == mark["published"] <= length(broker_url, topology.JOBS)
    assert "guest" not in json.dumps(mark)
    if signal_number is signal.SIGINT:
        assert program.returncode == 1
        assert errors == (
            f"confirm-offer: interrupted; the broker has all good jobs up to line {mark['line']}; "
            "the same command goes on from there\n"
        )
    again = run("enqueue", str(file), "--json", BROKER_URL=broker_url)

    assert again.returncode == 0
    assert f"goes on after line {mark['line']}: the broker has {mark['published']:,} of {total:,} jobs" in again.stderr
    report = json.loads(again.stdout)
    assert (report["published"], report["resumed_after_line"]) == (total - mark["line"], mark["line"])
    assert set(enqueued_ids(broker_url)) == {f"offer-{n}" for n in range(total)}
    assert not (tmp_path / "jobs.jsonl.progress").exists()


def enqueued_ids(url: str) -> list[str]:
    """As ``enqueued``, but fast for many jobs."""
    with broker.connect(url) as connection:
        found: list[str] = []
        channel = connection.channel()
        waiting = int(channel.queue_declare(topology.JOBS, passive=True).message_count)
        channel.basic_consume(
            topology.JOBS, no_ack=True, callback=lambda message: found.append(json.loads(message.body)["offer_id"])
        )
        while len(found) < waiting:
            connection.drain_events(timeout=10)
        channel.close()
    return found


def test_progress_of_another_file_or_broker_is_ignored(broker_url: str, tmp_path: Path) -> None:
    file = jobs_file(tmp_path / "jobs.jsonl", ["offer-1", "offer-2"])
    Progress(tmp_path / "jobs.jsonl.progress", "another content", broker_url).advance(1, 1)

    done = run("enqueue", str(file), BROKER_URL=broker_url)

    assert (done.returncode, done.stdout) == (0, "2 published, 0 not\n")
    assert "is of another content or broker" in done.stderr
    kept = Progress(tmp_path / "kept", "digest", "amqp://a:secret@one//")
    kept.advance(7, 6)
    assert Progress(tmp_path / "kept", "digest", "amqp://b@one//").begin() == (7, 6)
    assert Progress(tmp_path / "kept", "digest", "amqp://a:secret@two//").begin() is None
    assert Progress(tmp_path / "kept", "other", "amqp://a:secret@one//").begin() is None
    (tmp_path / "kept").write_text("{")
    assert Progress(tmp_path / "kept", "digest", "amqp://a:secret@one//").begin() is None


def test_a_job_that_the_broker_refuses_is_reported_and_enqueued_later(broker_url: str, tmp_path: Path) -> None:
    file = jobs_file(tmp_path / "jobs.jsonl", ["offer-1", "offer-2"])
    with broker.connect(broker_url) as connection:
        connection.channel().queue_delete(topology.JOBS)

    refused = run("enqueue", str(file), BROKER_URL=broker_url)
    with broker.connect(broker_url) as connection:
        topology.declare(connection)
    again = run("enqueue", str(file), BROKER_URL=broker_url)

    assert (refused.returncode, refused.stdout) == (1, "0 published, 2 not\n")
    assert "the broker did not take 2 jobs from line 1 on" in refused.stderr
    assert (again.returncode, again.stdout) == (0, "2 published, 0 not\n")
    assert enqueued(broker_url) == ["offer-1", "offer-2"]


def test_standard_input_writes_only_the_named_file(broker_url: str, tmp_path: Path) -> None:
    rejected = tmp_path / "bad"
    lines = f"{json.dumps(job('offer-1'))}\n{{}}\n"

    done = run("enqueue", "-", "--rejected", str(rejected), stdin=lines, BROKER_URL=broker_url)

    assert (done.returncode, done.stdout) == (1, f"1 published, 1 not; the bad lines are in {rejected}\n")
    assert rejected.read_bytes() == b"{}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]
    assert [as_bytes(message.body) for message in drain(broker_url, topology.JOBS)] == [lines.splitlines()[0].encode()]


def test_an_audit_row_is_written_only_if_a_database_is_named(broker_url: str, sqlite_url: str, tmp_path: Path) -> None:
    file = jobs_file(tmp_path / "jobs.jsonl", ["offer-1"])
    unavailable = "postgresql+psycopg://127.0.0.1:1/x"

    with_database = run("enqueue", str(file), BROKER_URL=broker_url, DATABASE_URL=sqlite_url)
    without_database = run("enqueue", str(file), BROKER_URL=broker_url, DATABASE_URL=unavailable)

    assert (with_database.returncode, with_database.stderr) == (0, "")
    assert (without_database.returncode, without_database.stdout) == (0, "1 published, 0 not\n")
    assert without_database.stderr == "confirm-offer: no audit row is written, because the database can't be reached\n"
    engine = database.connect(sqlite_url)
    with engine.connect() as connection:
        (row,) = connection.execute(select(AuditEntry.__table__)).all()
    engine.dispose()
    assert (row.command, row.count, row.details) == ("enqueue", 1, {"bad": 0})


def test_the_file_of_rejected_rows_is_not_the_input(tmp_path: Path) -> None:
    file = jobs_file(tmp_path / "jobs.jsonl", ["offer-1"])

    done = run("enqueue", str(file), "--rejected", str(file))

    assert done.returncode == 2
    assert len(file.read_text().splitlines()) == 1


def test_memory_does_not_grow_with_the_size_of_the_file(tmp_path: Path) -> None:
    """Checking and reading a file of 60 MB need at most 24 MB more than before."""
    file = tmp_path / "jobs.jsonl"
    line = json.dumps(job("offer-1", metadata={"padding": "x" * 1000})) + "\n"
    file.write_text(line * 45_000)
    script = (
        "import resource, sys\n"
        "from worker.messaging.bulk_publish import in_batches\n"
        "from worker.messaging.job_file import Source, check, good_records\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    source = Source(file, False)\n"
        "    checked = check(source, print, lambda size: None)\n"
        "    assert sum(len(batch) for batch in in_batches(good_records(source, checked, 0))) == 45_000\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    growth = subprocess.run(
        [sys.executable, "-c", script, str(file)], cwd=PROJECT, capture_output=True, text=True, check=True
    )

    assert int(growth.stdout) < 24 * 1024
