"""When a worker's tasks count as stalled: messages in hand, none ended for long, and nothing else that explains it."""

from collections.abc import Iterator

import pytest
import time_machine

from worker.services.health_file import PartHealth
from worker.services.progress import GRACE, Progress

LIMIT = 4 * 30.0 + 45.0 + GRACE


@pytest.fixture
def clock() -> Iterator[time_machine.Traveller]:
    with time_machine.travel(1_000_000.0, tick=False) as coordinates:
        yield coordinates


def part(progress: Progress, is_excused: bool = False, waits_for: str | None = None) -> PartHealth:
    return progress.part(is_excused, lambda: waits_for)


def test_idle_is_well_for_ever(clock: time_machine.Traveller) -> None:
    progress = Progress(30.0, 45.0)
    progress.message_ended(progress.message_came())
    clock.shift(10 * LIMIT)

    assert part(progress) == PartHealth(1_000_000.0 + 10 * LIMIT, 1_000_000.0 + 10 * LIMIT)


def test_no_end_for_longer_than_the_limit_is_not_well(clock: time_machine.Traveller) -> None:
    progress = Progress(30.0, 45.0)
    progress.message_came()
    clock.shift(LIMIT - 1)
    assert part(progress).waits_for is None
    clock.shift(11)

    well_until = 1_000_000.0 + LIMIT
    assert part(progress) == PartHealth(well_until, well_until, "the end of 1 messages that it has in hand")


def test_any_end_is_progress(clock: time_machine.Traveller) -> None:
    progress = Progress(30.0, 45.0)
    progress.message_came()
    for _ in range(10):
        clock.shift(LIMIT - 1)
        progress.message_ended(progress.message_came())
        assert part(progress).waits_for is None


def test_a_message_after_a_long_idle_time_has_its_time(clock: time_machine.Traveller) -> None:
    progress = Progress(30.0, 45.0)
    progress.message_ended(progress.message_came())
    clock.shift(10 * LIMIT)
    progress.message_came()

    assert part(progress).waits_for is None


def test_what_another_part_tells_does_not_count(clock: time_machine.Traveller) -> None:
    progress = Progress(30.0, 45.0)
    progress.message_came()
    for _ in range(100):
        clock.shift(10)
        assert part(progress, is_excused=True).waits_for is None
    clock.shift(LIMIT - 1)
    assert part(progress).waits_for is None
    clock.shift(2)
    assert part(progress).waits_for is not None


def test_a_restart_does_not_help_against_a_dependency(clock: time_machine.Traveller) -> None:
    progress = Progress(30.0, 45.0)
    progress.message_came()
    clock.shift(10 * LIMIT)

    assert part(progress, waits_for="database") == PartHealth(1_000_000.0 + LIMIT, 1_000_000.0 + 10 * LIMIT, "database")
