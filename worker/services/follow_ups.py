"""Follow-ups: looks at partners' lists of bookings while some of their bookings are pending."""

import structlog

from models.states import State
from tasks.follow_up import (
    DuePartner,
    FollowUpLost,
    ListLease,
    due_partners,
    interval_of,
    lease_list,
    pending_bookings,
    read_list,
    release_list,
    review_still_pending,
    youngest_age,
)
from worker.errors import XoneError
from worker.observability import metrics
from worker.runtime import Runtime
from worker.services.service import Service
from worker.storage.pause_cache import ALL
from worker.xone.circuit_breaker import CallsSuspended

log = structlog.get_logger(__name__)

IDLE = 10.0  # seconds between looks at what is due


class FollowUps(Service):
    """Runs beside the Scheduler, unless FOLLOW_UP_INTERVAL or XONE_BOOKINGS_PATH is empty. One list at a time."""

    name = "follow-ups"
    starts_work = True
    interval = IDLE

    def __init__(self, runtime: Runtime, interval: float, max_age: float) -> None:
        """interval, max_age: FOLLOW_UP_INTERVAL and FOLLOW_UP_MAX_AGE, in seconds."""
        super().__init__()
        self._runtime = runtime
        self._look_interval, self._max_age = interval, max_age
        self.interval = min(IDLE, interval / 4)

    def run_once(self) -> bool:
        """Reads the lists that are due. While calls are suspended, or only a probe may pass, none."""
        for due in self._due():
            calls = self._runtime.xone.calls
            if self._stopping.is_set() or calls.wait() > 0 or calls.is_half_open:
                break
            if calls.wait_for_lookup(due.partner_id) > 0:
                continue
            lease = lease_list(self._runtime, due.partner_id, due)
            if lease is not None:
                self._follow_up(lease)
                self.on_success()
        return False

    def _due(self) -> list[DuePartner]:
        with self._runtime.engine.begin() as connection:
            paused = self._runtime.pauses.partners(connection)
            due = due_partners(connection, self._look_interval)
        return [] if ALL in paused else [partner for partner in due if partner.partner_id not in paused]

    def _follow_up(self, lease: ListLease) -> None:
        """Reads one list. A list that can't be read is read again after an interval."""
        try:
            next_in = self._read(lease)
        except CallsSuspended:
            next_in = None
        except FollowUpLost:
            log.warning("follow_up_lost", partner_id=lease.partner_id)
            return
        except BaseException:
            release_list(lease, self._runtime, self._look_interval)  # what is wrong with one list holds up no other
            raise
        release_list(lease, self._runtime, next_in)

    def _read(self, lease: ListLease) -> float:
        runtime, partner_id = self._runtime, lease.partner_id
        with runtime.engine.begin() as connection:
            wanted = pending_bookings(connection, partner_id)
            youngest = youngest_age(connection, partner_id)
        try:
            states = (State.PENDING, State.CONFIRMED)
            look = read_list(runtime, lease, wanted, states, self._is_stopping, gets_behind=True)
        except XoneError as error:
            metrics.list_read("failed")
            log.warning("follow_up_failed", partner_id=partner_id, code=error.code, detail=error.detail)
        else:
            metrics.list_read("ok")
            for offer_id, change in look.changed:
                log.info(
                    "booking_changed",
                    partner_id=partner_id,
                    offer_id=offer_id,
                    state=change.state.value,
                    type=change.event_type.value,
                )
            log.info(
                "followed_up",
                partner_id=partner_id,
                pending=len(wanted) if wanted is not None else None,
                listed=len(look.listed),
                changed=len(look.changed),
            )
            if look.is_cut:
                return 0.0
        review_still_pending(runtime, lease, self._max_age)
        return interval_of(youngest, self._look_interval, runtime.dice())

    def _is_stopping(self) -> bool:
        """Called while a list is read, which may take long: shows that this service is well."""
        self.on_success()
        return self._stopping.is_set()
