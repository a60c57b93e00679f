"""Dead letters are listed, replayed and dropped; nothing is lost, moved or shown by mistake."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection
from sqlalchemy import select

from models.tables import AuditEntry
from tests.support.commands import run
from tests.support.queues import as_bytes, dead_letter, drain, length, put
from tests.support.servers import RabbitMQ
from tests.support.system import PROJECT, System, job, until
from worker.messaging import topology
from worker.messaging.dead_letter_queue import DeadLetterQueue
from worker.messaging.masking import for_editor, masked
from worker.messaging.topology import DEAD_LETTERS, JOBS

pytestmark = pytest.mark.slow

DETAIL = "policyholder.email: must be an e-mail address"  # of each that dead_letter() makes
PERSON = ("Ada", "Lovelace", "ada@example.com")


def body(offer_id: str, **changes: Any) -> bytes:
    return json.dumps(job(offer_id, **changes), ensure_ascii=False).encode()


def settings(system: System) -> dict[str, str]:
    return {"BROKER_URL": system.broker_url, "DATABASE_URL": system.database_url}


def audit_entries(system: System) -> list[tuple[str, str | None, int, dict[str, Any]]]:
    with system.engine.connect() as connection:
        rows = connection.execute(select(AuditEntry.__table__).order_by(AuditEntry.id)).all()
    return [(row.command, row.reason, row.count, row.details) for row in rows]


def test_dead_letters_are_listed_by_code_masked_and_keep_their_order(broker_url: str) -> None:
    bodies = [
        body("offer-1", policyholder={"first_name": "Ada", "email": "ada@example.com", "Lovelace": "Ada"}),
        body("offer-2", partner_id="Ada Lovelace"),
        b'{"offer_id": "offer-3", "half": ',
        "Lovelace \x1b[31m".encode("utf-16"),
    ]
    codes = ["invalid-job", "invalid-job", "invalid-json", "invalid-json"]
    put(
        broker_url, [dead_letter(n, content, code) for n, (content, code) in enumerate(zip(bodies, codes, strict=True))]
    )

    shown = run("dead-letters", "list", BROKER_URL=broker_url)
    listing = json.loads(run("dead-letters", "list", "--json", BROKER_URL=broker_url).stdout)

    assert (shown.returncode, shown.stderr) == (0, "")
    assert max(len(line) for line in shown.stdout.splitlines()) <= 80
    assert shown.stdout.startswith("invalid-job: 2 letters, ")
    assert "P-100 offer-1" in shown.stdout
    assert not [person for person in PERSON if person in shown.stdout + json.dumps(listing)]
    assert listing["total"] == 4
    assert listing["groups"] == [
        {"code": "invalid-job", "count": 2, "first_at": "2026-01-31T12:00:00.000000Z",
         "last_at": "2026-01-31T12:00:01.000000Z", "details": [{"detail": DETAIL, "count": 2}]},
        {"code": "invalid-json", "count": 2, "first_at": "2026-01-31T12:00:02.000000Z",
         "last_at": "2026-01-31T12:00:03.000000Z", "details": [{"detail": DETAIL, "count": 2}]},
    ]  # fmt: skip
    first, second, third, _ = listing["letters"]
    assert (first["partner_id"], first["offer_id"], first["size"]) == ("P-100", "offer-1", len(bodies[0]))
    assert first["body"]["policyholder"] == {"first_name": "<text>", "email": "<text>", "<key>": "<text>"}
    assert first["body"]["offer_id"] == "offer-1"
    assert (second["partner_id"], second["body"]["partner_id"]) == (None, "<text>")
    assert (third["offer_id"], third["body"]) == (None, None)
    assert [message.body for message in map(with_bytes, drain(broker_url, DEAD_LETTERS))] == bodies


def with_bytes(message: Any) -> Any:
    message.body = as_bytes(message.body)
    return message


def test_thousands_are_listed_in_place_and_a_part_is_shown(broker_url: str) -> None:
    put(broker_url, [dead_letter(n, body(f"offer-{n}")) for n in range(3000)])

    listing = json.loads(run("dead-letters", "list", "--limit", "2", "--json", BROKER_URL=broker_url).stdout)

    assert (listing["total"], [entry["offer_id"] for entry in listing["letters"]]) == (3000, ["offer-0", "offer-1"])
    assert length(broker_url, DEAD_LETTERS) == 3000
    order = [json.loads(message.body)["offer_id"] for message in drain(broker_url, DEAD_LETTERS)]
    assert order == [f"offer-{n}" for n in range(3000)]


def test_all_dead_letters_are_left_for_the_next_reader(broker_url: str) -> None:
    put(broker_url, [dead_letter(n, b"%d" % n) for n in range(4)])

    counts = []
    for _ in range(40):
        with DeadLetterQueue(broker_url) as queue:
            counts.append(queue.message_count)

    assert counts == [4] * 40


def test_revealed_bodies_are_audited(system: System) -> None:
    put(system.broker_url, [dead_letter(1, body("offer-1")), dead_letter(2, b"\xff\xfe")])

    listing = json.loads(run("dead-letters", "list", "--reveal", "--json", **settings(system)).stdout)

    assert listing["letters"][0]["body"].encode() == body("offer-1")
    assert (listing["letters"][1]["body"], listing["letters"][1]["body_base64"]) == (None, "//4=")
    assert [entry[:3] for entry in audit_entries(system)] == [("dead-letters list --reveal", None, 2)]


def test_a_job_is_replayed_unchanged_without_the_headers_of_its_dead_letter(system: System) -> None:
    """Also a message that RabbitMQ itself gave up, which has no code."""
    bodies = [body("offer-1", order_reference="Größe"), b"\xff\x00\xfe", b"", body("offer-2")]
    put(
        system.broker_url,
        [dead_letter(n, content, message_id=f"M-{n}", correlation_id="C-1") for n, content in enumerate(bodies)],
    )
    channel = system.connection.channel()
    system.publish([b"given up"], message_id="M-4", headers={"x-dead-letter-code": "invalid-job", "own": "header"})
    for _ in range(topology.DELIVERY_LIMIT + 1):
        channel.basic_reject(until(lambda: channel.basic_get(JOBS)).delivery_tag, requeue=True)
    until(lambda: system.queue_length(DEAD_LETTERS) == 5)

    listed = json.loads(run("dead-letters", "list", "--json", BROKER_URL=system.broker_url).stdout)
    done = run("dead-letters", "replay", "--yes", "--json", **settings(system))

    assert {group["code"]: group["count"] for group in listed["groups"]} == {"invalid-job": 4, "poison": 1}
    assert "delivery_limit" in listed["letters"][-1]["detail"]
    assert listed["letters"][-1]["at"].endswith("Z")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"replayed": 5, "left": 0})
    jobs = [with_bytes(message) for message in drain(system.broker_url, JOBS)]
    assert [message.body for message in jobs] == [*bodies, b"given up"]
    assert [message.properties["message_id"] for message in jobs] == [f"M-{n}" for n in range(5)]
    assert jobs[0].properties["correlation_id"] == "C-1"
    assert set(jobs[0].headers) - {"x-delivery-count"} == {"traceparent"}
    assert set(jobs[4].headers) - {"x-delivery-count"} == set()
    assert system.queue_length(DEAD_LETTERS) == 0
    ((command, _, count, details),) = audit_entries(system)
    assert (command, count, details["edit"]) == ("dead-letters replay", 5, False)


def test_dead_letters_are_selected_by_code_and_limit(system: System) -> None:
    codes = ["invalid-job", "poison", "too-large", "poison", "poison"]
    put(system.broker_url, [dead_letter(n, b"%d" % n, code) for n, code in enumerate(codes)])

    replayed = run("dead-letters", "replay", "--code", "poison", "--limit", "2", "--yes", **settings(system))
    dropped = run("dead-letters", "drop", "--code", "too-large", "--reason", "a test", "--yes", **settings(system))
    none_left = run("dead-letters", "drop", "--code", "too-large", "--reason", "a test", **settings(system))
    unasked = run("dead-letters", "drop", "--reason", "a test", **settings(system))

    assert (replayed.stdout, dropped.stdout) == ("2 dead letters replayed\n", "1 dead letter dropped\n")
    assert [as_bytes(message.body) for message in drain(system.broker_url, JOBS)] == [b"1", b"3"]
    assert (none_left.returncode, none_left.stdout) == (0, "no dead letters of code too-large\n")
    assert (unasked.returncode, "add --yes" in unasked.stderr) == (2, True)
    assert [as_bytes(message.body) for message in drain(system.broker_url, DEAD_LETTERS)] == [b"0", b"4"]
    assert [entry[:3] for entry in audit_entries(system)] == [
        ("dead-letters replay", None, 2),
        ("dead-letters drop", "a test", 1),
    ]


def test_a_dead_letter_that_fails_again_is_replayed_once(system: System) -> None:
    put(system.broker_url, [dead_letter(n, b"{") for n in range(200)])
    system.start_worker()

    done = run("dead-letters", "replay", "--yes", **settings(system))

    assert done.stdout == "200 dead letters replayed\n"
    until(lambda: system.queue_length(DEAD_LETTERS) == 200)


def test_without_a_database_no_dead_letter_is_touched(broker_url: str) -> None:
    put(broker_url, [dead_letter(1, b"1")])
    unavailable = {"BROKER_URL": broker_url, "DATABASE_URL": "postgresql+psycopg://127.0.0.1:1/x"}

    done = run("dead-letters", "drop", "--reason", "a test", "--yes", **unavailable)

    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "database x: can't be reached" in done.stderr
    assert (length(broker_url, DEAD_LETTERS), length(broker_url, JOBS)) == (1, 0)


def test_a_copy_that_the_broker_refuses_stays_a_dead_letter(system: System) -> None:
    put(system.broker_url, [dead_letter(n, b"%d" % n) for n in range(10)])
    channel = system.connection.channel()
    channel.queue_delete(JOBS)

    without_queue = run("dead-letters", "replay", "--yes", **settings(system))

    assert without_queue.returncode == 1
    assert "the broker did not take 10 copies" in without_queue.stderr
    assert [as_bytes(message.body) for message in drain(system.broker_url, DEAD_LETTERS)] == [
        b"%d" % n for n in range(10)
    ]


def test_a_copy_that_the_broker_refuses_stops_no_other(system: System, rabbitmq: RabbitMQ) -> None:
    large = b"0" * 5000
    put(system.broker_url, [dead_letter(0, large), *(dead_letter(n, b"%d" % n) for n in range(1, 1200))])

    with rabbitmq.max_message_size(1000):
        done = run("dead-letters", "replay", "--yes", **settings(system))

    assert (done.returncode, done.stdout) == (1, "1,199 dead letters replayed, 1 left\n")
    assert "the broker did not take 1 copy" in done.stderr
    replayed = {as_bytes(message.body) for message in drain(system.broker_url, JOBS)}  # some of them twice
    assert replayed == {b"%d" % n for n in range(1, 1200)}
    assert [as_bytes(message.body) for message in drain(system.broker_url, DEAD_LETTERS)] == [large]


def test_a_replay_that_is_killed_loses_nothing(system: System) -> None:
    bodies = [body(f"offer-{n}") for n in range(2000)]
    put(system.broker_url, [dead_letter(n, content) for n, content in enumerate(bodies)])
    program = subprocess.Popen(
        [sys.executable, "-m", "worker", "dead-letters", "replay", "--yes"],
        env={**os.environ, **settings(system)},
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
    )
    until(lambda: system.queue_length(JOBS) > 0, every=0.005)
    program.send_signal(signal.SIGKILL)
    program.wait(10)

    until(lambda: system.queue_length(JOBS) + system.queue_length(DEAD_LETTERS) >= 2000)
    left = system.queue_length(DEAD_LETTERS)
    assert left > 0
    assert [(command, details["limit"]) for command, _, _, details in audit_entries(system)] == [
        ("dead-letters replay", None)
    ]
    again = run("dead-letters", "replay", "--yes", **settings(system))

    assert again.returncode == 0
    assert {as_bytes(message.body) for message in drain(system.broker_url, JOBS)} == set(bodies)
    assert system.queue_length(DEAD_LETTERS) == 0


def editor(tmp_path: Path, script: str) -> dict[str, str]:
    """An $EDITOR that runs a Python script on ``text``, the content of the file."""
    program = tmp_path / "editor.py"
    program.write_text(
        f"import os, pathlib, sys\nfile = pathlib.Path(sys.argv[1])\ntext = file.read_text()\n{script}\n"
        "file.write_text(text)\n"
    )
    return {"EDITOR": f"{sys.executable} {program}"}


def test_edited_dead_letters_are_checked_before_they_are_replayed(system: System, tmp_path: Path) -> None:
    fixable, hopeless, emptied = (
        body("offer-1", policyholder={"first_name": "Ada", "last_name": "L", "country": "GB", "email": "ada"}),
        body("offer-2", quotes=[]),
        body("offer-3", quotes=[]),
    )
    put(
        system.broker_url,
        [dead_letter(n, content) for n, content in enumerate([fixable, hopeless, emptied, body("offer-4")])],
    )
    seen = tmp_path / "seen"
    edits = editor(
        tmp_path,
        f"open({str(seen)!r}, 'a').write(oct(os.stat(file.parent).st_mode & 0o777) + ' ' + str(file) + chr(10))\n"
        "text = '' if 'offer-3' in text else text.replace('\"ada\"', '\"ada@example.com\"')",
    )

    done = run("dead-letters", "replay", "--edit", "--yes", **edits, **settings(system))

    assert done.returncode == 1
    assert done.stdout == "2 dead letters replayed, 2 left\n"
    assert "quotes: " in done.stderr
    assert not [person for person in PERSON if person in done.stderr]
    first, unchanged = (as_bytes(message.body) for message in drain(system.broker_url, JOBS))
    assert json.loads(first)["policyholder"]["email"] == "ada@example.com"
    assert unchanged == body("offer-4")
    assert {as_bytes(message.body) for message in drain(system.broker_url, DEAD_LETTERS)} == {hopeless, emptied}
    for line in seen.read_text().splitlines():
        mode, file = line.split(" ", 1)
        assert mode == "0o700"
        assert not Path(file).exists()


def test_a_failing_editor_changes_nothing(system: System, tmp_path: Path) -> None:
    put(system.broker_url, [dead_letter(n, body(f"offer-{n}")) for n in range(2)])

    done = run("dead-letters", "replay", "--edit", "--yes", EDITOR="false", **settings(system))

    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2)
    assert "stay where they are" in done.stderr
    assert (system.queue_length(DEAD_LETTERS), system.queue_length(JOBS)) == (2, 0)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_edit_leaves_the_dead_letter_and_no_file(
    signal_number: signal.Signals, system: System, tmp_path: Path
) -> None:
    put(system.broker_url, [dead_letter(1, body("offer-1"))])
    opened = tmp_path / "opened"
    edits = editor(tmp_path, f"open({str(opened)!r}, 'w').write(str(file))\nimport time; time.sleep(60)")
    program = subprocess.Popen(
        [sys.executable, "-m", "worker", "dead-letters", "replay", "--edit", "--yes"],
        env={**os.environ, **edits, **settings(system), "TMPDIR": str(tmp_path)},
        cwd=PROJECT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    file = Path(until(lambda: opened.exists() and opened.read_text()))
    assert file.exists()

    os.killpg(program.pid, signal_number)
    _, errors = program.communicate(timeout=30)

    assert program.returncode == 1
    assert errors.splitlines()[-1] == "confirm-offer: interrupted: 0 replayed, the others stay dead letters"
    assert not file.parent.exists()
    until(lambda: system.queue_length(DEAD_LETTERS) == 1)
    assert [(command, count) for command, _, count, _ in audit_entries(system)] == [("dead-letters replay", 0)]


def test_an_undeclared_queue_is_a_clear_error(broker_url: str) -> None:
    with Connection(broker_url) as connection:
        connection.channel().queue_delete(DEAD_LETTERS)

    done = run("dead-letters", "list", BROKER_URL=broker_url)

    assert done.returncode == 1
    assert "run 'confirm-offer broker declare'" in done.stderr


@pytest.mark.parametrize(
    "content",
    [b'{"a": 1.10}', b'{"a": 1E5}', b'{"a": -0}', b'{"a": 1, "a": 2}', b'{"a": NaN}', b'"\\ud800"', b"{", b"\xff"],
)
def test_a_body_that_indenting_would_change_is_edited_unchanged(content: bytes) -> None:
    assert for_editor(content) == content


def test_other_bodies_are_indented() -> None:
    assert for_editor(b'{"a":[1,2.5,"\xc3\xb6"]}') == '{\n  "a": [\n    1,\n    2.5,\n    "ö"\n  ]\n}\n'.encode()


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"[]", []),
        (b'"Ada"', "<text>"),
        (b'{"Ada": 1, "Eve": true, "offer_id": "a b"}',
         {"<key>": "<number>", "<key 2>": "<true or false>", "offer_id": "<text>"}),
        (b'{"metadata": {"Ada": ""}}', {"metadata": {"<key>": "<empty text>"}}),
        (b"[" * 100_000, None),
        (b'{"offer_id": "\\u001b[31m", "order_reference": "\\n", "partner_id": "P-1"}',
         {"offer_id": "<text>", "order_reference": "<text>", "partner_id": "P-1"}),
    ],
)  # fmt: skip
def test_each_body_is_masked(content: bytes, shown: Any) -> None:
    assert masked(content) == shown
