"""A message that can't be accepted is a dead letter with a reason, without personal data, and blocks no other."""

import base64
import json
import pickle
import re
import struct
from contextlib import suppress
from datetime import datetime
from functools import reduce
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from amqp.basic_message import Message
from amqp.exceptions import NotFound

from models.states import State
from tasks.celery_tasks import MAX_DELIVERIES
from tests.support.messages import problems_of_dead_letter
from tests.support.queues import as_bytes
from tests.support.servers import RabbitMQ
from tests.support.system import System, WorkerProcess, job, until
from worker.messaging import topology

MARK = "Lovelace"
INVALID = {
    b"": "invalid-json",
    b"{": "invalid-json",
    b"\xff\xfe": "invalid-json",
    b"[1]": "invalid-job",
    json.dumps(job("bad-1", policyholder={"last_name": MARK})).encode(): "invalid-job",
    json.dumps(job("bad/2")).encode(): "invalid-job",
    json.dumps(job("bad-3", **{MARK: MARK})).encode(): "invalid-job",
    json.dumps(job("bad-4", metadata={"long": "x" * 300_000})).encode(): "too-large",
}


def deliver(channel: Any) -> Any:
    return channel.basic_get(topology.JOBS)


def dead_letters_of(system: System, number: int) -> list[Any]:
    """Waits for this number of dead letters. Asserts that their headers fit the AsyncAPI document."""
    until(lambda: system.queue_length(topology.DEAD_LETTERS) == number)
    found = system.drain(topology.DEAD_LETTERS)
    for dead_letter in found:
        assert problems_of_dead_letter(dead_letter.headers) == []
    return found


def test_each_invalid_message_is_a_dead_letter_and_the_next_job_is_confirmed(system: System) -> None:
    system.publish([*INVALID, job("good-1")], message_id="M-1", correlation_id="C-1")
    system.start_worker(WORKER_CONCURRENCY="1")

    system.until_events(1)

    found = dead_letters_of(system, len(INVALID))
    assert {as_bytes(dead_letter.body): dead_letter.headers["x-dead-letter-code"] for dead_letter in found} == INVALID
    for dead_letter in found:
        assert MARK not in dead_letter.headers["x-dead-letter-detail"]
        assert datetime.fromisoformat(dead_letter.headers["x-dead-letter-at"]).tzinfo is not None
        assert (dead_letter.properties["message_id"], dead_letter.properties["correlation_id"]) == ("M-1", "C-1")
    assert system.states() == {State.CONFIRMED: 1}


def test_a_conflicting_job_is_a_dead_letter(system: System) -> None:
    system.start_worker()
    system.publish([job("offer-1")])
    system.until_events(1)
    system.publish([job("offer-1", order_reference="SO-other")])

    (dead_letter,) = dead_letters_of(system, 1)

    assert dead_letter.headers["x-dead-letter-code"] == "conflicting-job"
    assert system.states() == {State.CONFIRMED: 1}


HEADERS: list[dict[str, Any]] = [
    {"task": "resume", "id": "1"},
    {"task": "celery.backend_cleanup", "id": "2", "argsrepr": MARK},
    {"task": "no.such.task", "id": "3", "eta": "2099-01-01T00:00:00", "expires": "2000-01-01T00:00:00"},
    {"task": ["a", "list"]},
    {"compression": "no-such-compression"},
    {"x-delivery-count": 99},
    {"x-delivery-count": "abc"},
    {"traceparent": {"not": "text"}},
    {"stamped_headers": ["a"], "stamps": {"a": "b"}, "timelimit": [0.001, 0.001]},
]


def test_a_message_with_any_headers_is_a_job(system: System) -> None:
    for number, headers in enumerate(HEADERS):
        system.publish([job(f"offer-{number}")], headers=headers)
    for number, content_type in enumerate(["application/x-python-serialize", "application/data", "text/plain"]):
        system.publish([job(f"typed-{number}")], content_type=content_type, content_encoding="binary")
    system.publish([job("odd")], reply_to="nobody", correlation_id="x" * 200, priority=3, expiration=3600)
    worker = system.start_worker()
    total = len(HEADERS) + 4

    system.until_events(total)

    assert system.states() == {State.CONFIRMED: total}
    assert worker.process.poll() is None
    assert MARK not in worker.log.read_text()


def flag(bit: int) -> bytes:
    return struct.pack(">H", bit)


def headers_of(table: bytes) -> bytes:
    return flag(0x2000) + struct.pack(">I", len(table)) + table


