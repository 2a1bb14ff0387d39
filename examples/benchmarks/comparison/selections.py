"""Which groups a method selects, from the saliency it is based on."""

from __future__ import annotations

from comparison.methods import Method
from selection_bench import CONTROLS, select_control

from peft_sgrq.selection.saliency import Saliency


def criterion_of(method: Method) -> str:
    """What is to be calibrated: controls are made from `obs`."""
    return "obs" if method.criterion in CONTROLS else method.criterion


def choose(saliency: Saliency, method: Method, seed: int) -> dict[str, str]:
    """Layer -> mask of the groups a method selects.

    Args:
        saliency (`Saliency`): By the method's `criterion_of`.
        method (`Method`): One that selects.
        seed (`int`): Of random selections.
    """
    if method.criterion in CONTROLS:
        return select_control(saliency, method.criterion, float(method.ratio), seed)
    if method.everywhere:
        return saliency.select("global", budget=float(method.ratio))
    return saliency.select(method.ratio)
