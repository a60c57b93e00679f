"""Batches of messages to publish: bounded, so that a file or queue of any length fits in memory."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

MAX_MESSAGES = 500
MAX_BYTES = 8 * 1024 * 1024


class HasBody(Protocol):
    @property
    def body(self) -> bytes: ...


Item = TypeVar("Item", bound=HasBody)


def in_batches(
    items: Iterable[Item], max_messages: int = MAX_MESSAGES, max_bytes: int = MAX_BYTES
) -> Iterator[list[Item]]:
    """Yields lists of 1 to ``max_messages`` items. A batch ends with the body that brings it to ``max_bytes``."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.body)
        if len(batch) == max_messages or size >= max_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
