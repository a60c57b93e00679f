"""What one writes in an afternoon: the happy path of the same job, on Celery and on dramatiq.

A job is a task message. The task calls XONE, stores booking and policies with the ORM, and publishes an event. There is
no idempotency, lease or outbox, nothing is encrypted or validated, and events are published without confirms.
"""
