"""Fuzzing: what comes from outside, changed at random, against the functions that read it.

    python -m tests.fuzz --seconds 3600 --seed 1

Each input is a valid one with some bytes or values changed. It must be read, or refused with the error that is meant
for that. Nothing that an error says, or that is stored in clear or published, may hold the personal mark. A failure is
printed with its seed and number, and the exit code is 1. What it finds becomes a test.
"""

import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
from amqp.basic_message import Message
from cryptography.fernet import Fernet
from sqlalchemy import select

from models.job import JobRejected, read_job
from models.states import State
from models.tables import Attempt, Booking, Confirmation, OutboxEvent, Policy, Policyholder
from tasks import confirm
from tasks.accept import Delivery
from tasks.decide import RetryPolicy, decide
from tasks.operations.resolve import read_booking
from tasks.record import RecordedAttempt
from tests.support.jobs import FULL
from tests.support.settings import REQUIRED
from worker.cli.ui.console import UsageError
from worker.cli.ui.offers_file import read_offers
from worker.errors import ResolveError, SettingsError, XoneError
from worker.messaging import broker, masking
from worker.messaging.consumer import celery_headers
from worker.messaging.properties import ids_of_message, valid_traceparent
from worker.runtime import Runtime
from worker.sandbox.bookings import new_booking
from worker.settings import SECTIONS, read
from worker.storage import migrator
from worker.xone.answers import HttpAnswer, read_confirm_answer
from worker.xone.read_back import ReadBack

MARK = "Qux'omat"  # personal, wherever it stands in an input; no code or id has an apostrophe
# fmt: off
PIECES = [b"", b"\x00", b"\xff", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e999", b"-0", b"\\ud800",
          b"9" * 400, b"[" * 2000, MARK.encode(), "\u202e\u0130".encode(), b"\r\n", b"=", b"NaN", b'{"a":' * 300]
VALUES = [None, True, -1, 2**70, 1e308, "", MARK, f"{MARK}@x.example", [], {}, [[]], {MARK: MARK}, "\ud800", "x" * 5000,
          "2026-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", {"id": MARK}]
# fmt: on


def mutated_bytes(dice: random.Random, valid: bytes) -> bytes:
    """A copy with a few pieces replaced, removed or repeated."""
    content = bytearray(valid)
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(len(content) + 1)
        end = min(at + dice.choice((0, 1, 4, 40)), len(content))
        content[at:end] = dice.choice((dice.choice(PIECES), content[at:end] * 2, dice.randbytes(3)))
    return bytes(content)


def mutated_json(dice: random.Random, valid: Any) -> bytes:
    """A copy with a few values replaced, keys added or removed."""
    content = json.loads(json.dumps(valid))
    for _ in range(dice.choice((1, 1, 2, 4))):
        node, parent, key = content, None, None
        while isinstance(node, dict | list) and node and (parent is None or dice.random() < 0.8):
            parent, key = node, dice.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = parent[key]
        if parent is None or key is None:
            return json.dumps(dice.choice(VALUES)).encode()
        match dice.randrange(4):
            case 0 if isinstance(parent, dict):
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[dice.choice((MARK, "id", "errors", "data", "offer_id", ""))] = deepcopy(dice.choice(VALUES))
            case _:
                parent[key] = deepcopy(dice.choice(VALUES))
    return json.dumps(content).encode()


def changed(dice: random.Random, valid: Any) -> bytes:
    return mutated_json(dice, valid) if dice.random() < 0.6 else mutated_bytes(dice, json.dumps(valid).encode())


def refuse_mark(text: str) -> None:
    assert MARK.lower() not in text.lower(), text[:500]


JOB = {**FULL, "policyholder": {**FULL["policyholder"], "last_name": MARK, "email": f"{MARK}@x.example"}}
BOOKING = json.loads(json.dumps(new_booking("P-100", "5c7e", JOB), default=str))


