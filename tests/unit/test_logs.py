"""docs/logs.md lists the log events of the code. All output of a process has their form, without exception texts."""

import ast
import io
import json
import logging
import re
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.support.sentry import Capturing
from worker.observability import log_context, logs
from worker.settings import LogSettings

ROOT = Path(__file__).parents[2]
MARK = "Geheimnis"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def output(logging_restored: None) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(LogSettings(LOG_FORMAT="json"), stream)
    return stream


def lines(output: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.getvalue().splitlines()]


# --- The document ---


def events_of_code() -> dict[str, tuple[set[str], set[str]]]:
    """Levels and fields of each log event in a call of ``log``."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for path in [*ROOT.glob("tasks/**/*.py"), *ROOT.glob("worker/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name("log"), attr="log"), args=[level, event, *_]):
                    levels = {name.lower() for name in re.findall(r"logging\.([A-Z]+)", ast.unparse(level))}
                case ast.Call(func=ast.Attribute(value=ast.Name("log"), attr=level), args=[event, *_]):
                    levels = {str(level)}
                case _:
                    continue
            assert isinstance(event, ast.Constant), ast.unparse(node)
            event_levels, event_fields = found.setdefault(str(event.value), (set(), set()))
            event_levels.update(levels)
            event_fields.update(keyword.arg for keyword in node.keywords if keyword.arg)
    return found


def events_of_document() -> dict[str, tuple[set[str], set[str]]]:
    rows = re.findall(
        r"^\| `(\w+)` \| ([a-z, ]+) \| (.*?) \|", (ROOT / "docs/logs.md").read_text("utf-8"), re.MULTILINE
    )
    return {event: (set(levels.split(", ")), set(re.findall(r"`(\w+)`", fields))) for event, levels, fields in rows}


def test_the_document_lists_each_log_event_with_level_and_fields() -> None:
    documented = events_of_document()
    assert documented.pop("task_raised") == ({"error"}, {"task", "error", "where"})  # Celery's own

    assert documented == events_of_code()
    assert len(documented) > 20


# --- The context of a task ---


def test_each_line_of_a_task_has_its_context(output: io.StringIO) -> None:
    log = structlog.get_logger("tasks.test")
    log.info("before")
    with log_context.for_task("confirm_offer", "a-queue", TRACEPARENT, "M-1", "C-1"):
        log_context.bind(partner_id="P-100", offer_id="offer-1")
        log.info("within")
        logging.getLogger("celery.test").warning("a library's")
    log.info("after")

    before, within, foreign, after = lines(output)
    assert before.keys() == after.keys() == {"timestamp", "level", "event", "logger"}
    bound = {name: within[name] for name in within.keys() - before.keys()}
    assert bound == {
        "task": "confirm_offer",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "partner_id": "P-100",
        "offer_id": "offer-1",
    }
    assert bound.items() <= foreign.items()


def test_the_context_belongs_to_one_thread_and_one_task(output: io.StringIO) -> None:
    log = structlog.get_logger("tasks.test")
    barrier = threading.Barrier(2)

    def work(name: str) -> None:
        for number in range(2):
            barrier.wait()
            with suppress(RuntimeError), log_context.for_task("confirm_offer", "a-queue", None, None, None):
                log.info("begun", expected=name)
                log_context.bind(offer_id=f"{name}-{number}", **({"code": "first"} if number == 0 else {}))
                barrier.wait()
                log.info("within", expected=f"{name}-{number}", has_code=number == 0)
                raise RuntimeError

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    within = [line for line in lines(output) if line["event"] == "within"]
    assert len(within) == 4
    assert all(line["offer_id"] == line["expected"] and ("code" in line) == line["has_code"] for line in within)
    assert all("offer_id" not in line for line in lines(output) if line["event"] == "begun")


# --- The form of all lines ---


def test_a_line_begins_with_time_level_and_event(output: io.StringIO) -> None:
    structlog.get_logger("tasks.test").info("attempt_ended", attempt=3)
    logging.getLogger("celery.test").warning("a library's")

    for line in output.getvalue().splitlines():
        assert list(json.loads(line))[:3] == ["timestamp", "level", "event"]


def test_a_line_for_people_is_short(logging_restored: None) -> None:
    stream = io.StringIO()
    logs.configure(LogSettings(LOG_FORMAT="console"), stream)
    with log_context.for_task("confirm_offer", "a-queue", TRACEPARENT, None, None):
        log_context.bind(confirmation="01a20cd9", partner_id="P-100", offer_id="offer-1", attempt=1, code=None)
        structlog.get_logger("tasks.test").info("attempt_ended", took_ms=64)

    time, line = stream.getvalue().strip().split(" ", 1)
    assert re.fullmatch(r"\d\d:\d\d:\d\d", time)
    assert line == "[info     ] attempt_ended offer_id=offer-1 partner_id=P-100 attempt=1 took_ms=64"


def test_a_line_for_people_has_nothing_that_a_terminal_obeys(logging_restored: None) -> None:
    stream = io.StringIO()
    logs.configure(LogSettings(LOG_FORMAT="console"), stream)
    structlog.get_logger("tasks.test").info("refused \x9b31m", reason="\x1b[31m\u202ex\nsecond")

    assert stream.getvalue().rstrip("\n").endswith("refused \ufffd31m reason=\ufffd[31m\ufffdx\ufffdsecond")


def test_a_warning_of_python_is_a_line_without_its_text(output: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logs._log_warning
        warnings.warn(f"value {MARK}", UserWarning, stacklevel=1)

    (line,) = lines(output)
    assert (line["event"], line["kind"]) == ("python_warning", "UserWarning")
    assert line["where"][0].startswith("unit/test_logs.py:")
    assert MARK not in output.getvalue()


def fail() -> None:
    raise ValueError(MARK)


def test_an_uncaught_exception_of_a_thread_is_a_defect(output: io.StringIO, sentry: Capturing) -> None:
    thread = threading.Thread(target=fail, name="a-thread")
    thread.start()
    thread.join(10)

    (line,) = lines(output)
    assert (line["event"], line["error"], line["thread"]) == ("defect", "ValueError", "a-thread")
    assert line["where"][-1].endswith(" fail")
    (event,) = sentry.events()
    assert (event["tags"], event["transaction"]) == ({"thread": "a-thread"}, "a-thread")
    assert MARK not in output.getvalue()
    assert MARK.encode() not in sentry.sent[0]


def test_an_uncaught_exception_is_a_defect(output: io.StringIO, sentry: Capturing) -> None:
    try:
        fail()
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)

    (line,) = lines(output)
    assert (line["event"], line["level"], line["thread"]) == ("defect", "error", "MainThread")
    assert len(sentry.sent) == 1


def test_an_unraisable_exception_is_a_defect(output: io.StringIO) -> None:
    class Dying:
        def __del__(self) -> None:
            fail()

    Dying()

    (line,) = lines(output)
    assert (line["event"], line["error"]) == ("defect", "ValueError")
    assert MARK not in output.getvalue()


def log_as_celery(description: str) -> None:
    """Logs as celery.app.trace does for a task that raised."""
    try:
        fail()
    except ValueError as error:
        data = {"name": "confirm_offer", "id": "1", "exc": repr(error), "traceback": MARK, "description": description}
        logging.getLogger("celery.app.trace").error(
            "Task %(name)s[%(id)s] %(description)s: %(exc)s", data, exc_info=True, extra={"data": data}
        )


FAILING_GREENLET = f"""
from gevent.monkey import patch_all
patch_all()
import gevent
from worker.observability import logs
from worker.settings import LogSettings

def work(_body):
    raise ConnectionResetError("{MARK}")

logs.configure(LogSettings(LOG_FORMAT="json"))
gevent.spawn(work, b"{MARK}").join()
"""


def test_an_uncaught_exception_of_a_greenlet_is_a_defect() -> None:
    """gevent itself prints the text and the greenlet's arguments."""
    run = subprocess.run([sys.executable, "-c", FAILING_GREENLET], capture_output=True, text=True, check=True)

    (line,) = map(json.loads, run.stderr.splitlines())
    assert (line["event"], line["error"], line["thread"]) == ("defect", "ConnectionResetError", "greenlet")
    assert MARK not in run.stderr


def test_celery_s_line_on_a_task_is_rewritten(output: io.StringIO) -> None:
    log_as_celery("raised unexpected")

    (line,) = lines(output)
    assert (line["event"], line["task"], line["error"]) == ("task_raised", "confirm_offer", "ValueError")
    assert MARK not in output.getvalue()


def test_a_requeued_message_is_not_logged(output: io.StringIO) -> None:
    log_as_celery("rejected")

    assert output.getvalue() == ""
