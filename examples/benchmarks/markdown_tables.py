"""Numbers and tables in Markdown, and where they go on a page."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev


def put_between(page: str, start: str, end: str, text: str) -> str:
    """The page with a text between two marks.

    Raises:
        ValueError: If the marks are not there.
    """
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(
            f"The page has no marks {start!r} and {end!r}, expected both; write them where the text belongs."
        )
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of cells, its head first."""
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def spell(values: Sequence[float | None], digits: int = 3, sign: str = "") -> str:
    """Mean and standard deviation; `None` is a loss that was not finite."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "diverged"
    if not numbers:
        return ""
    return f"{mean(numbers):{sign}.{digits}f}" + (f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")
