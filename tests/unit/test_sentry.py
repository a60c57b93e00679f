"""Logs and Sentry get no personal data: no texts of exceptions, no arguments, no local variables."""

import io
import json
import logging
import sys
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from typing import Any

import pytest
import sentry_sdk
import structlog

from tests.support.sentry import Capturing
from worker.errors import BadCredentials, ConfirmOfferError, DecryptionError, Unknown, describe, where
from worker.observability import log_context, logs
from worker.observability.sentry import CheckIns, allowed_only, configure_sentry, report, transaction
from worker.settings import LogSettings, SentrySettings
from worker.xone.circuit_breaker import CircuitBreaker

MARK = "Geheimnis"


def fail(argument: str = MARK) -> None:
    local = {"email": f"{argument}@example.com"}
    raise ValueError(f"no such address: {local['email']}")


def fail_with(error: Exception) -> None:
    raise error


def fail_with_our_error() -> None:
    raise DecryptionError("body opens with no key of DATA_KEYS")


def chained(kind: type[Exception]) -> Exception:
    """An exception with a cause and a context that both contain the mark."""
    try:
        try:
            fail()
        except ValueError as first:
            try:
                raise KeyError(MARK) from first
            except KeyError as second:
                raise kind("no key" if issubclass(kind, ConfirmOfferError) else MARK) from second
    except Exception as error:
        error.add_note(MARK)
        return error


def caught(function: Any) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError


# --- Descriptions of exceptions ---


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError(MARK), "ValueError"),
        (KeyError(MARK), "KeyError"),
        (UnicodeDecodeError("utf-8", MARK.encode(), 0, 1, MARK), "UnicodeDecodeError"),
        (ExceptionGroup(MARK, [ValueError(MARK)]), "ExceptionGroup"),
        (DecryptionError("body opens with no key"), "DecryptionError: body opens with no key"),
        (Unknown("timeout", "no whole answer", answer=MARK.encode()), "Unknown: timeout: no whole answer"),
    ],
)
def test_an_exception_is_described_by_its_type_and_only_ours_by_their_text(error: BaseException, text: str) -> None:
    assert describe(error) == text


def test_places_have_neither_code_nor_values() -> None:
    places = where(caught(fail).__traceback__)

    assert [place.split(" ")[1] for place in places] == ["caught", "fail"]
    assert all(place.startswith("unit/test_sentry.py:") for place in places)


def test_an_exception_without_a_traceback_has_no_places() -> None:
    assert where(None) == []


def test_a_long_traceback_is_cut_to_its_end() -> None:
    def deeper(levels: int) -> None:
        deeper(levels - 1) if levels else fail()

    places = where(caught(lambda: deeper(20)).__traceback__)

    assert len(places) == 8
    assert places[-1].endswith(" fail")


# --- Sentry ---


def test_a_defect_is_sent_with_types_places_and_tags(sentry: Capturing) -> None:
    report(caught(fail), confirmation="c-1", attempt=3)

    [event] = sentry.events()
    [exception] = event["exception"]["values"]
    assert exception["type"] == "ValueError"
    assert exception["stacktrace"]["frames"][-1]["function"] == "fail"
    assert event["tags"] == {"confirmation": "c-1", "attempt": "3"}
    assert event["level"] == "error"


def test_our_own_exceptions_are_sent_with_their_text(sentry: Capturing) -> None:
    report(caught(fail_with_our_error))

    [event] = sentry.events()
    assert event["exception"]["values"][-1]["value"] == "DecryptionError: body opens with no key of DATA_KEYS"


def test_an_event_has_release_and_task(sentry: Capturing) -> None:
    with log_context.for_task("confirm_offer", "a-queue", f"00-{'a' * 32}-{'b' * 16}-01", "M-1", "C-1"):
        log_context.bind(confirmation="c-1", partner_id="P-100", offer_id="offer-1", attempt=2)
        report(caught(fail))
    report(caught(fail), duty="relay")

    of_task, of_service = sentry.events()
    assert (of_task["transaction"], of_service["transaction"]) == ("confirm_offer", "relay")
    assert of_task["tags"] == {
        "task": "confirm_offer",
        "trace_id": "a" * 32,
        "confirmation": "c-1",
        "partner_id": "P-100",
        "offer_id": "offer-1",
        "attempt": "2",
    }
    assert of_service["tags"] == {"duty": "relay"}
    assert of_task["release"] == f"confirm-offer@{version('confirm-offer')}"
    assert of_task["environment"] == "production"


