"""The speed of long work on the database."""

import time
from collections.abc import Iterator
from typing import TypeVar

Step = TypeVar("Step")


def at_half_speed(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps. After each it sleeps as long as the step took, so that live work comes first."""
    started_at = time.monotonic()
    for step in steps:
        took = time.monotonic() - started_at
        yield step
        time.sleep(took)
        started_at = time.monotonic()
