"""Publishes a job with pika:  BROKER_URL=amqps://… python publish_pika.py job.json

Ends with 0 once RabbitMQ has the job. After an error, publish the same job again: a repeat is harmless.
"""

import os
import sys
from pathlib import Path

import pika

job = Path(sys.argv[1]).read_bytes()
parameters = pika.URLParameters(os.environ["BROKER_URL"])
parameters.blocked_connection_timeout = 10  # seconds, if RabbitMQ is short of memory or disk

with pika.BlockingConnection(parameters) as connection:
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_publish(  # raises NackError if RabbitMQ refuses it, UnroutableError if no queue is bound
        exchange="confirm-offer",
        routing_key="confirm-offer.jobs",
        body=job,
        properties=pika.BasicProperties(
            content_type="application/json",
            content_encoding="utf-8",
            delivery_mode=pika.DeliveryMode.Persistent,
        ),
        mandatory=True,
    )
print("RabbitMQ has it")
