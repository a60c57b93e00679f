"""How long to wait before the next try: exponential backoff, and full jitter.

    exponential(base, attempt, maximum) = min(maximum, base · 2^attempt)
    full_jitter(least, most, dice)      = least + dice · (most - least)         dice in [0, 1)

``exponential(2, attempt, 300)`` for attempts 0, 1, 2, … gives 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, … With full
jitter each delay is random between ``least`` and that, so callers that failed together do not come back together.

Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015. Its full jitter begins at 0.
"""

MAX_EXPONENT = 32  # beyond it, 2^attempt only overflows


def exponential(base: float, attempt: int, maximum: float) -> float:
    """Seconds to wait after ``attempt`` earlier tries: ``base`` doubled for each, at most ``maximum``."""
    return min(maximum, base * 2.0 ** min(attempt, MAX_EXPONENT))


def full_jitter(least: float, most: float, dice: float) -> float:
    """Seconds between ``least`` and ``most``. dice: in [0, 1)."""
    return least + dice * (most - least)