@pytest.mark.parametrize("code", ["credentials", "http-500"])
def test_errors_with_one_code_are_one_issue(sentry: Capturing, code: str) -> None:
    report(BadCredentials(code, "one"), code=code)
    report(caught(lambda: fail_with(BadCredentials(code, "another"))), code=code, attempt=3)
    report(caught(fail))

    first, second, other = sentry.events()
    assert first["fingerprint"] == second["fingerprint"] == ["BadCredentials", code]
    assert "fingerprint" not in other


def test_wrong_credentials_are_reported_once(sentry: Capturing) -> None:
    clock = [0.0]
    circuit_breaker = CircuitBreaker(lambda: clock[0])
    for second in range(0, 100, 10):
        clock[0] = second
        with pytest.raises(BadCredentials), circuit_breaker.guard():
            raise BadCredentials("credentials", "XONE gives no token (401)", 401)

    (event,) = sentry.events()
    assert event["fingerprint"] == ["BadCredentials", "credentials"]


def test_no_task_is_a_transaction_by_default(sentry: Capturing) -> None:
    with task_context(), transaction("confirm_offer"):
        pass

    assert sentry.sent == []


@pytest.fixture
def sampling(sentry: Capturing) -> Capturing:
    """As ``sentry``, with each task sampled."""
    configure_sentry(SentrySettings(SENTRY_DSN="https://key@sentry.example/1", SENTRY_TRACES_SAMPLE_RATE=1))
    sentry_sdk.get_client().transport = sentry
    return sentry


def task_context() -> AbstractContextManager[None]:
    return log_context.for_task("confirm_offer", "a-queue", None, None, None)


def plant_marks() -> None:
    """Puts marks into everything that Sentry's library may send."""
    scope = sentry_sdk.get_current_scope()
    scope.set_extra("body", MARK)
    scope.set_context("job", {"email": MARK})
    scope.set_user({"email": MARK})
    scope.set_tag("email", MARK)
    scope.add_attachment(bytes=MARK.encode(), filename=MARK, add_to_transactions=True)
    sentry_sdk.add_breadcrumb(message=MARK)


def test_a_sampled_task_is_a_transaction_with_its_context(sampling: Capturing) -> None:
    with task_context(), transaction("confirm_offer"):
        log_context.bind(partner_id="P-100", offer_id="offer-1", attempt=1, outcome="refused", code="http-422")

    (sent,) = sampling.events()
    assert (sent["type"], sent["transaction"]) == ("transaction", "confirm_offer")
    assert sent["contexts"].keys() == {"trace"}
    assert (sent["contexts"]["trace"]["op"], sent["contexts"]["trace"]["status"]) == (
        "queue.process",
        "ok",
    )
    assert sent["tags"] == {
        "task": "confirm_offer",
        "partner_id": "P-100",
        "offer_id": "offer-1",
        "attempt": "1",
        "outcome": "refused",
        "code": "http-422",
    }


def test_no_envelope_has_marked_data(sampling: Capturing) -> None:
    with (
        suppress(ValueError),
        log_context.for_task("confirm_offer", "a-queue", None, None, None),
        transaction("confirm_offer"),
    ):
        plant_marks()
        with sentry_sdk.start_span(op="http.client", name=MARK) as span:
            span.set_data("url", MARK)
            CheckIns("scheduler").on_success()
            report(caught(fail))
            fail()

    kinds = [json.loads(sent.split(b"\n")[1])["type"] for sent in sampling.sent]
    assert kinds == ["check_in", "event", "transaction"]
    assert all(MARK.encode() not in sent for sent in sampling.sent)


