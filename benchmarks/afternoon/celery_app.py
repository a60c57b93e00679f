"""The afternoon version on Celery: ``celery -A benchmarks.afternoon.celery_app worker --pool threads``."""

import os
from typing import Any

import requests
from celery import Celery

from benchmarks.afternoon.confirm import confirm

app = Celery("afternoon", broker=os.environ["BROKER_URL"])
app.conf.update(
    task_default_queue="afternoon-celery", task_acks_late=True, task_ignore_result=True, worker_prefetch_multiplier=1
)


@app.task(name="confirm_offer", autoretry_for=(requests.RequestException,), retry_backoff=True)
def confirm_offer(job: dict[str, Any]) -> None:
    event = confirm(job)
    with app.producer_pool.acquire() as producer:
        producer.publish(event, exchange="booking-events", routing_key=event["type"], delivery_mode=2)
