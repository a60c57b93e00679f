"""The process and its outside: settings, Celery app and consumer, broker, loops, XONE client, command line."""
