"""Publishes a job with kombu:  BROKER_URL=amqps://… python publish_kombu.py job.json

Ends with 0 once RabbitMQ has the job. After an error, publish the same job again: a repeat is harmless.
"""

import os
import sys
from pathlib import Path
from ssl import CERT_REQUIRED
from urllib.parse import urlsplit

from kombu import Connection

url = os.environ["BROKER_URL"]
job = Path(sys.argv[1]).read_bytes()

# kombu checks the host name in a certificate only if the name is passed.
tls = {"cert_reqs": CERT_REQUIRED, "server_hostname": urlsplit(url).hostname} if url.startswith("amqps:") else False
# Seconds. Without these limits, the program waits for ever while RabbitMQ is short of memory or disk.
limits = {"connect_timeout": 5, "read_timeout": 10, "write_timeout": 10}

with Connection(url, ssl=tls, transport_options={"confirm_publish": True, **limits}) as connection:
    connection.Producer().publish(  # raises if RabbitMQ refuses it, or no queue is bound
        job,
        exchange="confirm-offer",
        routing_key="confirm-offer.jobs",
        mandatory=True,
        delivery_mode=2,
        content_type="application/json",
        content_encoding="utf-8",
    )
print("RabbitMQ has it")
