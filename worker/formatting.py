"""Numbers, times and texts for people and for JSON."""


def printable(text: str) -> str:
    """Without characters that a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
