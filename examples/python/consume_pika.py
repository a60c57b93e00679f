"""Consumes events with pika:  BROKER_URL=amqps://… python consume_pika.py

pika does not reconnect by itself: an error ends the program, and a supervisor has to start it again. It then receives
what it did not acknowledge.
"""

import json
import os
import sqlite3

import pika

QUEUE = os.environ.get("QUEUE", "orders.booking-events")

database = sqlite3.connect("orders.db")  # in place of yours
database.execute("create table if not exists latest (subject text primary key, id text, sequence integer)")
database.execute("create table if not exists mails (event_id text, type text, subject text)")
NEWS = """
    insert into latest values (:subject, :id, :sequence)
    on conflict do update set id = excluded.id, sequence = excluded.sequence
    where excluded.id <> id and excluded.sequence > sequence
"""


def on_message(channel, method, _properties, body):
    event = json.loads(body)
    known_by = {"subject": event["subject"], "id": event["id"], "sequence": event["data"]["sequence"]}
    with database:  # one transaction for the last event and your own work
        if database.execute(NEWS, known_by).rowcount:  # neither a repeat nor older than the last event
            mail = (event["id"], event["type"], event["subject"])
            database.execute("insert into mails values (?, ?, ?)", mail)  # your own work
    channel.basic_ack(method.delivery_tag)


with pika.BlockingConnection(pika.URLParameters(os.environ["BROKER_URL"])) as connection:
    channel = connection.channel()
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(QUEUE, "booking-events", routing_key="#")
    channel.basic_qos(prefetch_count=100)
    channel.basic_consume(QUEUE, on_message)
    channel.start_consuming()
