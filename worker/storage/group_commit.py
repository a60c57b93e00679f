"""Group commit: what many threads want to store at the same time goes into one transaction.

A commit, and each statement in it, costs nearly as much for one row as for twenty. So the thread that comes first
stores for all that wait, while more gather for the next one. Whoever comes alone waits for nobody.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Generic, TypeVar

from worker.errors import ShuttingDown
from worker.observability import metrics

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_GROUP = 50  # in one group


class _Entry(Generic[Item, Result]):
    """What one thread wants to have stored."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.results: list[Result] = []  # the one, when it is stored
        self.error: BaseException | None = None
        self._asleep = Lock()
        self._asleep.acquire()

    @property
    def has_ended(self) -> bool:
        return bool(self.results) or self.error is not None

    def sleep(self) -> None:
        """Until it has ended, or is to lead the next group."""
        self._asleep.acquire()

    def wake(self) -> None:
        self._asleep.release()


class GroupCommit(Generic[Item, Result]):
    """Threads share it. ``store``: stores items in one transaction, all or none, and returns what came of each."""

    def __init__(self, store: Callable[[Sequence[Item]], Sequence[Result]]) -> None:
        self._store = store
        self._lock = Lock()
        self._waiting: list[_Entry[Item, Result]] = []
        self._is_led = False

    def store(self, item: Item) -> Result:
        """What came of an item, once it stands in the database. Raises what storing it alone raised."""
        ours: _Entry[Item, Result] = _Entry(item)
        with self._lock:
            self._waiting.append(ours)
            leads, self._is_led = not self._is_led, True
        if not leads:
            ours.sleep()
        if not ours.has_ended:
            self._lead(ours)
        if ours.error is not None:
            raise ours.error
        return ours.results[0]

    def _lead(self, ours: _Entry[Item, Result]) -> None:
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
                if entry is not ours:
                    entry.wake()

    def _store_group(self, group: Sequence[_Entry[Item, Result]]) -> None:
        try:
            for entry, result in zip(group, self._store([entry.item for entry in group]), strict=True):
                entry.results.append(result)
        except Exception as error:
            if len(group) == 1 or isinstance(error, ShuttingDown):
                for entry in group:
                    entry.error = error
            else:  # one of them is at fault, and only that one is to suffer
                for entry in group:
                    self._store_group([entry])
        except BaseException as error:
            for entry in group:
                entry.error = error
            raise
