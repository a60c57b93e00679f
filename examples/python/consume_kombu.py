"""Consumes events with kombu:  BROKER_URL=amqps://… python consume_kombu.py

kombu reconnects by itself. Any other error ends the program. Started again, it receives what it did not acknowledge.
"""

import json
import os
import sqlite3
from ssl import CERT_REQUIRED
from urllib.parse import urlsplit

from kombu import Connection, Exchange, Queue
from kombu.mixins import ConsumerMixin

events = Exchange("booking-events", type="topic", no_declare=True)
name = os.environ.get("QUEUE", "orders.booking-events")
queue = Queue(name, events, routing_key="#", queue_arguments={"x-queue-type": "quorum"})

database = sqlite3.connect("orders.db")  # in place of yours
database.execute("create table if not exists latest (subject text primary key, id text, sequence integer)")
database.execute("create table if not exists mails (event_id text, type text, subject text)")
NEWS = """
    insert into latest values (:subject, :id, :sequence)
    on conflict do update set id = excluded.id, sequence = excluded.sequence
    where excluded.id <> id and excluded.sequence > sequence
"""


def on_message(message):
    event = json.loads(message.body)
    known_by = {"subject": event["subject"], "id": event["id"], "sequence": event["data"]["sequence"]}
    with database:  # one transaction for the last event and your own work
        if database.execute(NEWS, known_by).rowcount:  # neither a repeat nor older than the last event
            mail = (event["id"], event["type"], event["subject"])
            database.execute("insert into mails values (?, ?, ?)", mail)  # your own work
    message.ack()


class Consumer(ConsumerMixin):
    def __init__(self, connection):
        self.connection = connection

    def get_consumers(self, consumer, channel):
        return [consumer([queue], on_message=on_message, prefetch_count=100)]


url = os.environ["BROKER_URL"]
# kombu checks the host name in a certificate only if the name is passed.
tls = {"cert_reqs": CERT_REQUIRED, "server_hostname": urlsplit(url).hostname} if url.startswith("amqps:") else False
with Connection(url, ssl=tls, heartbeat=60) as connection:
    Consumer(connection).run()