def test_a_service_checks_in_once_a_minute_with_nothing_else(sentry: Capturing) -> None:
    clock = [0.0]
    check_ins = CheckIns("confirm-offer-scheduler", lambda: clock[0])
    for second in range(0, 121, 10):
        clock[0] = float(second)
        check_ins.on_success()

    first, middle, last = sentry.events()
    assert first.keys() == {
        "type", "event_id", "timestamp", "platform", "release", "environment", "sdk",
        "monitor_slug", "check_in_id", "status", "duration", "monitor_config",
    }  # fmt: skip
    assert first["check_in_id"] != middle["check_in_id"] != last["check_in_id"]
    assert {check_in["monitor_slug"] for check_in in (first, middle, last)} == {"confirm-offer-scheduler"}


def test_without_a_monitor_no_service_checks_in(sentry: Capturing) -> None:
    CheckIns(None).on_success()

    assert sentry.sent == []


@pytest.mark.parametrize(
    "error",
    [
        caught(fail),
        chained(RuntimeError),
        chained(DecryptionError),
        ExceptionGroup(MARK, [ValueError(MARK), KeyError(MARK)]),
        OSError(5, MARK, f"/home/{MARK}"),
        KeyError(MARK),
    ],
    ids=["local and argument", "chain", "chain of ours", "group", "path", "no trace"],
)
def test_no_event_of_sentry_has_marked_data(sentry: Capturing, error: Exception) -> None:
    with sentry_sdk.new_scope() as scope:
        scope.set_extra("body", MARK)
        scope.set_context("job", {"email": MARK})
        scope.set_user({"email": MARK})
        sentry_sdk.add_breadcrumb(message=MARK)
        report(error, confirmation="c-1")

    assert len(sentry.sent) == 1
    assert MARK.encode() not in sentry.sent[0]
    assert sentry.events()[0]["tags"] == {"confirmation": "c-1"}


def test_logs_and_messages_are_not_sent_to_sentry(sentry: Capturing) -> None:
    logging.getLogger("celery.app.trace").error("failed: %s", MARK, exc_info=caught(fail))
    structlog.get_logger("worker.test").error("failed", exc_info=caught(fail))

    assert sentry.sent == []


def test_an_event_sent_by_other_code_is_emptied(sentry: Capturing) -> None:
    sentry_sdk.capture_message(MARK)

    assert MARK.encode() not in b"".join(sentry.sent)


@pytest.mark.usefixtures("_sentry_off_afterwards")
@pytest.mark.parametrize("dsn", [None, ""])
def test_without_a_dsn_nothing_is_sent(dsn: str | None) -> None:
    configure_sentry(SentrySettings(SENTRY_DSN=dsn))

    assert not sentry_sdk.get_client().is_active()


def test_an_event_is_built_from_an_allow_list() -> None:
    frame = {"filename": "a.py", "function": "f", "module": "a", "lineno": 3, "in_app": True}
    event: Any = {
        "event_id": "1",
        "level": "error",
        "message": MARK,
        "logentry": {"message": MARK},
        "request": {"data": MARK},
        "user": {"email": MARK},
        "extra": {"a": MARK},
        "contexts": {"a": {"b": MARK}},
        "breadcrumbs": {"values": [{"message": MARK}]},
        "server_name": MARK,
        "tags": {"email": MARK, "attempt": "3"},
        "modules": {"a": "1"},
        "something_new": MARK,
        "exception": {
            "values": [
                {
                    "type": "ValueError",
                    "module": None,
                    "value": MARK,
                    "mechanism": {"data": MARK},
                    "stacktrace": {
                        "frames": [{**frame, "vars": {"a": MARK}, "context_line": MARK, "pre_context": [MARK]}]
                    },
                }
            ]
        },
    }

    hint: Any = {"exc_info": (ValueError, ValueError(MARK), None), "attachments": [MARK]}
    kept = allowed_only(event, hint)

    exception = {"type": "ValueError", "module": None, "value": "ValueError", "stacktrace": {"frames": [frame]}}
    assert kept == {
        "event_id": "1",
        "level": "error",
        "tags": {"attempt": "3"},
        "exception": {"values": [exception]},
    }
    assert hint["attachments"] == []


# --- Logs ---


@pytest.fixture(params=["json", "console"])
def output(request: pytest.FixtureRequest, logging_restored: None) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(LogSettings(LOG_FORMAT=request.param, LOG_LEVEL="DEBUG"), stream)
    return stream


