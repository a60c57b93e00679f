"""The checker of `make cluster-test` finds what is wrong in a history, and nothing in a right one."""

from dataclasses import replace
from typing import Any

import pytest

from tests.cluster.checker import RULES, Call, Histories, Job, Received, Row, check

ANNOUNCED = Received("e-1", "a", "booking.confirmed", 1, "b-1", 2.0)
UNANSWERED = Call("a", "k", 1.0, 1.5, None)
RIGHT = Histories(
    jobs=(Job("a", 0.0, 0.1),),
    calls=(Call("a", "k", 1.0, 1.5, 201),),
    bookings=(("a", "b-1"),),
    rows=(Row("a", "confirmed", "b-1"),),
    events=(ANNOUNCED,),
)
FAILED = Histories(
    jobs=(Job("a", 0.0, 0.1),),
    calls=(Call("a", "k", 1.0, 1.5, 422),),
    rows=(Row("a", "failed", None),),
    events=(replace(ANNOUNCED, type="confirmation.failed", booking=None),),
)
TWO_EVENTS = replace(
    RIGHT,
    rows=(Row("a", "confirmed", "b-1", (1, 2)),),
    events=(replace(ANNOUNCED, id="e-0", type="booking.pending"), replace(ANNOUNCED, sequence=2, at=3.0)),
)
LATER = replace(ANNOUNCED, sequence=2**31, at=3.0)
ROW_LOST = replace(RIGHT, rows=())


@pytest.mark.parametrize(
    "right",
    [
        RIGHT,
        FAILED,
        TWO_EVENTS,
        replace(RIGHT, events=(ANNOUNCED, replace(ANNOUNCED, at=9.0))),
        replace(RIGHT, jobs=(Job("a", 0.0, 0.1, tries=3),)),
        replace(RIGHT, calls=(replace(UNANSWERED), Call("a", "k", 1.5, 2.0, 422))),
        replace(RIGHT, calls=(UNANSWERED, Call("a", "k", 1.4, 1.9, 422))),
        replace(TWO_EVENTS, rows=(Row("a", "confirmed", "b-1", (1, 2**31)),), events=(TWO_EVENTS.events[0], LATER)),
        replace(ROW_LOST, is_lossy=True),
        replace(ROW_LOST, events=(), is_lossy=True),
        replace(RIGHT, events=(ANNOUNCED, replace(ANNOUNCED, id="e-2", sequence=7, at=9.0)), is_lossy=True),
        replace(RIGHT, events=(replace(ANNOUNCED, at=9.0),), fault=(1.0, 3.0), within=8.0, max_pause=9.0),
        Histories(),
    ],
    ids=[
        "confirmed",
        "refused",
        "first pending",
        "an event came twice",
        "a job was published three times",
        "a second call after one without an answer",
        "a hang-up that was noticed late",
        "numbers leap after a failover",
        "lossy: the row is gone",
        "lossy: row and event are gone",
        "lossy: announced again, as newer",
        "late, but in time",
        "nothing",
    ],
)
def test_a_right_history_has_no_violation(right: Histories) -> None:
    assert check(right).violations == {}


