"""The RabbitMQ user of KEDA, as docs/deployment.md creates it."""

import json
import shlex
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from kombu import Connection, Producer

from tests.support.servers import RabbitMQ, require
from tests.support.system import PROJECT, until
from worker.messaging import topology

pytestmark = pytest.mark.slow

DOCUMENT = (PROJECT / "docs" / "deployment.md").read_text("utf-8")
COMMANDS = [shlex.split(line)[1:] for line in DOCUMENT.splitlines() if line.startswith("rabbitmqctl ")]
VHOST, PASSWORD = "confirm-offer", "secret"


def test_keda_can_read_only_the_length_of_the_queue(tmp_path: Path) -> None:
    require(RabbitMQ)
    server = RabbitMQ(tmp_path / "rabbitmq", plugins=["rabbitmq_management"])
    server.start()
    server.ctl("add_vhost", VHOST)
    server.ctl("set_permissions", "-p", VHOST, "guest", ".*", ".*", ".*")
    for command in COMMANDS:
        server.ctl(*command, *([PASSWORD] if command[0] == "add_user" else []))
    address = f"http://127.0.0.1:{server.http_ports['rabbitmq_management']}/api/queues/{VHOST}/{topology.JOBS}"
    credentials = {"Authorization": f"Basic {b64encode(f'keda:{PASSWORD}'.encode()).decode()}"}

    def request(path: str = "", data: bytes | None = None) -> Any:
        with urlopen(Request(address + path, data, {**credentials, "Content-Type": "application/json"})) as answer:
            return json.load(answer)

    with Connection(f"{server.url.removesuffix('//')}/{VHOST}") as connection:
        topology.declare(connection)
        channel = connection.channel()
        for _ in range(3):
            Producer(channel).publish(b"{}", exchange="confirm-offer", routing_key=topology.JOBS)
        assert until(lambda: channel.basic_get(topology.JOBS))

        def queue_as_expected() -> Any:
            queue = request()
            return queue if queue.get("messages") == 3 and queue["messages_unacknowledged"] == 1 else None

        until(queue_as_expected, every=0.5)
        with pytest.raises(HTTPError) as refused:
            request("/get", json.dumps({"count": 1, "ackmode": "ack_requeue_true", "encoding": "auto"}).encode())
        reason = json.loads(refused.value.read())["reason"]
        refused.value.close()
    server.stop()
    assert "access to queue" in reason
    assert "refused" in reason
