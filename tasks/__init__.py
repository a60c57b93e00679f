"""What happens to a confirmation: accept, claim, confirm, decide, record; Celery tasks are thin shells over them."""
