"""Arguments of the comparisons: learning rates by kind of method, and counts."""

from __future__ import annotations

from collections.abc import Collection


def parse_rate(option: str, text: str, kinds: Collection[str]) -> tuple[str, float]:
    """A kind of method and its learning rate, written as `lora=1e-4`.

    Args:
        option (`str`): What the text was given by, to begin the sentence with.
        text (`str`): KIND=RATE.
        kinds (`Collection[str]`): Those there are.

    Raises:
        ValueError: If there is no such kind, or the rate is no number above 0.
    """
    kind, _, rate = text.partition("=")
    try:
        if kind not in kinds or not float(rate) > 0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{option} has {text!r}, expected KIND=RATE with one of {tuple(kinds)} and a learning rate: lora=1e-4."
        ) from None
    return kind, float(rate)


def check_count(name: str, value: int) -> None:
    """Refuses a number that has to be at least 1, and is not."""
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1; leave it out for the default.")
