"""What is measured side by side: confirm-offer, and its afternoon versions on Celery and on dramatiq."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from uuid import uuid4

import amqp

from benchmarks.rig import Rig
from tests.system import PROJECT, WorkerProcess, job, until
from worker import broker


@dataclass(frozen=True)
class Contender:
    """One program for the job: where its jobs go, in which form, and what runs it."""

    name: str
    exchange: str
    queue: str
    command: tuple[str, ...]  # arguments of Python; {in_flight} stands for the calls in flight

    def message(self, offer: str) -> amqp.Message:
        """The job as a checkout publishes it to this program."""
        content, headers = job(offer), {}
        if self.name == "afternoon, Celery":
            task_id = str(uuid4())
            content = [[content], {}, {}]
            headers = {"lang": "py", "task": "confirm_offer", "id": task_id, "root_id": task_id}
        elif self.name == "afternoon, dramatiq":
            content = {
                "queue_name": self.queue, "actor_name": "confirm_offer", "args": [content], "kwargs": {},
                "options": {}, "message_id": str(uuid4()), "message_timestamp": 0,
            }  # fmt: skip
        return amqp.Message(
            json.dumps(content), content_type="application/json", content_encoding="utf-8", delivery_mode=2,
            application_headers=headers,
        )  # fmt: skip

    def start(self, rig: Rig, latency: float, in_flight: int) -> WorkerProcess:
        """A worker process of it. latency: of XONE's answers, in seconds."""
        command = [part.format(in_flight=in_flight) for part in self.command]
        database = rig.database_url if self.exchange else rig.afternoon_url
        settings = {"XONE_BASE_URL": rig.xone(latency), "WORKER_CONCURRENCY": str(in_flight), "DATABASE_URL": database}
        return rig.start_worker(command, **settings)


OURS = Contender("confirm-offer", broker.confirm_offer.name, broker.JOBS, ("-m", "worker", "worker"))
CELERY = Contender(
    "afternoon, Celery", "", "afternoon-celery",
    ("-m", "celery", "-A", "benchmarks.afternoon.celery_app", "worker", "--pool", "threads", "-c", "{in_flight}"),
)  # fmt: skip
DRAMATIQ = Contender(
    "afternoon, dramatiq", "", "afternoon-dramatiq",
    ("-m", "dramatiq", "benchmarks.afternoon.dramatiq_app", "--processes", "1", "--threads", "{in_flight}"),
)  # fmt: skip
ALL = (CELERY, DRAMATIQ, OURS)


def prepare(rig: Rig) -> None:
    """Tables and queues of the afternoon versions: their workers declare the queues."""
    code = "from benchmarks.afternoon.confirm import Base, engine; Base.metadata.create_all(engine)"
    environment = {**os.environ, **rig.environment, "DATABASE_URL": rig.afternoon_url, "WORKER_CONCURRENCY": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=PROJECT, check=True)
    for contender in (CELERY, DRAMATIQ):
        worker = contender.start(rig, rig.latency, 1)
        until(lambda name=contender.queue: rig.has_queue(name))
        worker.stop()


def publish(channel: amqp.Channel, contender: Contender, offers: Iterable[str]) -> None:
    for offer in offers:
        channel.basic_publish(contender.message(offer), contender.exchange, contender.queue)
