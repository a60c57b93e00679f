"""Failures: filters, groups by cause, and query plans that do not read every confirmation."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from models.states import State
from tasks.operations import failures
from tasks.operations.failures import FailureGroup, LeftOut, Sample, Selection
from tests.support.query_plans import FAILED, fill, plan_of
from tests.support.stored import insert_confirmation

REFUSED = {"error_code": "http-422", "error_http_status": 422, "error_detail": "XONE answered 422"}
BOOKED = {"error_code": "already-booked", "error_http_status": 409}
START = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def confirmation(engine: Engine) -> Callable[..., None]:
    def make(offer_id: str, minute: int = 0, **values: Any) -> None:
        times = {"created_at": START, "updated_at": START + timedelta(minutes=minute)}
        failure = {"offer_id": offer_id, "state": State.FAILED, **REFUSED}
        insert_confirmation(engine, **{**failure, **times, **values})

    return make


def test_failures_are_grouped_by_cause_most_frequent_first(engine: Engine, confirmation: Callable[..., None]) -> None:
    confirmation("a", 1, error_code="timeout", error_http_status=None, error_detail="no whole answer")
    for minute, partner in ((5, "P-200"), (2, "P-100"), (9, "P-200")):
        confirmation(f"b-{minute}", minute, partner_id=partner)
    confirmation("c", 3, error_detail="XONE answered 422: another reason")
    confirmation("ok", 4, state=State.CONFIRMED)
    confirmation("review", 4, state=State.NEEDS_REVIEW)

    with engine.connect() as connection:
        first, *others = failures.groups(connection, Selection())
        review = failures.waiting_for_review(connection, Selection())

    assert first == FailureGroup(
        code="http-422",
        http_status=422,
        detail="XONE answered 422",
        count=3,
        partners=("P-100", "P-200"),
        first_seen=START + timedelta(minutes=2),
        last_seen=START + timedelta(minutes=9),
        sample=Sample("P-200", "b-5"),
    )
    assert [(group.code, group.count) for group in others] == [("http-422", 1), ("timeout", 1)]
    assert review == 1


def test_ids_in_details_do_not_separate_causes(engine: Engine, confirmation: Callable[..., None]) -> None:
    for number in range(3):
        confirmation(f"a-{number}", **BOOKED, error_detail=f"XONE says that a booking exists as INS-AB{number}CD")

    with engine.connect() as connection:
        (group,) = failures.groups(connection, Selection())
        (of_rows,) = failures.groups_of(failures.match(connection, Selection()).confirmations)

    assert (group.count, group.detail) == (3, "XONE says that a booking exists as …")
    assert of_rows == group


@pytest.mark.parametrize(
    ("detail", "general"),
    [
        ("XONE answered 422 Unprocessable Entity", "XONE answered 422 Unprocessable Entity"),
        ("offer 5c7e0b1d-0000-4000-8000-000000000001 is gone", "offer … is gone"),
        ("no whole answer within XONE_TIMEOUT", "no whole answer within XONE_TIMEOUT"),
        (None, None),
    ],
)
def test_ids_are_removed_from_details(detail: str | None, general: str | None) -> None:
    assert failures.without_ids(detail) == general


FILTERED: list[tuple[Selection, list[str]]] = [
    (Selection(), ["early", "late", "other"]),
    (Selection(since=START + timedelta(minutes=5)), ["late", "other"]),
    (Selection(until=START + timedelta(minutes=5)), ["early"]),
    (Selection(partner="P-200", code="timeout"), ["other"]),
    (Selection(partner="P-200", code="http-422"), []),
    (Selection(limit=1), ["early"]),
    (Selection(include_needs_review=True), ["early", "late", "other", "review"]),
]


def test_failures_are_filtered(engine: Engine, confirmation: Callable[..., None]) -> None:
    confirmation("late", 5)
    confirmation("early", 1)
    confirmation("other", 6, partner_id="P-200", error_code="timeout")
    confirmation("review", 7, state=State.NEEDS_REVIEW)
    confirmation("ok", 3, state=State.CONFIRMED)

    for selection, expected in FILTERED:
        with engine.connect() as connection:
            rows = failures.match(connection, selection).confirmations
            count = sum(group.count for group in failures.groups(connection, selection))
        assert [row.offer_id for row in rows] == expected, selection
        assert count == len(expected) or selection.limit, selection


def test_offers_are_selected_by_name_and_others_are_left_out_with_a_reason(
    engine: Engine, confirmation: Callable[..., None]
) -> None:
    confirmation("a")
    confirmation("a", partner_id="P-200")
    confirmation("b")
    confirmation("ok", state=State.CONFIRMED)
    confirmation("review", state=State.NEEDS_REVIEW)
    offers = ((None, "a"), ("P-100", "b"), ("P-200", "b"), (None, "ok"), (None, "review"), (None, "typo"), (None, "a"))

    with engine.connect() as connection:
        matched = failures.match(connection, Selection(offers=offers))
        with_review = failures.match(connection, Selection(offers=offers, include_needs_review=True))

    assert sorted((row.partner_id, row.offer_id) for row in matched.confirmations) == [
        ("P-100", "a"), ("P-100", "b"), ("P-200", "a"),
    ]  # fmt: skip
    assert matched.left_out == [
        LeftOut("P-200", "b", None),
        LeftOut(None, "ok", State.CONFIRMED),
        LeftOut(None, "review", State.NEEDS_REVIEW),
        LeftOut(None, "typo", None),
    ]
    assert len(with_review.confirmations) == 4


QUERIES = [failures.rows_query, failures.groups_query, failures.review_query, failures.purged_query]
SELECTIONS = [
    Selection(),
    Selection(include_needs_review=True, limit=100),
    Selection(partner="P-1", code="http-422", since=START, until=START + timedelta(days=9999)),
]


def test_no_query_reads_every_confirmation(engine: Engine) -> None:
    fill(engine)
    for query in QUERIES:
        for selection in SELECTIONS:
            plan = plan_of(engine, query(selection))
            assert "ix_confirmations_ended_badly" in plan, (query, selection)
            assert "Seq Scan on confirmations" not in plan, (query, selection)
            assert "SCAN confirmations\n" not in plan, (query, selection)


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_only_failed_rows_of_a_million_are_read(engine: Engine) -> None:
    fill(engine, 1_000_000)
    plans = {
        f"{query.__name__} {number}": plan_of(engine, query(selection), "EXPLAIN ANALYZE")
        for query in QUERIES
        for number, selection in enumerate(SELECTIONS)
    }
    plans["waiting_query"] = plan_of(engine, failures.waiting_query(None), "EXPLAIN ANALYZE")

    for name, plan in plans.items():
        scans = re.findall(r"(?:Scan|Scan using \S+) on \S+ .*actual time=\S+ rows=(\d+)", plan)
        assert scans, plan
        assert max(map(int, scans)) <= FAILED, name
        assert "Seq Scan" not in plan, plan


def test_waiting_confirmations_are_counted_by_their_last_answer(
    engine: Engine, confirmation: Callable[..., None]
) -> None:
    confirmation("down-1", state=State.RETRYING, error_code="http-503", due_at=START)
    confirmation("down-2", state=State.QUEUED, error_code="http-503", due_at=START)
    confirmation("new", state=State.QUEUED, error_code=None, due_at=START, partner_id="P-200")
    confirmation("under-way", state=State.CONFIRMING, due_at=START)
    confirmation("failed")

    with engine.connect() as connection:
        of_all = failures.waiting(connection, None)
        of_partner = failures.waiting(connection, "P-200")

    assert [(group.code, group.count) for group in of_all] == [("http-503", 2), (None, 1)]
    assert [(group.code, group.count) for group in of_partner] == [(None, 1)]
    fill(engine)
    assert "ix_confirmations_due_at" in plan_of(engine, failures.waiting_query(None))
