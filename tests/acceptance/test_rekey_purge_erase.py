"""``rekey``, ``purge`` and ``erase`` as programs: beside a running worker, killed halfway, and their output."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import func, select, update

from models.states import State
from models.tables import AuditEntry, Confirmation, OutboxEvent
from tasks.privacy.sealed_columns import SEALED
from tests.support.commands import on_a_terminal, run
from tests.support.stored import fail
from tests.support.system import PROJECT, System, job, until
from worker.sandbox.server import Sandbox
from worker.storage.database import now_plus
from worker.storage.encryption import Encryption

pytestmark = pytest.mark.slow

MANY = 1500
DAY = 86400.0


@pytest.fixture
def system(
    broker_url: str, database_url: str, sandbox: Sandbox, environment: dict[str, str], tmp_path: Path
) -> Iterator[System]:
    """A system on each of both databases."""
    with System(broker_url, database_url, sandbox, environment, tmp_path) as running:
        yield running


def settings(system: System, keys: str | None = None) -> dict[str, str]:
    return {"DATABASE_URL": system.database_url, "DATA_KEYS": keys or system.environment["DATA_KEYS"]}


def encrypted_values(system: System) -> list[bytes]:
    with system.engine.connect() as connection:
        return [
            value
            for columns in SEALED.values()
            for column in columns
            for value in connection.execute(select(column).where(column.is_not(None))).scalars()
        ]


def run_json(*arguments: str, code: int = 0, **environment: str) -> Any:
    done = run(*arguments, "--json", **environment)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def audit_entries(system: System, command: str) -> list[Any]:
    with system.engine.connect() as connection:
        entries = select(AuditEntry.__table__).where(AuditEntry.command == command).order_by(AuditEntry.id)
        return list(connection.execute(entries))


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "worker", *arguments],
        cwd=PROJECT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_key_is_replaced_beside_a_running_worker_and_then_retired(system: System) -> None:
    old, new = system.environment["DATA_KEYS"], Fernet.generate_key().decode()
    system.start_worker(DATA_KEYS=f"{old},{new}")
    system.publish(job(f"offer-{number}") for number in range(100))
    system.until_events(100)
    system.publish(job(f"offer-{number}~other-offer~1") for number in range(100, 300))
    until(lambda: system.count(Confirmation) > 120)

    during_work = run_json("rekey", **settings(system, f"{new},{old}"))
    system.publish(job(f"offer-{number}") for number in range(300, 310))
    system.until_events(310)
    assert system.workers[0].stop() == 0

    assert during_work["resealed"] > 0
    assert during_work["unreadable"] == []
    afterwards = run_json("rekey", **settings(system, f"{new},{old}"))
    assert afterwards["confirmations"] == 310
    assert 0 < afterwards["resealed"] < afterwards["values"] == len(encrypted_values(system)), (
        "the worker encrypted with the old key"
    )
    encryption = Encryption([new])
    assert all(encryption.is_current(value) for value in encrypted_values(system))
    assert [entry.count for entry in audit_entries(system, "rekey")] == [
        during_work["resealed"],
        afterwards["resealed"],
    ]
    assert system.states() == {State.CONFIRMED: 310}

    system.start_worker(DATA_KEYS=new)
    system.publish([job("offer-0"), job("offer-0", quotes=[{"id": "other"}]), job("offer-new")])
    system.until_events(311)
    until(lambda: system.queue_length("confirm-offer.dead-letters") == 1)
    revealed = run_json("show", "offer-200~other-offer~1", "--reveal", **settings(system, new))["revealed"]
    assert revealed["policyholder"]["sent"]["last_name"] == "Lovelace"
    assert revealed["links"]["coi"]["url"]
    none = run("rekey", **settings(system, new))
    assert (none.returncode, none.stdout.splitlines()[0].startswith("0 of ")) == (0, True)


def test_a_wrong_key_changes_nothing_and_is_named(system: System) -> None:
    fail(system.database_url, system.environment["DATA_KEYS"], [f"offer-{number}" for number in range(25)])
    before = encrypted_values(system)

    wrong = run("rekey", **settings(system, Fernet.generate_key().decode()))

    assert wrong.returncode == 1
    lines = wrong.stderr.splitlines()
    assert len([line for line in lines if line.startswith("no key opens: body of confirmation ")]) == 20
    assert lines[-2:] == [
        "and 5 more; --json names all",
        "confirm-offer: 25 values opened with no key of DATA_KEYS, and stayed as they were; add the key that was in "
        "use, then run it again",
    ]
    assert "retired" not in wrong.stdout
    assert encrypted_values(system) == before


def test_a_rekey_that_was_killed_continues(system: System) -> None:
    old, new = system.environment["DATA_KEYS"], Fernet.generate_key().decode()
    fail(system.database_url, old, [f"offer-{number}" for number in range(MANY)])
    encryption = Encryption([new])

    def count_renewed() -> int:
        return sum(map(encryption.is_current, encrypted_values(system)))

    killed = start("rekey", **settings(system, f"{new},{old}"))
    until(count_renewed, every=0.0)
    killed.kill()
    killed.communicate()

    done = count_renewed()
    assert 0 < done < MANY
    assert all(
        Encryption([new, old]).is_current(value) or Encryption([old]).is_current(value)
        for value in encrypted_values(system)
    )
    again = run_json("rekey", **settings(system, f"{new},{old}"))
    assert (again["confirmations"], again["values"], again["resealed"]) == (MANY, MANY, MANY - done)
    assert count_renewed() == MANY
    assert len(audit_entries(system, "rekey")) == 2


def test_a_purge_that_was_killed_continues(system: System) -> None:
    offers = [f"offer-{number}" for number in range(MANY)]
    fail(system.database_url, system.environment["DATA_KEYS"], offers, age=100 * DAY)
    purge = ("purge", "--older-than", "90d", "--yes")

    def count_purged() -> int:
        with system.engine.connect() as connection:
            query = select(func.count()).where(Confirmation.purged_at.is_not(None))
            return int(connection.execute(query).scalar_one())

    killed = start(*purge, **settings(system))
    until(count_purged, every=0.0)
    killed.kill()
    killed.communicate()

    done = count_purged()
    assert 0 < done < MANY
    assert len(encrypted_values(system)) == MANY - done, "each confirmation is blanked wholly or not at all"
    assert run_json(*purge, **settings(system)) == {"purged": MANY - done, "left": 0}
    assert encrypted_values(system) == []
    assert len(audit_entries(system, "purge")) == 2


def test_an_operator_purges_old_confirmations(system: System) -> None:
    url, keys = system.database_url, system.environment["DATA_KEYS"]
    fail(url, keys, ["old", "older"], age=100 * DAY)
    fail(url, keys, ["new"])
    fail(url, keys, ["review"], age=100 * DAY, state=State.NEEDS_REVIEW)

    dry = run("purge", "--older-than", "12w", "--dry-run", **settings(system))
    unconfirmed = run("purge", "--older-than", "12w", **settings(system))
    assert dry.stdout.startswith("2 confirmations that ended before ")
    assert dry.stdout.endswith("; nothing was changed\n")
    assert (unconfirmed.returncode, "add --yes" in unconfirmed.stderr) == (2, True)
    code, shown = on_a_terminal(url, "purge", "--older-than", "2000h", "--reason", "policy 7", answer="y\n")

    assert code == 0
    assert "Blank the personal data of 2 confirmations that ended before" in shown
    assert "2 confirmations purged" in shown
    (entry,) = audit_entries(system, "purge")
    assert (entry.count, entry.reason, list(entry.details)) == (2, "policy 7", ["before"])
    assert run("purge", "--older-than", "12w", **settings(system)).stdout.startswith("no confirmation with personal")
    assert run("purge", "--older-than", "soon", **settings(system)).returncode == 2

    screen = run("show", "old", **settings(system)).stdout
    revealed = run("show", "old", "--reveal", **settings(system)).stdout
    assert "personal data  purged on 20" in screen
    assert "personal data  purged on 20" in revealed
    assert run_json("show", "old", **settings(system))["purged_at"].endswith("Z")
    assert "purged_at" not in run_json("show", "new", **settings(system))

    plan = run("reprocess", "--dry-run", **settings(system))
    assert "1 confirmation, 1 cause" in plan.stdout
    assert plan.stderr == ("left out: 2 confirmations: their personal data was purged, so there is nothing to send\n")
    assert run_json("reprocess", "--dry-run", **settings(system))["purged"] == 2
    by_name = run("reprocess", "--offers", "-", "--yes", stdin="old\nnew\n", **settings(system))
    assert by_name.stderr.startswith("left out: old: failed, and its personal data was purged on 20")
    assert "Batch 1 runs: 1 confirmation." in by_name.stdout


def test_a_person_is_erased(system: System) -> None:
    ada, grace = "ada@example.com", "grace@example.com"
    system.start_worker()
    system.publish(job(f"offer-{number}") for number in range(3))
    other = {"first_name": "Grace", "last_name": "Hopper", "country": "US", "email": grace}
    system.publish([job("of-grace", policyholder=other)])
    system.publish([job("both", policyholder=other, quotes=[{"id": "q", "insured": [{"email": ada.upper()}]}])])
    system.until_events(5)
    until(lambda: all_published(system))
    system.workers[0].stop()
    fail(system.database_url, system.environment["DATA_KEYS"], ["review"], state=State.NEEDS_REVIEW)

    unconfirmed = run("erase", "--email", ada, **settings(system))
    assert (unconfirmed.returncode, "add --yes" in unconfirmed.stderr) == (2, True)
    unsearched = run("erase", "--email", "nobody@example.com", "--yes", **settings(system))
    assert unsearched.returncode == 1
    assert "1 confirmation of an earlier version could not be searched; run 'confirm-offer rekey'" in unsearched.stderr
    assert run("rekey", **settings(system)).returncode == 0

    nobody = run("erase", "--email", "nobody@example.com", "--yes", **settings(system))
    assert (nobody.returncode, nobody.stdout, nobody.stderr) == (0, "nobody was found by this e-mail\n", "")
    done = run("erase", "--email", "-", "--yes", "--reason", "they asked", stdin=f" {ada}\n", **settings(system))
    assert (done.returncode, done.stdout) == (1, "4 confirmations erased\n")
    assert done.stderr == (
        "left: offer review of P-100 (needs_review: resolve it first)\n"
        "confirm-offer: not all were erased; run it again when those that are left have ended\n"
    )
    resolved = run("resolve", "review", "--partner", "P-100", "--failed", "not booked", **settings(system))
    assert resolved.returncode == 0
    unpublished = run_json("erase", "--email", ada, "--yes", code=1, **settings(system))
    errors = run("erase", "--email", ada, "--yes", **settings(system)).stderr
    assert errors.startswith("left: offer review of P-100 (failed: its event is not yet published)\n")
    assert unpublished["left"] == [{"partner_id": "P-100", "offer_id": "review", "state": "failed"}]
    system.start_worker()
    until(lambda: all_published(system))
    assert run_json("erase", "--email", ada, "--yes", **settings(system)) == {"erased": 1, "left": [], "unsearched": 0}

    with system.engine.connect() as connection:
        not_erased = select(Confirmation.offer_id).where(Confirmation.sealed_body.is_not(None))
        assert connection.execute(not_erased).scalars().all() == ["of-grace"]
    entries = audit_entries(system, "erase")
    assert [entry.count for entry in entries] == [0, 0, 4, 0, 0, 1]
    assert "example.com" not in str(entries)
    encryption = Encryption([system.environment["DATA_KEYS"]])
    assert entries[2].details == {"left": 1, "email_hash": encryption.email_hash(ada).hex()}


def test_one_that_can_not_be_erased_is_named_and_stops_no_other(system: System) -> None:
    system.start_worker()
    system.publish(job(f"offer-{number}") for number in range(3))
    system.until_events(3)
    until(lambda: all_published(system))
    with system.engine.begin() as connection:
        broken = select(Confirmation.id).where(Confirmation.offer_id == "offer-0").scalar_subquery()
        connection.execute(update(OutboxEvent).where(OutboxEvent.confirmation_id == broken).values(payload="broken"))

    done = run("erase", "--email", "ada@example.com", "--yes", **settings(system))

    assert (done.returncode, done.stdout) == (1, "2 confirmations erased\n")
    assert done.stderr == (
        "left: offer offer-0 of P-100 (confirmed: a defect: JSONDecodeError)\n"
        "confirm-offer: 1 confirmation can't be erased because of a defect\n"
    )
    assert audit_entries(system, "erase")[0].count == 2


def all_published(system: System) -> bool:
    with system.engine.connect() as connection:
        query = select(func.count()).where(OutboxEvent.published_at.is_(None))
        return connection.execute(query).scalar_one() == 0


def test_workers_purge_after_the_retention_period(system: System) -> None:
    for _ in range(2):
        system.start_worker(RETENTION_DAYS="30")
    system.publish(job(f"offer-{number}") for number in range(3))
    system.until_events(3)
    until(lambda: all_published(system))
    with system.engine.begin() as connection:
        old = Confirmation.offer_id != "offer-0"
        connection.execute(update(Confirmation).where(old).values(updated_at=now_plus(-31 * DAY)))

    def purged_offers() -> list[str]:
        with system.engine.connect() as connection:
            query = select(Confirmation.offer_id).where(Confirmation.purged_at.is_not(None))
            return list(connection.execute(query.order_by(Confirmation.offer_id)).scalars())

    until(lambda: purged_offers() == ["offer-1", "offer-2"])
    counts = [line["count"] for worker in system.workers for line in worker.logged() if line["event"] == "purged"]
    assert sum(counts) == 2
