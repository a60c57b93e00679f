"""A parameter that is the code of an error."""

from difflib import get_close_matches
from typing import Any

import click

from models.states import ERROR_CODES
from worker.errors import is_code


class Code(click.ParamType[str]):
    """A code that a confirmation can have failed with: a misspelt one would match nothing, as if nothing had failed."""

    name = "code"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        if is_code(text):
            return text
        small = text.lower().replace("_", "-")
        close = [small] if is_code(small) else get_close_matches(small, (*ERROR_CODES, "http-422"), n=1)
        hint = f"did you mean {close[0]}?" if close else f"codes are http-NNN, {', '.join(sorted(ERROR_CODES))}"
        return self.fail(f"{text} is no code; {hint}", param, ctx)


CODE = Code()
