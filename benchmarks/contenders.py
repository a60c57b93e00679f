"""The programs that are compared: confirm-offer, and its afternoon versions on Celery and on dramatiq."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from benchmarks.rig import Rig
from tests.support.system import PROJECT, WorkerProcess, job, until
from worker.messaging import topology
from worker.messaging.publisher import Message, Publisher

CHUNK = 1000  # messages published before waiting for the broker's confirms

# Environment of our image.
IMAGE_ENVIRONMENT = dict(re.findall(r"(GLIBC_TUNABLES)=(\S+)", (PROJECT / "Dockerfile").read_text()))


@dataclass(frozen=True)
class Contender:
    """A program: the exchange and queue of its jobs, and the command of its worker."""

    name: str
    exchange: str
    queue: str
    command: tuple[str, ...]  # arguments of Python; {in_flight} and {node}, a unique name, are filled in

    def message(self, offer: str) -> Message:
        """The message of a job in the form that this program expects."""
        content: Any = job(offer)
        headers: dict[str, Any] = {}
        if self is AFTERNOON:
            task_id = str(uuid4())
            content = [[content], {}, {}]
            headers = {"lang": "py", "task": "confirm_offer", "id": task_id, "root_id": task_id}
        elif self is DRAMATIQ:
            content = {
                "queue_name": self.queue,
                "actor_name": "confirm_offer",
                "args": [content],
                "kwargs": {},
                "options": {},
                "message_id": str(uuid4()),
                "message_timestamp": 0,
            }
        return Message(offer, json.dumps(content).encode(), self.exchange, self.queue, headers=headers)

    def start(self, rig: Rig, latency: float, in_flight: int) -> WorkerProcess:
        """Starts a worker process. latency: seconds until XONE answers; in_flight: concurrent calls."""
        command = [part.format(in_flight=in_flight, node=uuid4().hex) for part in self.command]
        settings = (
            {"DATABASE_URL": rig.database_url, **IMAGE_ENVIRONMENT}
            if self.exchange
            else {"DATABASE_URL": rig.afternoon_url}
        )
        return rig.start_worker(command, XONE_BASE_URL=rig.xone(latency), WORKER_CONCURRENCY=str(in_flight), **settings)


OURS = Contender("confirm-offer", topology.confirm_offer.name, topology.JOBS, ("-m", "worker", "worker"))
GEVENT = replace(OURS, name="confirm-offer, gevent", command=(*OURS.command, "--pool", "gevent"))
AFTERNOON = Contender(
    "afternoon, Celery", "", "afternoon-celery",
    (
        "-m", "celery", "-A", "benchmarks.afternoon.celery_app",
        "worker", "--pool", "threads", "-c", "{in_flight}", "-n", "{node}",
    ),
)  # fmt: skip
DRAMATIQ = Contender(
    "afternoon, dramatiq", "", "afternoon-dramatiq",
    ("-m", "dramatiq", "benchmarks.afternoon.dramatiq_app", "--processes", "1", "--threads", "{in_flight}"),
)  # fmt: skip
ALL = (AFTERNOON, DRAMATIQ, OURS, GEVENT)


def prepare(rig: Rig) -> None:
    """Creates the tables of the afternoon versions, and starts their workers once to declare their queues."""
    code = "from benchmarks.afternoon.confirm import Base, engine; Base.metadata.create_all(engine)"
    environment = {**os.environ, **rig.environment, "DATABASE_URL": rig.afternoon_url, "WORKER_CONCURRENCY": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=PROJECT, check=True)
    for contender in (AFTERNOON, DRAMATIQ):
        worker = contender.start(rig, rig.latency, 1)
        until(lambda name=contender.queue: rig.has_queue(name))
        worker.stop()


def publish(publisher: Publisher, contender: Contender, offers: Sequence[str]) -> None:
    """Publishes a job for each offer id."""
    for start in range(0, len(offers), CHUNK):
        publisher.publish(contender.message(offer) for offer in offers[start : start + CHUNK])
