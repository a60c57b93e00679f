"""The function that a pool runs for each message: Celery's tracer, with an end to whatever it raises.

Celery's tracer calls the task and may raise itself. Then its pools never return the message's slot, and the message is
neither acknowledged nor rejected. A task that raises would be acknowledged, and its job lost. Here, either puts the
message back after a pause; ``x-delivery-limit`` of the queue ends the repeats.
"""

import threading
import time
from typing import Any

from celery import current_app
from celery.app.trace import ExceptionInfo, ExceptionWithTraceback, fast_trace_task, trace_task_ret
from celery.exceptions import Ignore, Reject
from celery.worker import state

from worker.backoff import exponential
from worker.observability import metrics
from worker.observability.sentry import report

INITIAL_PAUSE = 0.5  # seconds before a message goes back, doubled with each delivery
MAX_PAUSE = 30.0
SHUTDOWN_POLL = 0.1  # seconds


def trace(task: str, task_id: str, request: dict[str, Any], *rest: Any) -> tuple[int, Any, float]:
    """As Celery's ``fast_trace_task``: whether the task failed, its result or exception, and its seconds."""
    try:
        run = fast_trace_task if current_app.use_fast_trace_task else trace_task_ret
        failed, result, seconds = run(task, task_id, request, *rest)
        if not failed or isinstance(_exception_of(result), Reject | Ignore):
            return failed, result, seconds
    except Reject as rejected:
        return _rejected(rejected)
    except BaseException as error:
        if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
            raise  # in a process of the prefork pool: its parent decides
        report(error)
    metrics.message_put_back("defect")
    _pause(exponential(INITIAL_PAUSE, int(request.get("deliveries") or 0), MAX_PAUSE))
    return _rejected(Reject("the task did not come to an end", requeue=True))


def _exception_of(result: Any) -> Any:
    error = getattr(result, "exception", None)
    return error.exc if isinstance(error, ExceptionWithTraceback) else error


def _rejected(rejection: Reject) -> tuple[int, Any, float]:
    try:
        raise rejection
    except Reject:
        return 1, ExceptionInfo(internal=True), 0.0


def _pause(seconds: float) -> None:
    """Waits, but not while the worker stops."""
    ends_at = time.monotonic() + seconds
    while (left := ends_at - time.monotonic()) > 0 and state.should_stop is None and state.should_terminate is None:
        time.sleep(min(left, SHUTDOWN_POLL))
