"""Group commit: items that many threads store at the same time go into one transaction.

A commit, and each statement in it, costs nearly as much for one row as for twenty. So the first thread stores the items
of all that wait, while more gather for the next group. A lone caller commits at once.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

from worker.errors import ShuttingDown
from worker.observability import metrics

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_GROUP = 50  # items in one transaction


class _Entry(Generic[Item, Result]):
    """An item of one thread."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.results: list[Result] = []  # one, once it is stored
        self.error: BaseException | None = None
        self._asleep = Lock()
        self._asleep.acquire()

    @property
    def has_ended(self) -> bool:
        return bool(self.results) or self.error is not None

    def sleep(self) -> None:
        """Waits until this entry has ended, or must lead the next group."""
        self._asleep.acquire()

    def wake(self) -> None:
        self._asleep.release()


class GroupCommit(Generic[Item, Result]):
    """Stores items of many threads in groups. Threads share it."""

    def __init__(self, store: Callable[[Sequence[Item]], Sequence[Result]]) -> None:
        """store: stores items in one transaction, all or none, and returns a result for each, in their order."""
        self._store = store
        self._lock = Lock()
        self._waiting: list[_Entry[Item, Result]] = []
        self._is_led = False

    def store(self, item: Item) -> Result:
        """Returns the result of an item once it is committed. Raises what storing this item alone raised."""
        own: _Entry[Item, Result] = _Entry(item)
        with self._lock:
            self._waiting.append(own)
            leads, self._is_led = not self._is_led, True
        if not leads:
            own.sleep()
        if not own.has_ended:
            self._lead(own)
        if own.error is not None:
            raise own.error
        return own.results[0]

    def _lead(self, own: _Entry[Item, Result]) -> None:
        """Stores a group, and wakes its threads and the leader of the next one."""
        with self._lock:
            group, self._waiting = self._waiting[:MAX_GROUP], self._waiting[MAX_GROUP:]
        try:
            metrics.stored_together(len(group))
            self._store_group(group)
        finally:
            with self._lock:
                following = self._waiting[:1]
                self._is_led = bool(following)
            for entry in (*following, *group):
                if entry is not own:
                    entry.wake()

    def _store_group(self, group: Sequence[_Entry[Item, Result]]) -> None:
        try:
            for entry, result in zip(group, self._store([entry.item for entry in group]), strict=True):
                entry.results.append(result)
        except Exception as error:
            if len(group) == 1 or isinstance(error, ShuttingDown):
                for entry in group:
                    entry.error = error
            else:  # one item is at fault: the others are stored without it
                for entry in group:
                    self._store_group([entry])
        except BaseException as error:
            for entry in group:
                entry.error = error
            raise
