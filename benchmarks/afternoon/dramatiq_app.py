"""The afternoon version on dramatiq: ``dramatiq benchmarks.afternoon.dramatiq_app --processes 1 --threads 64``."""

import json
import os
from threading import local
from typing import Any

import dramatiq
import pika
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.afternoon.confirm import confirm

url = os.environ["BROKER_URL"].removesuffix("//") + "/%2F?heartbeat=0"
broker = RabbitmqBroker(url=url)
dramatiq.set_broker(broker)
_of_thread = local()


@dramatiq.actor(queue_name="afternoon-dramatiq")
def confirm_offer(job: dict[str, Any]) -> None:
    event = confirm(job)
    if not hasattr(_of_thread, "channel"):
        _of_thread.channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    persistent = pika.BasicProperties(delivery_mode=2, content_type="application/json")
    _of_thread.channel.basic_publish("booking-events", event["type"], json.dumps(event), persistent)
