"""Numbers on the command line: finite, and within what the program and its database can hold."""

import math
from typing import Any

import click

MIN_RATE, MAX_RATE = 0.0001, 10_000.0  # a second: wider than anybody needs, and no clock overflows
MAX_COUNT = 2**31 - 1  # of an integer of the database


class Rate(click.FloatRange):
    """A number a second. Refuses ``nan``, which is in each range."""

    def __init__(self, minimum: float = MIN_RATE) -> None:
        super().__init__(min=minimum, max=MAX_RATE)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            is_number = not math.isnan(float(value))
        except ValueError:
            is_number = True  # the range says what is wrong
        if not is_number:
            self.fail(f"{value!r} is not a number", param, ctx)
        return float(super().convert(value, param, ctx))


COUNT_OR_ZERO = click.IntRange(min=0, max=MAX_COUNT)
COUNT = click.IntRange(min=1, max=MAX_COUNT)
