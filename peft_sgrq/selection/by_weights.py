"""Selection without calibration: by the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from peft_sgrq.choices import WITHOUT_DATA
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.masks import encode_mask
from peft_sgrq.selection.criteria import weight_scores
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.saliency import Saliency

if TYPE_CHECKING:
    from peft_sgrq.config import SGRQConfig


def selects_everything(config: SGRQConfig) -> bool:
    """Whether a config selects all groups of every layer that its selection does not name."""
    return config.ratio == 1 and not config.ratio_pattern


def everything(scaled_weight: ScaledWeight) -> str:
    """The mask of all groups of a layer; only its shape is needed, which it has on the meta device, too."""
    return encode_mask(torch.arange(scaled_weight.selectable, device="cpu"), scaled_weight.selectable)


def select_without_data(scaled_weights: Mapping[str, ScaledWeight], config: SGRQConfig) -> dict[str, str]:
    """The selection a config asks for where no calibration made one: module name -> bit mask in hexadecimal.

    At a ratio of 1 that is everything, whatever the criterion. The config's criterion `None` means `"magnitude"`.

    Raises:
        ValueError: If the criterion or the ratio needs calibration.
    """
    if not scaled_weights:
        return {}
    if config.ratio == 0:  # zero points alone
        return {
            name: encode_mask(torch.empty(0, dtype=torch.int64), b.selectable) for name, b in scaled_weights.items()
        }
    if selects_everything(config):
        return {name: everything(scaled_weight) for name, scaled_weight in scaled_weights.items()}
    criterion = config.criterion or "magnitude"
    asked = "criterion" if criterion not in WITHOUT_DATA else "ratio" if config.ratio == "layerwise" else None
    if asked:
        raise ValueError(
            f"`{asked}` is {getattr(config, asked)!r}, which needs calibration, and the config has no selection for "
            f"{len(scaled_weights)} of the layers it targets (the first: {next(iter(scaled_weights))!r}), expected "
            'one for each; call `peft_sgrq.calibrate(model, config, data)` first, or use criterion="magnitude" with a '
            'number, "knee" or "global" as ratio, which need no data.'
        )
    layers = {
        name: LayerSaliency.of(scaled_weight, weight_scores(name, scaled_weight, criterion), fingerprint="")
        for name, scaled_weight in scaled_weights.items()
    }
    return Saliency(layers, criterion).selection_for(config)
