"""What a config is completed with when its adapter is injected: selection, fingerprint, and how the base is loaded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from peft_sgrq.base.check import check_base, describe_quantization
from peft_sgrq.choices import WITHOUT_DATA
from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.masks import decode_mask, encode_mask
from peft_sgrq.selection.criteria import weight_scores
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.saliency import Saliency


def complete_config(config: SGRQConfig, model: nn.Module, scaled_weights: Mapping[str, ScaledWeight]) -> None:
    """Checks a config against the layers it targets, and writes into it what it does not say.

    Args:
        config (`SGRQConfig`): The config.
        model (`nn.Module`): The model, nothing merged into its base.
        scaled_weights (`Mapping`): The targeted layers by name.

    Raises:
        ValueError: If the layers are not those of the base it names, or its selection does not fit them.
    """
    # Layers on the meta device have no weights to look at yet; all others are checked.
    present = {name: weight for name, weight in scaled_weights.items() if weight.device.type != "meta"}
    fingerprints = {name: weight.fingerprint() for name, weight in present.items()}
    if config.base_fingerprint is not None:
        check_base(config, fingerprints, known=scaled_weights)
    selection = dict(config.selection or {})
    known = scaled_weights if _selects_everything(config) else present
    missing = {name: weight for name, weight in known.items() if name not in selection}
    config.selection = selection | select_without_data(missing, config)
    _check_selection(config, scaled_weights)
    if _selects_everything(config):
        config.full_masks = {name: _everything(weight) for name, weight in scaled_weights.items()}
    if not present:
        return
    config.base_fingerprint = (config.base_fingerprint or {}) | fingerprints
    config.base_quantization = describe_quantization(model, scaled_weights)


def _check_selection(config: SGRQConfig, scaled_weights: Mapping[str, ScaledWeight]) -> None:
    selection = config.selection or {}
    unknown = sorted(set(selection) - set(scaled_weights))
    if unknown and scaled_weights:
        raise ValueError(
            f"`selection` names {len(unknown)} layers that the config does not target or the model does not have "
            f"(the first: {unknown[0]!r}), expected some of {sorted(scaled_weights)[:3]} and so on; take them "
            "out, or target them."
        )
    for name, scaled_weight in scaled_weights.items():
        if name not in selection:
            raise ValueError(
                f"Layer {name!r} has no weights yet (it is on the meta device), so its salient columns cannot be "
                "found; load the weights first, or give a config whose `selection` names the layer."
            )
        try:
            decode_mask(selection[name], scaled_weight.selectable, none=config.zero_points)
        except ValueError as error:
            raise ValueError(f"Layer {name!r} does not fit the adapter: {error}.") from None


def _selects_everything(config: SGRQConfig) -> bool:
    """Whether a config selects all groups of every layer that its selection does not name."""
    return config.ratio == 1 and not config.ratio_pattern


def _everything(scaled_weight: ScaledWeight) -> str:
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
    if _selects_everything(config):
        return {name: _everything(scaled_weight) for name, scaled_weight in scaled_weights.items()}
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
