"""What the values of arguments are checked by while they are read, before anything is imported or loaded."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import TypeVar

from peft_sgrq.choices import CRITERIA, NAMED_RATIOS, check_budget, check_ratio

T = TypeVar("T")
_SIZE = re.compile(r"\d+(\.\d+)? *[KMGT]i?B", re.IGNORECASE)  # the rest of the check needs accelerate

CRITERION_NAMES = " or ".join([", ".join(CRITERIA[:-1]), CRITERIA[-1]])


def ratio(text: str) -> float | str:
    """A number in (0, 1], or the name of a ratio."""
    return _checked(number(text) if text not in NAMED_RATIOS else text, check_ratio)


def criterion(text: str) -> str:
    """The name of a criterion."""
    if text not in CRITERIA:  # a config may name a function of the user's; a command cannot have one
        raise argparse.ArgumentTypeError(f"{text!r}, expected one of {CRITERION_NAMES}")
    return text


def budget(text: str) -> float | int | str:
    """A share, a number of scales, or a size."""
    if _SIZE.fullmatch(text):
        return text
    try:
        return _checked(int(text), check_budget)
    except ValueError:
        return _checked(number(text), check_budget)


def bits(text: str) -> float | str:
    """Bits a weight, or a size."""
    if _SIZE.fullmatch(text):
        return text
    value = number(text)
    if isinstance(value, str) or not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f'{text!r}, expected a number of bits a weight, or a size such as "3GB"')
    return value


def number(text: str) -> float | str:
    """A number; what is none stays as it is, to be refused or to be a size."""
    try:
        return float(text)
    except ValueError:
        return text


def _checked(value: T, check: Callable[[object], None]) -> T:
    try:
        check(value)
    except (ValueError, TypeError) as error:
        found, _, expected = str(error).partition(", expected ")
        raise argparse.ArgumentTypeError(f"{found.partition(' is ')[2]}, expected {expected.rstrip('.')}") from None
    return value
