"""The afternoon versions: the happy path of the same job, as written in an afternoon, on Celery and on dramatiq.

A job is a task message. The task calls XONE, stores booking and policies with the ORM, and publishes an event. There is
no idempotency, lease or outbox, nothing is encrypted or validated, and events are published without confirms.
"""