class Targets:
    """The functions under test. Each takes a source of randomness, and returns the input that it has tried."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def job(self, dice: random.Random) -> bytes:
        body = changed(dice, JOB)
        try:
            refuse_mark(repr(read_job(body)))
        except JobRejected as rejected:
            refuse_mark(str(rejected))
        shown = masking.masked(body)
        for label in ("order_reference", "metadata"):  # shown as they are: checkouts put no personal data there
            shown = (
                {name: value for name, value in shown.items() if name != label} if isinstance(shown, dict) else shown
            )
        refuse_mark(json.dumps(shown, default=str))
        masking.ids_of(body)
        return body

    def answer(self, dice: random.Random) -> bytes:
        """An answer to confirm, from the call to the stored rows and the event."""
        offer = str(uuid4())
        lease = confirm.accept_job(json.dumps({**JOB, "offer_id": offer}).encode(), Delivery(), self._runtime)
        assert lease is not None
        body = changed(dice, {"data": {**BOOKING, "id": f"INS-{offer}", "offer_id": offer}})
        status = dice.choice((200, 200, 200, 201, 202, 400, 409, 422, 500))
        result: Any
        try:
            result = read_confirm_answer(HttpAnswer(status, {}, body), offer, lease.body)
        except XoneError as error:
            result = error
            refuse_mark(str(error))
        decision = decide(result, lease.history, RetryPolicy(), dice.random())
        state = confirm.record_answer(RecordedAttempt(lease, decision, 0.1), self._runtime)
        assert state in (decision.state, State.NEEDS_REVIEW)  # the second: the booking's id is another offer's
        self._refuse_mark_in_rows(lease.id)
        return body

    def _refuse_mark_in_rows(self, confirmation_id: Any) -> None:
        with self._runtime.engine.connect() as connection:
            for table in (Confirmation, Attempt, Booking, Policy, Policyholder, OutboxEvent):
                id_ = table.id if table is Confirmation else table.confirmation_id  # type: ignore[attr-defined]
                for row in connection.execute(select(table.__table__).where(id_ == confirmation_id)):
                    shown = {name: value for name, value in row._mapping.items() if not isinstance(value, bytes)}
                    allowed = {"policy_content", "id", "extra_fields"}  # words for all customers; the booking's id
                    refuse_mark(str({name: value for name, value in shown.items() if name not in allowed}))

    def bookings(self, dice: random.Random) -> bytes:
        """A page of the list of bookings."""
        body = changed(dice, {"data": [BOOKING, {**BOOKING, "offer_id": None}, {"id": 1}], "links": {"next": None}})
        content = HttpAnswer(200, {}, body).json()
        listed = content.get("data") if isinstance(content, dict) else None
        if isinstance(listed, list):
            objects = [each for each in listed if isinstance(each, dict)]
            ReadBack().find("P-100", "5c7e", frozenset({"q-1"}), lambda: (each for each in objects), lambda: None)
        try:
            read_booking(body, "5c7e")
        except ResolveError as error:
            refuse_mark(str(error).replace(f"other offer: {MARK}", ""))
        return body

    def properties(self, dice: random.Random) -> bytes:
        """AMQP properties and headers, as bytes of a frame and as values."""
        headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "x": [1]}
        message = Message(b"{}", message_id="m", correlation_id="c", type="t", timestamp=1, application_headers=headers)
        frame = mutated_bytes(dice, message._serialize_properties())
        found, _ = broker._decode_properties(frame, 0)
        ids_of_message(found)
        headers = found.get("application_headers")
        holder = type(
            "Delivered", (), {"headers": headers, "delivery_info": {"redelivered": True}, "properties": found}
        )
        valid_traceparent(celery_headers("confirm_offer", holder)["traceparent"])
        return frame

    def offers(self, dice: random.Random) -> bytes:
        """Files of offers, in each form."""
        forms = [b"P-1 o-1\no-2\n", b'partner_id,offer_id,x\nP-1,o-1,"a\nb"\n,o-2,\'=1\n', b'{"offer_id": "o-1"}\n']
        content = mutated_bytes(dice, dice.choice(forms) + MARK.encode() * dice.randrange(2))
        try:
            read_offers(BytesIO(content))
        except UsageError as error:
            refuse_mark(error.message)
        return content

    def settings(self, dice: random.Random) -> bytes:
        """A ``.env`` file."""
        given = {**REQUIRED, "XONE_CLIENT_SECRET": MARK, "DATABASE_URL": f"postgresql+psycopg://u:{MARK}@h/d"}
        content = mutated_bytes(dice, "".join(f"{name}={value}\n" for name, value in given.items()).encode())
        Path(".env").write_bytes(content)
        for section in SECTIONS:
            try:
                refuse_mark(repr(read(section)))
            except (SettingsError, UnicodeDecodeError) as error:
                refuse_mark(str(error) if isinstance(error, SettingsError) else "")
        return content


def run(seconds: float, seed: int) -> bool:
    """Tries all targets in turn for so long. Returns whether all held."""
    tried, failed = Counter[str](), Counter[str]()
    os.chdir(tempfile.mkdtemp(prefix="confirm-offer-fuzz-"))
    os.environ |= {**REQUIRED, "DATABASE_URL": "sqlite:///fuzz.db", "DATA_KEYS": Fernet.generate_key().decode()}
    runtime = Runtime(dice=lambda: 0.0)
    migrator.upgrade(runtime.engine)
    targets = Targets(runtime)
    logging.getLogger("dotenv").setLevel(logging.ERROR)
    names: list[Callable[[random.Random], bytes]] = [
        targets.job, targets.answer, targets.bookings, targets.properties, targets.offers, targets.settings,
    ]  # fmt: skip
    ends_at, number = time.monotonic() + seconds, 0
    while time.monotonic() < ends_at:
        for target in names:
            case = f"{seed}-{number}-{target.__name__}"
            try:
                target(random.Random(case))
            except Exception as error:
                failed[target.__name__] += 1
                if failed[target.__name__] <= 3:
                    click.echo(f"failed: {case}: {type(error).__name__}: {str(error)[:300]}")
            tried[target.__name__] += 1
        number += 1
    for name, count in tried.items():
        click.echo(f"{name:12} {count:9,} tried  {failed[name]:5,} failed")
    return not failed


@click.command()
@click.option("--seconds", default=3600.0, help="How long.")
@click.option("--seed", type=int, help="For the same inputs again; random otherwise.")
def main(seconds: float, seed: int | None) -> None:
    seed = random.randrange(10**6) if seed is None else seed
    click.echo(f"seed {seed}")
    sys.exit(0 if run(seconds, seed) else 1)


if __name__ == "__main__":
    main()
