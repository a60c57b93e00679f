"""XONE is down, slow or refuses calls: jobs wait, use up no attempt, and continue by themselves."""

import time

import pytest
from sqlalchemy import func, select

from models.states import State
from models.tables import Attempt, Confirmation
from tests.support.system import System, job, until


def attempts_used(system: System) -> int:
    with system.engine.connect() as connection:
        return int(connection.execute(select(func.max(Confirmation.attempts_used))).scalar_one())


@pytest.mark.slow
def test_an_xone_that_is_down_gets_few_calls_and_uses_up_no_attempts(system: System) -> None:
    system.sandbox.status_for_all = 500
    worker = system.start_worker(RETRY_MAX_ATTEMPTS="4", RETRY_BASE_DELAY="0.1", RETRY_MAX_DELAY="0.2")
    system.publish(job(f"offer-{number}") for number in range(100))
    until(lambda: "calls_pause" in worker.log.read_text())
    until(lambda: sum(system.states().values()) == 100)
    calls_before, started = len(system.sandbox.calls), time.monotonic()
    until(lambda: len(system.sandbox.calls) >= calls_before + 3, seconds=30)
    duration = time.monotonic() - started

    system.sandbox.status_for_all = None
    recovered_at = time.monotonic()
    system.until_events(100)

    assert duration > 3, "three probes, 1, 2 and 4 seconds apart or more"
    assert time.monotonic() - recovered_at < 25
    assert system.states() == {State.CONFIRMED: 100}
    assert system.sandbox.overlapping == set()
    assert system.count(Attempt) == len(system.sandbox.calls) + len(
        [line for line in worker.logged() if line.get("event") == "attempt_ended" and line["code"] == "connect"]
    )


def test_wrong_credentials_suspend_all_calls_until_they_are_corrected(system: System) -> None:
    secret = system.sandbox.client_secret
    system.sandbox.rotate_secret("another")
    worker = system.start_worker()
    system.publish(job(f"offer-{number}") for number in range(20))
    until(lambda: "calls_pause" in worker.log.read_text())
    requests_before = system.sandbox.token_requests
    until(lambda: system.sandbox.token_requests >= requests_before + 2)
    states, used = system.states(), attempts_used(system)

    system.sandbox.rotate_secret(secret)
    system.until_events(20)

    assert used == 0
    assert set(states) <= {State.QUEUED, State.RETRYING, State.CONFIRMING}
    assert system.states() == {State.CONFIRMED: 20}
    defects = [line for line in worker.logged() if line["event"] == "defect"]
    assert [line["code"] for line in defects] == ["credentials"]
    assert secret not in worker.log.read_text()


def test_revoked_tokens_are_replaced_without_suspending_calls(system: System) -> None:
    worker = system.start_worker()
    system.publish([job("offer-1")])
    system.until_events(1)
    system.sandbox.revoke_tokens()
    system.publish(job(f"offer-{number}") for number in range(2, 12))

    system.until_events(11)

    assert "calls_pause" not in worker.log.read_text()
    assert system.sandbox.token_requests <= 3


@pytest.mark.slow
def test_a_429_throttles_the_process_and_uses_up_no_attempt(system: System) -> None:
    system.sandbox.rate = 10
    system.start_worker()
    system.publish(job(f"offer-{number}") for number in range(40))

    system.until_events(40)

    assert attempts_used(system) == 1, "only the attempt that booked"
    refused = [call for call in system.sandbox.calls if call.status == 429]
    assert len(refused) < 40 * 4


def test_the_rate_limit_is_shared_by_two_workers(system: System) -> None:
    workers = [system.start_worker(XONE_RATE_LIMIT="10") for _ in range(2)]
    system.publish(job(f"offer-{number}") for number in range(40))

    system.until_events(40)

    started = sorted(call.started for call in system.sandbox.calls)
    assert len(started) == 40
    assert started[-1] - started[0] > 3.5, "40 calls at 10 a second"
    assert all(later - earlier > 0.4 for earlier, later in zip(started, started[8:], strict=False))
    assert all(worker.process.poll() is None for worker in workers)


def test_a_retry_is_called_within_a_second_of_its_time(system: System) -> None:
    system.start_worker(RETRY_BASE_DELAY="1", RETRY_MAX_DELAY="1")
    system.publish(job(f"offer-{number}~http-500~1") for number in range(4))

    system.until_events(4)

    calls: dict[str, list[float]] = {}
    for call in system.sandbox.calls:
        calls.setdefault(call.offer_id, []).append(call.started)
    assert all(1.0 <= second - first < 3.0 for first, second in calls.values())
