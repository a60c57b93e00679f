"""The recipes of docs/runbook.md, run line by line on a terminal, and their results.

A test is named after its recipe and gets the lines of its blocks, so that neither can change without the other.
"""

import itertools
import json
import os
import re
import sys
from pathlib import Path

import pytest
from dotenv import dotenv_values
from sqlalchemy import update

from models.states import State
from models.tables import Booking, Confirmation
from tests.support.servers import PostgreSQL, RabbitMQ
from tests.support.system import PROJECT, System, job, terminal, until
from worker.messaging.topology import DEAD_LETTERS, unrouted_queue
from worker.sandbox.answers import to_json
from worker.storage.database import now_plus

pytestmark = pytest.mark.slow

Block = list[str]  # the lines of one block of the document

CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
UNBROKEN = ("  confirm-offer ", "confirm-offer: ")  # a command to copy, and an error message


def recipes() -> dict[str, list[Block]]:
    """The blocks of each recipe. The key is the title in the form of a test name."""
    _, *sections = re.split(r"^## ", (PROJECT / "docs/runbook.md").read_text(), flags=re.MULTILINE)
    return {
        re.sub(r"\W+", "_", section.splitlines()[0].lower()): [
            block.splitlines() for block in re.findall(r"^```sh\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        ]
        for section in sections
    }


@pytest.fixture
def recipe(request: pytest.FixtureRequest) -> list[Block]:
    return recipes()[request.node.name.removeprefix("test_")]


class Operator:
    """A person at a terminal of 80 columns, in a folder with the workers' ``.env``, who answers yes."""

    def __init__(self, folder: Path, settings: dict[str, str], environment: dict[str, str]) -> None:
        self.folder = folder
        (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        programs = Path(sys.executable).parent
        self.environment = environment | {"PATH": f"{programs}{os.pathsep}{environment['PATH']}"}

    def run(self, line: str, exit_code: int = 0) -> str:
        """Runs a line. Returns its output without colours."""
        code, output = terminal(["sh", "-c", line], self.environment, self.folder, "y\n")
        output = CONTROLS.sub("", output)
        assert code == exit_code, f"{line}\n{output}"
        wide = [part for part in re.split(r"[\r\n]+", output) if len(part) > 80 and not part.startswith(UNBROKEN)]
        assert not wide, line
        return output

    def exit_code(self, line: str) -> int:
        return terminal(["sh", "-c", line], self.environment, self.folder, "")[0]

    def run_in_background(self, line: str, system: System) -> None:
        """Runs a line that starts a worker, until the test ends."""
        settings = dict(part.split("=", 1) for part in line.split() if "=" in part)
        program, *arguments = [part for part in line.split() if "=" not in part]
        assert program == "confirm-offer"
        system.start_worker(("-m", "worker", *arguments), **settings)


@pytest.fixture
def operator(system: System, rabbitmq: RabbitMQ, tmp_path: Path) -> Operator:
    folder = tmp_path / "operator"
    folder.mkdir()
    return Operator(folder, system.environment, rabbitmq.shell | {"VHOST": system.broker_url.rsplit("/", 1)[1]})


def until_states(system: System, **states: int) -> None:
    def are_expected() -> bool:
        return system.states() == states

    until(are_expected)


def test_each_recipe_is_run() -> None:
    assert {f"test_{name}" for name in recipes()} <= set(globals())


def test_first_look(recipe: list[Block], operator: Operator) -> None:
    (failed, dead_letters, batches), (doctor,) = recipe

    assert "Nothing has failed that these filters match." in operator.run(failed)
    assert "no dead letters" in operator.run(dead_letters)
    assert "There are no batches" in operator.run(batches)
    assert "Nothing is wrong" in operator.run(doctor)


def test_xone_was_down(recipe: list[Block], operator: Operator, system: System) -> None:
    (look,), (reprocess, reprocess_unknown), (failed, batches, batch) = recipe
    worker = system.start_worker(RETRY_MAX_ATTEMPTS="1")
    system.publish(job(f"lost-{number}~drop-before~1") for number in range(2))
    until_states(system, needs_review=2)
    system.sandbox.status_for_all = 503
    system.publish(job(f"offer-{number}") for number in range(20))
    until(lambda: '"calls_pause"' in worker.log.read_text())
    until(lambda: system.states()[State.QUEUED] + system.states()[State.FAILED] == 20)

    output = operator.run(look)
    assert re.search(r"\d+ +http-503 +XONE answered 503 Service Unavailable", output)
    assert re.search(r"\d+ waits? to be tried, the oldest since ", output)
    assert "2 more wait for a review" in output
    system.sandbox.status_for_all = None
    until(lambda: '"calls_go_on"' in worker.log.read_text() and not system.states()[State.QUEUED])
    assert "Batch 1 is done: " in operator.run(reprocess)
    assert "Batch 2 is done: 2 confirmed." in operator.run(reprocess_unknown)

    until_states(system, confirmed=22)
    assert len(system.sandbox.bookings) == 22
    assert "Nothing has failed" in operator.run(failed)
    assert "wait" not in operator.run(failed)
    assert operator.run(batches).count(" done ") == 2
    assert re.search(r"items +\d+: \d+ confirmed", operator.run(batch))


def test_the_path_of_confirm_calls_is_wrong(recipe: list[Block], operator: Operator, system: System) -> None:
    ((reprocess,),) = recipe
    paths = "/api/partners/{partner_id}/offers/{offer_id}", "/api/partners/{partner_id}/offers/{offer_id}/confirm"
    worker = system.start_worker(XONE_CONFIRM_PATH=paths[1])
    system.publish(job(f"offer-{number}") for number in range(10))
    until(lambda: '"path"' in worker.log.read_text())
    until(lambda: sum(system.states().values()) == 10)
    assert "after path" in operator.run("confirm-offer failed")
    assert worker.stop() == 0

    failed = system.states()[State.FAILED]
    assert 0 < failed < 10
    system.start_worker(XONE_CONFIRM_PATH=paths[0])
    assert f"{failed} " in operator.run(reprocess)
    until_states(system, confirmed=10)


def test_credentials_were_rotated(recipe: list[Block], operator: Operator, system: System) -> None:
    (look,), (edit, stop, start), (check,) = recipe
    worker = system.start_worker()
    system.publish([job("offer-before")])
    until_states(system, confirmed=1)
    system.sandbox.rotate_secret("a-new-secret")
    system.sandbox.revoke_tokens()
    system.publish(job(f"offer-{number}") for number in range(10))
    until(lambda: '"calls_pause"' in worker.log.read_text())
    until(lambda: sum(system.states().values()) == 11)

    output = operator.run(look)
    assert "Nothing has failed." in output
    assert "10 wait to be tried" in output
    assert "after credentials" in output
    editor = "sed -i s/^XONE_CLIENT_SECRET=.*/XONE_CLIENT_SECRET=a-new-secret/"
    operator.environment |= {"EDITOR": editor, "WORKER_PID": str(worker.process.pid)}
    operator.run(edit)
    operator.run(stop)
    assert worker.process.wait(30) == 0
    assert start == "confirm-offer worker"
    system.start_worker(**{name: value or "" for name, value in dotenv_values(operator.folder / ".env").items()})

    until_states(system, confirmed=11)
    assert len(system.until_events(11)) == 11
    assert "wait" not in operator.run(check)


def test_a_release_broke_the_job_format(recipe: list[Block], operator: Operator, system: System) -> None:
    (look, reveal), (fix, drop), (dead_letters, show) = recipe
    system.start_worker()
    jobs = [job(f"offer-{number}", order_reference=f"SO-{1000 + number}") for number in range(1, 6)]
    system.publish(json.dumps(content).replace("order_reference", "orderReference").encode() for content in jobs)
    system.publish([b'{"partner_id": "P-100", "offer_'])
    until(lambda: system.queue_length(DEAD_LETTERS) == 6)

    output = operator.run(look)
    assert "invalid-job: 5 letters" in output
    assert "unknown key; did you mean order_reference?" in output
    assert "orderReference" in operator.run(reveal)
    assert "5 dead letters replayed" in operator.run(fix)
    assert "1 dead letter dropped" in operator.run(drop)

    until_states(system, confirmed=5)
    assert "no dead letters" in operator.run(dead_letters)
    assert re.search(r"state +confirmed", operator.run(show))
    assert {event["data"]["order_reference"] for event in system.until_events(5)} == {
        f"SO-{1000 + number}" for number in range(1, 6)
    }


def test_dead_letters_are_refused(recipe: list[Block], operator: Operator, system: System, rabbitmq: RabbitMQ) -> None:
    (look,), (check,) = recipe
    virtual_host = system.broker_url.rpartition("/")[2]
    limit = '{"max-length": 1, "overflow": "reject-publish"}'
    rabbitmq.ctl("set_policy", "-p", virtual_host, "full", DEAD_LETTERS, limit, "--apply-to", "queues")
    worker = system.start_worker()
    system.publish([b"{"] * 5)
    until(lambda: "dead_letters_refused" in worker.log.read_text())

    assert re.search(r"\d letters?", operator.run(look))
    rabbitmq.ctl("clear_policy", "-p", virtual_host, "full")

    until(lambda: system.queue_length(DEAD_LETTERS) == 5, 60)
    assert "5 letters" in operator.run(check)
    until(lambda: "dead_letters_taken" in worker.log.read_text())


def test_nobody_got_the_events(recipe: list[Block], operator: Operator, system: System) -> None:
    (look,), (replay, purge), (check,) = recipe

    def shows(number: int, line: str) -> bool:  # RabbitMQ counts a quorum queue every 5 s
        return re.search(rf"{unrouted_queue.name}\s+{number}\b", operator.run(line)) is not None

    channel = system.connection.channel()
    channel.queue_delete(system.events_queue.name)
    system.start_worker()
    system.publish(job(f"offer-{number}") for number in range(10))
    until(lambda: system.queue_length(unrouted_queue.name) == 10)

    until(lambda: shows(10, look))
    system.events_queue(channel).declare()
    assert "10 events replayed" in operator.run(replay)
    operator.run(purge)

    assert len({event["id"] for event in system.until_events(10)}) == 10
    until(lambda: shows(0, check))


def test_a_partner_asks_what_became_of_an_order(recipe: list[Block], operator: Operator, system: System) -> None:
    (show, reveal), (replay,) = recipe
    system.start_worker()
    system.publish([job("offer-1", order_reference="SO-1001")])
    (event,) = system.until_events(1)

    output = operator.run(show)
    assert event["data"]["booking"]["id"] in output
    assert "ada@example.com" not in output
    assert "ada@example.com" in operator.run(reveal)
    assert "1 event replayed" in operator.run(replay)
    assert [event["id"] for event in system.until_events(2)] == [event["id"]] * 2


def test_a_confirmation_needs_review(recipe: list[Block], operator: Operator, system: System) -> None:
    (listed, show), (resolve_booked, remove, resolve_failed), (*checks,) = recipe
    xone = system.sandbox
    system.start_worker(RETRY_MAX_ATTEMPTS="1", XONE_TIMEOUT="1")
    xone.bookings_mode, xone.latency = "forbidden", 3.0  # XONE books, and the answer comes too late
    system.publish([job("offer-1")])
    until_states(system, needs_review=1)
    xone.latency, xone.status_for_all = 0.0, 500
    system.publish([job("offer-2")])
    until_states(system, needs_review=2)

    assert operator.run(listed).count(", review") == 2
    assert "Look in XONE whether a booking exists" in operator.run(show)
    (operator.folder / "booking.json").write_bytes(to_json({"data": xone.bookings["P-100", "offer-1"]}))
    operator.run(resolve_booked)
    operator.run(remove)
    operator.run(resolve_failed)

    assert list(operator.folder.glob("booking*")) == []
    until(lambda: all("not yet" not in operator.run(check) for check in checks))
    of_offer_1, of_offer_2 = map(operator.run, checks)
    assert re.search(r"state +confirmed", of_offer_1)
    assert re.search(r"state +failed", of_offer_2)
    assert "resolved: not booked" in of_offer_2
    assert sorted(event["type"] for event in system.until_events(4))[:2] == ["booking.confirmed", "confirmation.failed"]


def test_an_order_was_cancelled(recipe: list[Block], operator: Operator, system: System) -> None:
    (withdraw, withdraw_many), (check,) = recipe
    system.sandbox.status_for_all = 503
    system.start_worker()
    system.publish([job(f"offer-{number}") for number in range(1, 4)])
    until_states(system, retrying=3)
    (operator.folder / "cancelled.txt").write_text("P-100 offer-2\nP-100 offer-3\nP-100 offer-4\n")

    assert "1 offer: withdrawn" in operator.run(withdraw)
    assert "3 offers: withdrawn" in operator.run(withdraw_many)
    calls = len(system.sandbox.calls)
    system.sandbox.status_for_all = None
    system.publish([job("offer-4"), job("offer-5")])

    until_states(system, failed=4, confirmed=1)
    assert operator.run(check).count("withdrawn") == 4
    assert len(system.sandbox.calls) == calls + 1
    codes = [event["data"]["error"]["code"] for event in system.until_events(5) if "error" in event["data"]]
    assert codes == ["withdrawn"] * 4


def test_bookings_stay_pending(recipe: list[Block], operator: Operator, system: System) -> None:
    (failed, doctor), (refresh,) = recipe
    system.start_worker()
    system.publish([job("offer-1")])
    until_states(system, confirmed=1)
    (key,) = system.sandbox.bookings
    with system.sandbox.lock, system.engine.begin() as connection:
        system.sandbox.bookings[key] |= {"status": "CONFIRMED"}
        connection.execute(update(Confirmation).values(state="pending", updated_at=now_plus(-100_000.0)))
        connection.execute(update(Booking).values(status="PENDING"))
        system.sandbox.bookings_mode = "forbidden"  # for the worker

    assert "1 booking is pending at XONE, the oldest since" in operator.run(failed)
    assert "1 booking is pending at XONE, the oldest for 27:4" in " ".join(operator.run(doctor).split())
    until(lambda: "follow_up_failed" in [line["event"] for worker in system.workers for line in worker.logged()])
    system.sandbox.bookings_mode = "on"
    assert "was PENDING and is CONFIRMED now" in " ".join(operator.run(refresh).split())
    until_states(system, confirmed=1)
    until(lambda: [event["type"] for event in system.until_events(2)] == ["booking.confirmed"] * 2)


def test_xone_announces_maintenance(recipe: list[Block], operator: Operator, system: System) -> None:
    (pause,), (look,), (resume,), (check,) = recipe
    system.start_worker()

    system.publish([job("offer-before")])
    until_states(system, confirmed=1)
    assert "Calls to XONE are paused for all partners." in operator.run(pause)
    numbers = itertools.count()

    def is_effective() -> bool:  # takes a second or two
        system.publish([job(f"offer-{next(numbers)}")])
        return State.QUEUED in system.states()

    until(is_effective, every=0.2)
    until(lambda: set(system.states()) <= {State.CONFIRMED, State.QUEUED})
    confirmed = system.states()[State.CONFIRMED]
    system.publish(job(f"offer-{next(numbers)}") for _ in range(10))
    total = next(numbers) + 1
    until_states(system, confirmed=confirmed, queued=total - confirmed)
    output = operator.run(look)
    assert f"{total - confirmed} wait to be tried" in output
    assert "XONE's maintenance until 04:00" in " ".join(output.split())
    assert len(system.sandbox.calls) == confirmed
    assert "The pause for all partners has ended." in operator.run(resume)

    until_states(system, confirmed=total)
    output = operator.run(check)
    assert "Paused" not in output
    assert "wait" not in output


def test_a_batch_does_harm(recipe: list[Block], operator: Operator, system: System) -> None:
    (listed, pause, show), (resume, cancel), (check,) = recipe
    system.start_worker()
    system.publish(job(f"offer-{number}~http-422") for number in range(10))
    until_states(system, failed=10)
    operator.run("confirm-offer reprocess --rate 0.1")

    assert " running " in operator.run(listed)
    assert "Batch 1 is paused: " in operator.run(pause)
    assert re.search(r"state +paused", operator.run(show))
    assert "Batch 1 is running: " in operator.run(resume)
    assert "Batch 1 is cancelled: " in operator.run(cancel)
    assert re.search(r"1 +cancelled .* 10 +0 +0 +0 +-", operator.run(check))

    until_states(system, failed=10)
    assert len(system.sandbox.calls) < 20, "not all were tried"


def test_no_worker_answers(recipe: list[Block], operator: Operator, system: System) -> None:
    (look,), (start,), (check,) = recipe
    operator.environment["TMPDIR"] = system.environment["TMPDIR"]  # as on the machine of the worker

    assert "no worker of this user runs on this machine" in operator.run(look, exit_code=1)
    operator.run_in_background(start, system)

    until(lambda: operator.exit_code(check) == 0, every=0.5)
    assert " is well: consumer, tasks, scheduler, follow-ups, relay, database" in operator.run(check)


def test_the_database_is_away(recipe: list[Block], operator: Operator, system: System, postgresql: PostgreSQL) -> None:
    (look,), (upgrade,), (check,) = recipe
    name = system.database_url.rsplit("/", 1)[1]
    postgresql.drop_database(name)
    assert "database" in operator.run(look, exit_code=1)
    postgresql.create_database(name)

    assert "database is at revision none" in operator.run(look, exit_code=1)
    operator.run(upgrade)

    assert "as it should be" in operator.run(check)


def test_jobs_wait_too_long(recipe: list[Block], operator: Operator, system: System) -> None:
    (queues, failed, batches), (start,), (check_queues, check_failed) = recipe
    system.publish(job(f"offer-{number}") for number in range(10))

    def waits(number: int, consumers: int, line: str) -> bool:  # RabbitMQ counts a quorum queue every 5 s
        return re.search(rf"confirm-offer.jobs\s+{number}\s+{consumers}\b", operator.run(line)) is not None

    until(lambda: waits(10, 0, queues))
    assert "Nothing has failed." in operator.run(failed)
    assert "There are no batches" in operator.run(batches)
    operator.run_in_background(start, system)

    until_states(system, confirmed=10)
    until(lambda: waits(0, 1, check_queues))
    assert "wait" not in operator.run(check_failed)


def test_events_are_not_published(recipe: list[Block], operator: Operator, system: System) -> None:
    (look,), (start,), (check,) = recipe
    system.start_worker(WORKER_PARTS="tasks,scheduler")
    system.publish([job("offer-1", order_reference="SO-1001")])
    until_states(system, confirmed=1)

    assert "not yet" in operator.run(look)
    operator.run_in_background(start, system)

    assert len(system.until_events(1)) == 1
    until(lambda: "not yet" not in operator.run(check))


def test_a_transaction_stays_open(recipe: list[Block], operator: Operator) -> None:
    ((doctor,),) = recipe

    assert "transactions" not in operator.run(doctor)
