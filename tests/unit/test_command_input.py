"""Input of commands: times and files of offers. And the pace and durations that commands show."""

import io
from datetime import UTC, datetime, timedelta

import click
import pytest
import time_machine

from worker.cli.ui.batch_progress import Pace
from worker.cli.ui.console import UsageError
from worker.cli.ui.offers_file import read_offers
from worker.cli.ui.time_param import MOMENT
from worker.formatting import duration

NOON = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("given", "moment"),
    [
        ("30m", NOON - timedelta(minutes=30)),
        ("2h", NOON - timedelta(hours=2)),
        ("7d", NOON - timedelta(days=7)),
        ("90 s", NOON - timedelta(seconds=90)),
        ("1W", NOON - timedelta(weeks=1)),
        ("2026-01-31T11:00Z", NOON - timedelta(hours=1)),
        ("2026-01-31 16:30+05:30", NOON - timedelta(hours=1)),
        ("2026-01-31T16:30", datetime(2026, 1, 31, 16, 30).astimezone(UTC)),
        ("2026-01-31", datetime(2026, 1, 31).astimezone(UTC)),
    ],
)
def test_a_time_is_read(given: str, moment: datetime) -> None:
    with time_machine.travel(NOON, tick=False):
        assert MOMENT.convert(given, None, None) == moment


@pytest.mark.parametrize("given", ["", "soon", "1x", "-2h", "2026-13-01", "999999w", "0001-01-01T00:00+05:30"])
def test_an_invalid_time_is_refused(given: str) -> None:
    with pytest.raises(click.BadParameter, match="is no time"):
        MOMENT.convert(given, None, None)


@pytest.mark.parametrize(
    ("content", "offers"),
    [
        ("", ()),
        ("\n \n", ()),
        ("a\n\n b \na", ((None, "a"), (None, "b"))),
        ("P-1 a\nP-1,b\nP-1, c\nP-1\td", (("P-1", "a"), ("P-1", "b"), ("P-1", "c"), ("P-1", "d"))),
        ("offer_id\na\nb", ((None, "a"), (None, "b"))),
        ('state, offer_id, partner_id\n"failed", a, P-1\nfailed,b,', (("P-1", "a"), (None, "b"))),
        ('offer_id,detail\na,"two\nlines"\nb,', ((None, "a"), (None, "b"))),
        ("offer_id,detail\r\na,x\rb,y\u2028z\n", ((None, "a"), (None, "b"))),
        ("offer_id\n'-a\n", ((None, "-a"),)),
        ('{"offer_id": "a", "x": "y\u2028z\x85"}', ((None, "a"),)),
        (
            '{"offer_id": "a", "partner_id": null, "x": 1}\n{"offer_id": "b", "partner_id": "P"}',
            ((None, "a"), ("P", "b")),
        ),
    ],
)
def test_offers_are_read_from_a_file(content: str, offers: tuple[tuple[str | None, str], ...]) -> None:
    assert read_offers(io.BytesIO(content.encode())) == offers


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a\nP-1 b c", 2),
        ("a\n?", 2),
        ("offer_id,partner_id\n,P-1", 2),
        ("partner_id,offer_id\nP-1", 2),
        ('{"offer_id": "a"}\n{"offer": "b"}', 2),
        ('{"offer_id": "a"}\nb', 2),
        ('{"offer_id": 7}', 1),
        ('{"offer_id": "a", "partner_id": ["P"]}', 1),
        ("../a", 1),
        ('{"offer_id": "a"}\n{"x": ' + "[" * 100_000, 2),
    ],
)
def test_an_invalid_line_is_named_by_its_number(content: str, line: int) -> None:
    with pytest.raises(UsageError, match=f"line {line} "):
        read_offers(io.BytesIO(content.encode()))


def test_a_binary_file_is_refused() -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        read_offers(io.BytesIO(b"\xff\xfe"))


def test_the_pace_is_measured_over_the_last_seconds() -> None:
    pace = Pace()
    pace.record(100.0, 0)
    assert pace.rate == 0.0
    for second in range(1, 31):
        pace.record(100.0 + second, second * 5)
    assert pace.rate == pytest.approx(5.0)
    for second in range(31, 61):
        pace.record(100.0 + second, 150)
    assert pace.rate == 0.0
    assert pace.is_still(160.0)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3600, "1:00:00"), (12345.6, "3:25:46")])
def test_a_duration_is_formatted(seconds: float, text: str) -> None:
    assert duration(seconds) == text