WRONG: dict[str, list[tuple[Histories, dict[str, Any]]]] = {
    "every job was confirmed by the broker in the end": [(RIGHT, {"jobs": (Job("a", 0.0, None, tries=4),)})],
    "every confirmed publish ended": [
        (RIGHT, {"jobs": (*RIGHT.jobs, Job("b", 0.0, 0.1))}),
        (RIGHT, {"rows": (Row("a", "retrying", "b-1"),)}),
        (RIGHT, {"events": ()}),
        (FAILED, {"events": (replace(FAILED.events[0], type="confirmation.needs_review"),)}),
        (RIGHT, {"rows": (Row("a", "retrying", "b-1"),), "is_lossy": True}),
    ],
    "every row is of one job": [
        (RIGHT, {"rows": (*RIGHT.rows, Row("x", "confirmed", None, ()))}),
        (RIGHT, {"rows": RIGHT.rows * 2}),
    ],
    "no offer was booked twice": [
        (RIGHT, {"bookings": (("a", "b-1"), ("a", "b-2"))}),
        (RIGHT, {"calls": (*RIGHT.calls, Call("a", "k", 3.0, 3.5, 201))}),
        (RIGHT, {"calls": (*RIGHT.calls, Call("a", "k", 3.0, 3.5, 201)), "is_lossy": True}),
    ],
    "all calls of an offer have the same idempotency key": [
        (RIGHT, {"calls": (UNANSWERED, Call("a", "other", 3.0, 3.5, 201))}),
        (RIGHT, {"calls": (Call("a", None, 1.0, 1.5, 201),)}),
        (RIGHT, {"calls": (Call("a", None, 1.0, 1.5, 201),), "is_lossy": True}),
    ],
    "no two calls of an offer at once": [
        (RIGHT, {"calls": (Call("a", "k", 1.0, 1.5, 500), Call("a", "k", 1.4, 1.9, 201))}),
        (RIGHT, {"calls": (Call("a", "k", 1.0, 9.0, None), Call("a", "k", 1.4, 1.9, 201))}),
        (RIGHT, {"in_flight_twice": frozenset({"a"})}),
        (RIGHT, {"in_flight_twice": frozenset({"a"}), "is_lossy": True}),
    ],
    "every booking upstream is stored and announced": [
        (RIGHT, {"rows": (Row("a", "confirmed", None),)}),
        (RIGHT, {"rows": (Row("a", "confirmed", "b-2"),)}),
        (RIGHT, {"events": (replace(ANNOUNCED, booking="b-2"),)}),
        (RIGHT, {"bookings": ()}),
        (FAILED, {"bookings": (("a", "b-1"),)}),
        (ROW_LOST, {"bookings": (), "is_lossy": True}),
        (ROW_LOST, {"is_lossy": True, "is_reconciled": True}),
    ],
    "events are in order": [
        (TWO_EVENTS, {"events": (replace(ANNOUNCED, sequence=2), replace(ANNOUNCED, id="e-0", sequence=1, at=3.0))}),
        (TWO_EVENTS, {"events": (TWO_EVENTS.events[0], replace(TWO_EVENTS.events[1], sequence=1))}),
        (RIGHT, {"events": (ANNOUNCED, replace(ANNOUNCED, id="e-2", at=9.0)), "is_lossy": True}),
    ],
    "every event of the outbox was received": [
        (RIGHT, {"rows": (Row("a", "confirmed", "b-1", (1, 2)),)}),
        (RIGHT, {"rows": (Row("a", "confirmed", "b-1", ()),)}),
        (RIGHT, {"rows": (Row("a", "confirmed", "b-1", (1, 2)),), "is_lossy": True}),
    ],
    "each end is announced under one id": [
        (TWO_EVENTS, {"events": (ANNOUNCED, replace(ANNOUNCED, id="e-2", sequence=2, at=3.0))}),
    ],
    "no good job is a dead letter": [(RIGHT, {"dead_letters": ("a",)})],
    "all flows again in time": [(RIGHT, {"events": (replace(ANNOUNCED, at=9.0),), "fault": (1.0, 3.0), "within": 7.0})],
    "no pause is too long": [(RIGHT, {"max_pause": 1.8})],
    "no worker ended by itself or reported a defect": [(RIGHT, {"incidents": ("worker-1 ended with exit code 1",)})],
}


@pytest.mark.parametrize(
    ("rule", "base", "change"), [(rule, base, change) for rule, cases in WRONG.items() for base, change in cases]
)
def test_a_wrong_history_is_found_by_its_rule(rule: str, base: Histories, change: dict[str, Any]) -> None:
    assert rule in check(replace(base, **change)).violations


def test_every_rule_has_a_wrong_history() -> None:
    assert WRONG.keys() == RULES.keys()


def test_what_is_lost_or_came_twice_is_counted() -> None:
    seen = replace(
        RIGHT,
        jobs=(Job("a", 0.0, 0.1, tries=3), Job("b", 0.0, 0.1)),
        calls=(
            Call("a", "k", 0.1, 0.2, 503),
            UNANSWERED,
            Call("a", "k", 2.0, 2.5, 422),
            Call("a", "k", 2.4, 2.9, 422),
        ),
        events=(ANNOUNCED, ANNOUNCED, replace(ANNOUNCED, id="e-2", sequence=2)),
    )

    verdict = check(seen)

    counts = (verdict.jobs, verdict.lost, verdict.doubled)
    assert (counts, verdict.repeated_events, verdict.repeated_calls, verdict.repeated_jobs) == ((2, 1, 1), 2, 2, 2)


def test_the_longest_time_without_progress_is_one_in_which_a_job_waited() -> None:
    """Of the pause from 2 to 20, only what follows the third job counts; the second was published in it."""
    jobs = (Job("a", 0.0, 0.5), Job("b", 11.0, 12.0), Job("c", 13.0, 13.0))
    events = tuple(
        replace(ANNOUNCED, id=offer, offer=offer, at=at) for offer, at in (("a", 2.0), ("b", 20.0), ("c", 21.0))
    )

    assert check(Histories(jobs=jobs, events=events)).stall == 8.0


def test_all_flows_again_with_the_end_of_the_last_late_job() -> None:
    jobs = (Job("a", 0.0, 0.5), Job("b", 11.0, 12.0), Job("c", 18.0, 18.0))
    events = tuple(
        replace(ANNOUNCED, id=offer, offer=offer, at=at) for offer, at in (("a", 2.0), ("b", 20.0), ("c", 22.0))
    )

    assert check(Histories(jobs=jobs, events=events, fault=(10.0, 15.0))).flows_after == 10.0
    assert check(Histories(jobs=jobs, events=events, fault=(10.0, 15.0), held=frozenset({"b"}))).flows_after == 0.0


def test_only_the_offers_of_a_span_are_looked_at() -> None:
    other = replace(ANNOUNCED, id="x", offer="x-1", sequence=9)
    seen = replace(RIGHT, events=(ANNOUNCED, other), dead_letters=("x-2",), in_flight_twice=frozenset({"x-3"}))

    assert check(seen.of("a")).violations == {}
    assert check(seen).violations.keys() >= {"no two calls of an offer at once", "no good job is a dead letter"}