DEEP = reduce(lambda inner, _: b"A" + struct.pack(">I", len(inner)) + inner, range(3000), b"V")
UNREADABLE = {
    "correlation id in Latin-1": flag(0x0400) + "\x04Größ".encode("latin-1"),
    "correlation id of half a pair": flag(0x0400) + b"\x03\xed\xa0\x80",
    "content type of no text": flag(0x8000) + b"\x02\xff\xfe",
    "header of a far future": headers_of(b"\x01tT" + struct.pack(">Q", 2**63)),
    "headers nested deeply": headers_of(b"\x01t" + DEEP),
}


class Raw(Message):
    """A message with raw bytes as properties, as a careless or malicious publisher may send."""

    def __init__(self, body: bytes, properties: bytes) -> None:
        super().__init__(body)
        self.raw_properties = properties

    def _serialize_properties(self) -> bytes:
        return self.raw_properties


def test_a_job_with_unreadable_properties_is_a_job(system: System) -> None:
    """py-amqp alone would end the worker, at each restart again."""
    channel = system.connection.channel()
    for number, properties in enumerate(UNREADABLE.values()):
        message = Raw(json.dumps(job(f"offer-{number}")).encode(), properties)
        channel.basic_publish(message, exchange="", routing_key=topology.JOBS)
    channel.basic_publish(Raw(b"{", UNREADABLE["headers nested deeply"]), exchange="", routing_key=topology.JOBS)
    worker = system.start_worker()

    system.until_events(len(UNREADABLE))

    (dead_letter,) = dead_letters_of(system, 1)
    assert dead_letter.headers["x-dead-letter-code"] == "invalid-json"
    assert worker.process.poll() is None


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_no_content_of_a_message_is_executed(system: System, tmp_path: Path) -> None:
    """Pickle and YAML with all content types on both queues, and messages that Celery would execute."""
    file = tmp_path / "executed"
    pickled = pickle.dumps(Attack(file))
    call = [[str(uuid4())], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    bodies = [
        pickled,
        pickle.dumps([[Attack(file)], {}, {}]),
        base64.b64encode(pickled),
        f"!!python/object/apply:os.mknod ['{file}']".encode(),
        json.dumps(call).encode(),
        json.dumps({"__type__": "bytes", "__value__": base64.b64encode(pickled).decode()}).encode(),
    ]
    types = ["application/x-python-serialize", "application/x-yaml", "application/x-msgpack", "application/json"]
    headers = {"lang": "py", "task": "resume", "id": "1", "root_id": "1", "argsrepr": MARK, "kwargsrepr": "{}"}
    messages = list(product(bodies, types, ["binary", "base64", "utf-8"]))
    channel = system.connection.channel()
    for body, content_type, encoding in messages:
        for queue in topology.JOBS, topology.RESUME:
            message = channel.prepare_message(body, None, content_type, encoding, headers)
            channel.basic_publish(message, exchange="", routing_key=queue)
    worker = system.start_worker()

    found = dead_letters_of(system, len(messages))

    until(lambda: system.queue_length(topology.RESUME) == 0)
    assert worker.stop() == 0
    assert {dead_letter.headers["x-dead-letter-code"] for dead_letter in found} == {"invalid-json", "invalid-job"}
    assert system.states() == {}
    assert MARK not in worker.log.read_text()
    assert not file.exists()
    pickle.loads(pickled)
    assert file.exists(), "the attack was none"


def test_the_declared_encoding_of_a_body_is_ignored(system: System) -> None:
    plain = json.dumps(job("offer-1", order_reference="Größe"), ensure_ascii=False).encode()
    system.publish([plain], content_encoding="latin-1", headers={"compression": "zlib"})
    system.publish(["{Größe".encode()], content_encoding="utf-16")
    system.start_worker()

    (event,) = system.until_events(1)

    assert event["data"]["order_reference"] == "Größe"
    (dead_letter,) = dead_letters_of(system, 1)
    assert as_bytes(dead_letter.body) == "{Größe".encode()


def test_a_message_delivered_too_often_is_a_dead_letter_without_being_read(system: System) -> None:
    system.publish([job("offer-1")])
    channel = system.connection.channel()
    for _ in range(MAX_DELIVERIES):
        channel.basic_reject(until(lambda: deliver(channel)).delivery_tag, requeue=True)
    system.start_worker()

    (dead_letter,) = dead_letters_of(system, 1)

    assert dead_letter.headers["x-dead-letter-code"] == "poison"
    assert system.states() == {}


def test_the_resume_queue_accepts_ids_only(system: System) -> None:
    channel = system.connection.channel()
    for body in (b"", b"{}", b"\xff", b"00000000-0000-0000-0000-000000000000", json.dumps(job("x")).encode()):
        message = channel.prepare_message(body, headers={"task": "confirm_offer", "id": "1"})
        channel.basic_publish(message, exchange="", routing_key=topology.RESUME)
    worker = system.start_worker()
    system.publish([job("offer-1")])

    system.until_events(1)

    until(lambda: system.queue_length(topology.RESUME) == 0)
    assert system.states() == {State.CONFIRMED: 1}
    assert worker.process.poll() is None


def test_a_dead_letter_queue_that_is_gone_is_declared_anew(system: System) -> None:
    system.start_worker(WORKER_CONCURRENCY="2")
    system.publish([job("first")])
    system.until_events(1)
    system.connection.channel().queue_delete(topology.DEAD_LETTERS)

    system.publish([*[job(f"bad-{number}", quotes=[]) for number in range(6)], job("second")])

    system.until_events(2)

    def declared_anew() -> bool:
        with suppress(NotFound):
            return system.queue_length(topology.DEAD_LETTERS) == 6
        return False

    until(declared_anew)


@pytest.mark.slow
def test_dead_letters_that_are_refused_hold_no_thread(system: System, rabbitmq: RabbitMQ) -> None:
    """More bad jobs than threads: good jobs behind them get through, and no bad one is lost."""
    virtual_host = system.broker_url.rpartition("/")[2]
    limit = json.dumps({"max-length": 0, "overflow": "reject-publish"})
    rabbitmq.ctl(
        "set_policy", "-p", virtual_host, "full", "^confirm-offer.dead-letters$", limit, "--apply-to", "queues"
    )
    system.publish(job(f"bad-{number}", quotes=[]) for number in range(24))
    worker = system.start_worker(WORKER_CONCURRENCY="8")
    until(lambda: "dead_letters_refused" in worker.log.read_text())

    for number in range(5):
        system.publish([job(f"good-{number}")])
        system.until_events(number + 1, seconds=10)

    logged = worker.log.read_text()
    assert logged.count("dead_letters_refused") <= logged.count("dead_letters_taken") + 1, "each refusal is logged once"
    rabbitmq.ctl("clear_policy", "-p", virtual_host, "full")
    assert len({as_bytes(letter.body) for letter in dead_letters_of(system, 24)}) == 24
    assert system.states() == {State.CONFIRMED: 5}
    until(lambda: "dead_letters_taken" in worker.log.read_text())
    assert worker.stop() == 0


@pytest.mark.slow
def test_dead_letters_without_the_right_to_publish_hold_no_thread(system: System, rabbitmq: RabbitMQ) -> None:
    virtual_host = system.broker_url.rpartition("/")[2]
    rabbitmq.ctl("add_user", virtual_host, "secret")
    rabbitmq.ctl("set_permissions", "-p", virtual_host, virtual_host, ".*", ".*", ".*")
    url = system.broker_url.replace("guest:guest", f"{virtual_host}:secret")
    worker = system.start_worker(BROKER_URL=url, WORKER_CONCURRENCY="2")
    system.publish([job("first")])
    system.until_events(1)
    rabbitmq.ctl("set_permissions", "-p", virtual_host, virtual_host, ".*", "^booking-events$", ".*")

    system.publish(job(f"bad-{number}", quotes=[]) for number in range(4))
    until(lambda: "dead_letters_refused" in worker.log.read_text())

    rabbitmq.ctl("set_permissions", "-p", virtual_host, virtual_host, ".*", ".*", ".*")
    assert len({as_bytes(letter.body) for letter in dead_letters_of(system, 4)}) == 4
    system.publish([job("second")])
    system.until_events(2)
    assert worker.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_bodies_that_are_too_large_are_held_one_at_a_time(system: System, rabbitmq: RabbitMQ, pool: str) -> None:
    worker = system.start_worker(WORKER_POOL=pool)
    system.publish([job("first")])
    system.until_events(1)
    before = peak_memory(worker)
    size = 10 * 1024 * 1024

    with rabbitmq.max_message_size(size):
        for _ in range(64):
            system.publish([b" " * size])
        system.publish([job("last")])
        until(lambda: system.queue_length(topology.DEAD_LETTERS) == 64, 120)
        system.until_events(2)

    assert peak_memory(worker) - before < 8 * size
    assert worker.stop() == 0


def peak_memory(worker: WorkerProcess) -> int:
    """In bytes."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kib) * 1024
