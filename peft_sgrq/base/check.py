"""Whether a model is the base an adapter was trained on, and the sentence that says so when it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_sgrq.base.loading import loading_code
from peft_sgrq.base.split import SPLIT, split_size
from peft_sgrq.base.workarounds.loading_attributes import FIELD
from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.loading import kernel_arguments, spoken
from peft_sgrq.formats.registry import is_quantized
from peft_sgrq.formats.scale_matrix import ScaleMatrix
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.base_layers import named_base_layers


def describe_quantization(model: nn.Module, scaled_weights: Mapping[str, ScaledWeight]) -> dict[str, Any] | None:
    """The quantization config of a base: the model's own if it has one, else put together from its layers.

    Returns:
        A dict of JSON values with `quant_method`, the `dtype` of the model, and `pre_quantized` if it was loaded from
        a quantized checkpoint; `None` if none of the layers is quantized.
    """
    found = next(
        (config for scaled_weight in scaled_weights.values() if (config := scaled_weight.quantization())), None
    )
    if found is None:
        return None
    own: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if own is not None:
        fields = own if isinstance(own, dict) else own.to_dict()
        found |= {
            key: value for key, value in fields.items() if _is_json(value) and key not in ("quant_method", FIELD)
        }
        # The layers tell the packing; the method, where it is another, is what the checkpoint is loaded by.
        method = getattr(fields.get("quant_method"), "value", fields.get("quant_method"))
        if kernel_arguments({"quant_method": method}) is not None:
            found["quant_method"] = method
    else:
        # Quantized by the library of the format itself, which has to be told what to leave alone.
        dense = [
            name
            for name, module in named_base_layers(model)
            if isinstance(module, nn.Linear) and not is_quantized(module)
        ]
        found |= {"modules_to_not_convert": dense} if dense else {}
    if size := getattr(model, SPLIT, None):
        found["split_groups"] = size
    if saved_by := next(
        (scaled_weight.saved_by for scaled_weight in scaled_weights.values() if scaled_weight.saved_by), None
    ):
        found["saved_by"] = saved_by
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype):
        found["dtype"] = str(dtype).removeprefix("torch.")
    if getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        found["pre_quantized"] = True
    return found


def check_base(config: SGRQConfig, fingerprints: Mapping[str, str], known: Mapping[str, ScaleMatrix]) -> None:
    """Compares the layers of a model with the fingerprints an adapter carries.

    Args:
        config (`SGRQConfig`): The adapter's config, with its `base_fingerprint`.
        fingerprints (`dict[str, str]`): Layer name -> fingerprint of the model, for the targeted layers that have
            their weights.
        known (`Mapping[str, ScaleMatrix]`): All targeted layers of the model, by name.

    Raises:
        ValueError: If a layer is missing, of another format, or has other codes or scales.
    """
    expected = config.base_fingerprint or {}
    missing = sorted(set(expected) - set(known))
    if missing:
        raise ValueError(
            f"The adapter changes {len(missing)} layers that this model does not have or does not target (the first: "
            f"{missing[0]!r}), expected all {len(expected)} of them; load it on the base it was trained on: "
            f"{loading_code(config).clause()}."
        )
    differing = [name for name in expected if expected[name] != fingerprints.get(name, expected[name])]
    if not differing:
        return
    name = differing[0]
    (old_format, old_codes, _), (new_format, new_codes, _) = (
        [*digest.split(":"), "", ""][:3] for digest in (expected[name], fingerprints[name])
    )
    mend = ""
    if old_format != new_format:
        if size := split_size(old_format, new_format):
            mend = (
                f" and, if its groups were split before training, split them: `peft_sgrq.split_groups(model, {size})`"
            )
        reason = f"layer {name!r} is {spoken(new_format)}, expected {spoken(old_format)}"
    elif old_codes != new_codes:
        reason = f"layer {name!r} has other weights than the one the adapter was trained on (or another dtype of them)"
    else:
        why = _other_nesting(config, known[name]) or (
            "the base has an adapter merged into it already, or was quantized on another device or from another dtype"
        )
        reason = f"layer {name!r} has the codes but not the scales the adapter was trained on: {why}"
    raise ValueError(
        f"The adapter does not fit this base: {reason} ({len(differing)} of {len(expected)} layers differ). Scale "
        f"changes mean nothing on other codes; load the base with {loading_code(config).clause()}{mend}. To use the "
        "adapter here all the same, set `config.base_fingerprint = None` on its SGRQConfig and pass that as `config=`."
    )


def _other_nesting(config: SGRQConfig, layer: ScaleMatrix) -> str | None:
    """How the scales of a layer are stored, if the adapter was trained on scales stored otherwise."""
    trained_on = (config.base_quantization or {}).get("bnb_4bit_use_double_quant")
    if layer.is_nested is None or trained_on is None or layer.is_nested == bool(trained_on):
        return None
    if layer.is_nested:
        return (
            "they are double-quantized here (bnb_4bit_use_double_quant=True), which rounds them, expected plain "
            "float32 ones"
        )
    return (
        "they are plain float32 here, expected double-quantized ones (bnb_4bit_use_double_quant=True); the base was "
        "quantized without that, or has an adapter merged into it already, which writes plain ones"
    )


def _is_json(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    return value is None or isinstance(value, (str, int, float, bool))
