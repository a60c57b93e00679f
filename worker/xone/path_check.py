"""Whether XONE_CONFIRM_PATH can be right: XONE's pages name two, and with the wrong one every offer fails for good."""

from collections.abc import Callable

from worker.errors import Refused, WrongPath, XoneError

SUSPICIOUS_STATUSES = frozenset({404, 405})
MAX_SUSPICIOUS = 3  # in a row: those before fail for good, as they would with the right path


class PathCheck:
    """Counts refusals that a wrong path would explain. Threads share it; a count that is one too low does no harm."""

    def __init__(self, has_ever_confirmed: Callable[[], bool]) -> None:
        """has_ever_confirmed: asked where the count is reached, until it is true."""
        self._has_ever_confirmed = has_ever_confirmed
        self._in_a_row = 0
        self._is_right = False

    def confirmed(self) -> None:
        """A call was answered with a booking: the path is right for as long as this process lives."""
        self._is_right = True

    def failed(self, error: XoneError) -> None:
        """A call failed. Raises WrongPath in its place where only a wrong path explains it."""
        if not isinstance(error, Refused) or error.http_status not in SUSPICIOUS_STATUSES:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._is_right or self._in_a_row < MAX_SUSPICIOUS:
            return
        self._is_right = self._has_ever_confirmed()
        if not self._is_right:
            raise WrongPath(
                "path",
                f"XONE answers nothing but {error.http_status}, and has never confirmed an offer here: "
                "check XONE_CONFIRM_PATH, which ends in /confirm on XONE's newer page",
                error.http_status,
            ) from None
