"""Steps of long work, with pauses between them."""

import time
from collections.abc import Iterator
from typing import TypeVar

Step = TypeVar("Step")


def with_pauses(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, each followed by a pause as long as it took: live work comes first."""
    begun = time.monotonic()
    for step in steps:
        took = time.monotonic() - begun
        yield step
        time.sleep(took)
        begun = time.monotonic()