@pytest.fixture
def json_output(logging_restored: None) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(LogSettings(LOG_FORMAT="json", LOG_LEVEL="INFO"), stream)
    return stream


def test_the_text_of_an_exception_is_not_logged(output: io.StringIO) -> None:
    log = structlog.get_logger("worker.test")
    foreign = logging.getLogger("kombu.test")
    for error in (caught(fail), chained(RuntimeError), chained(DecryptionError)):
        log.error("one", exc_info=error)
        log.error("two", exc_info=(type(error), error, error.__traceback__))
        foreign.error("three", exc_info=error)
        try:
            raise error
        except Exception:
            log.exception("four")
            foreign.exception("five")

    lines = output.getvalue()
    assert MARK not in lines
    assert all(lines.count(word) == 3 for word in ("one", "two", "three", "four", "five"))
    assert "ValueError" in lines
    assert "RuntimeError" in lines
    assert "DecryptionError: no key" in lines


def test_a_defect_is_logged_with_type_place_and_context(output: io.StringIO) -> None:
    report(caught(fail), confirmation="c-1")
    report(caught(fail_with_our_error))

    lines = output.getvalue()
    assert MARK not in lines
    for part in ("defect", "ValueError", "test_sentry.py", "fail", "c-1", "DecryptionError: body opens with no key"):
        assert part in lines


def test_a_line_of_json_has_time_level_logger_and_event(json_output: io.StringIO) -> None:
    structlog.get_logger("worker.test").info("attempt_ended", attempt=3, code=None)

    [line] = map(json.loads, json_output.getvalue().splitlines())
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "attempt_ended", "level": "info", "logger": "worker.test", "attempt": 3, "code": None}


def test_an_exception_is_logged_as_error_and_places(json_output: io.StringIO) -> None:
    structlog.get_logger("worker.test").warning("failed", exc_info=caught(fail))

    [line] = map(json.loads, json_output.getvalue().splitlines())
    assert line["error"] == "ValueError"
    assert [place.split(" ")[1] for place in line["where"]] == ["caught", "fail"]


def test_exc_info_without_an_exception_does_no_harm(json_output: io.StringIO) -> None:
    assert sys.exc_info() == (None, None, None)
    structlog.get_logger("worker.test").error("failed", exc_info=True)

    [line] = map(json.loads, json_output.getvalue().splitlines())
    assert "error" not in line


@pytest.mark.parametrize("name", ["kombu", "amqp", "psycopg", "sqlalchemy.pool", "celery.app.trace", "a.new.library"])
def test_values_in_texts_of_libraries_are_not_logged(output: io.StringIO, name: str) -> None:
    logging.getLogger(name).error("could not take %r: %s", {"email": MARK}, ValueError(MARK))

    assert "could not take %r: %s" in output.getvalue()
    assert MARK not in output.getvalue()


def test_the_reason_of_a_failed_connection_is_logged(output: io.StringIO) -> None:
    error = OSError(111, "Connection refused")
    logging.getLogger("celery.worker.consumer.consumer").error("consumer: Cannot connect to %s: %s", "amqp://x", error)

    assert "Cannot connect to amqp://x: [Errno 111] Connection refused" in output.getvalue()


@pytest.mark.parametrize(
    ("logger", "level", "is_logged"),
    [
        ("worker.xone.client", "info", True),
        ("tasks.confirm", "info", True),
        ("worker.xone.client", "debug", False),
        ("amqp", "info", False),
        ("urllib3.connectionpool", "info", False),
        ("sqlalchemy.engine.Engine", "info", False),
        ("sqlalchemy.engine.Engine", "warning", True),
        ("celery.worker", "info", True),
        ("celery.app.trace", "info", False),
        ("celery.worker", "debug", False),
        ("a.new.library", "info", False),
    ],
)
def test_lower_levels_of_libraries_are_not_logged(
    json_output: io.StringIO, logger: str, level: str, is_logged: bool
) -> None:
    getattr(logging.getLogger(logger), level)("said")

    assert ("said" in json_output.getvalue()) is is_logged
