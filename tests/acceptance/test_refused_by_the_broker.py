"""What a worker does while RabbitMQ refuses its user or virtual host, and what Celery's own tools may not do."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support.system import PROJECT, System, job, until
from worker.messaging import topology


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda url: url.replace("guest:guest", "guest:MARK"), "user or password is not accepted"),
        (lambda url: url + "-gone", "there is no such virtual host"),
    ],
    ids=["password", "vhost"],
)
def test_a_refusal_is_one_error_and_the_worker_waits(change: Callable[[str], str], reason: str, system: System) -> None:
    worker = system.start_worker(BROKER_URL=change(system.broker_url))

    until(lambda: "broker-refuses" in worker.log.read_text())
    until(lambda: '"duty": "scheduler"' in worker.log.read_text())
    assert worker.stop() == 0

    errors = [line for line in worker.logged() if line["level"] in ("error", "critical")]
    assert [line["error"] for line in errors] == [
        f"BrokerError: RabbitMQ refuses the worker: {reason}; check BROKER_URL"
    ]
    assert "MARK" not in worker.log.read_text()


@pytest.mark.parametrize(("tool", "instead"), [("purge", "confirm-offer pause"), ("inspect", "confirm-offer health")])
def test_tools_of_celery_that_lose_jobs_or_get_no_answer_are_refused(tool: str, instead: str, system: System) -> None:
    system.publish([job("offer-1")])
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "worker", tool, *(["-f"] if tool == "purge" else ["ping"])],
        env=system.environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"confirm-offer: celery {tool} is refused: ")
    assert instead in done.stderr
    until(lambda: system.queue_length(topology.JOBS) == 1)
