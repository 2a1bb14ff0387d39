"""Finer groups: the same quantized model with more scales, for an adapter to train."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from peft_sgrq.base.prepare import prepare_base, writing_scales
from peft_sgrq.base.trainable_kernels import use_trainable_kernels
from peft_sgrq.base.workarounds.loading_attributes import quantization_configs
from peft_sgrq.formats.registry import is_quantized, resolve_weight
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.base_layers import refuse_adapters

SPLIT = "_sgrq_split_groups"  # attribute of a split model: its group size, until it is loaded from a file of its own
SPLITTABLE = "bitsandbytes nf4 and fp4, GPTQ, AWQ, AutoRound, and HQQ with axis=1"

_SPLITTABLE_NAME = re.compile(r"(bnb-(?:nf4|fp4)-|(?:gptq|awq|autoround)-w\d+g|hqq-[\d.]+bit-axis1-)(\d+)")
_OVERRIDES = ("dynamic", "extra_config")  # where GPTQModel and AutoRound keep what single layers have otherwise

Model = TypeVar("Model", bound=nn.Module)


def split_groups(model: Model, group_size: int) -> Model:
    """Gives every quantized layer of a model smaller groups, in place, for more scales to train.

    Codes stay, and each scale and zero point is repeated for the parts of its group, so the model computes the same,
    bit for bit. It is an ordinary checkpoint of its format: saved, it is the new base, and adapters belong to it, not
    to the model before. For bitsandbytes nf4 and fp4 (double-quantized scales become float32), GPTQ, AWQ, AutoRound,
    and HQQ with `axis=1`. Layers that are not quantized and those that have that size already are left alone.

    Args:
        model (`nn.Module`): A quantized model without an adapter.
        group_size (`int`): Columns per scale to have, a divisor of what the layers have. bitsandbytes computes with
            32 or more, GPTQModel with 16, 32, 64, 128, ... Of GPTQ and AutoRound servers take 32 or more, which a
            warning says.

    Returns:
        `nn.Module`: The same model.

    Raises:
        TypeError: If the group size is no integer.
        ValueError: If it is not positive, the model has an adapter or no quantized layer, or a layer cannot be split
            in that way. The model was not changed then.

    Example:
        ```python
        model = AutoModelForCausalLM.from_pretrained("unsloth/Llama-3.2-1B-Instruct-bnb-4bit")
        model = peft_sgrq.split_groups(model, 32)
        model.save_pretrained("llama-nf4-32")  # the base that the adapter will belong to
        model = get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM"))
        ```
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"group_size is {group_size!r}, expected an integer; pass the columns per scale, such as 32.")
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}, expected at least 1; pass the columns per scale, such as 32.")
    refuse_adapters(model, "split its groups")
    use_trainable_kernels(model)
    scaled_weights = {
        name: _scaled_weight(name, module, group_size)
        for name, module in model.named_modules()
        if is_quantized(module)
    }
    if not scaled_weights:
        raise ValueError(
            f"The model has no quantized layer, expected layers of a format that can be split ({SPLITTABLE}); load it "
            "quantized."
        )
    configs = quantization_configs(model)
    for config in configs:
        _refuse_overrides(config)

    prepare_base(model)
    with writing_scales(model, "Splitting groups"):
        for scaled_weight in scaled_weights.values():
            if scaled_weight.group_size != group_size:
                scaled_weight.split(group_size)
        for config in configs:
            _set_group_size(config, group_size)
    _warn_of_servers(list(scaled_weights.values()), group_size)
    setattr(model, SPLIT, group_size)
    return model


def split_size(wanted: str, found: str) -> int | None:
    """The group size by which a layer of one format would become one of another.

    Args:
        wanted, found (`str`): Formats as they stand in fingerprints, e.g. `"bnb-nf4-32"` and `"bnb-nf4-64"`.

    Returns:
        `int` or `None`: What to pass to `split_groups`, e.g. 32; `None` if splitting does not lead there.
    """
    small, large = _SPLITTABLE_NAME.fullmatch(wanted), _SPLITTABLE_NAME.fullmatch(found)
    if small is None or large is None or small[1] != large[1]:
        return None
    size = int(small[2])
    return size if size < int(large[2]) and int(large[2]) % size == 0 else None


def _scaled_weight(name: str, module: nn.Module, group_size: int) -> ScaledWeight:
    """The scaled weight of a layer that can be split; a ValueError that names the layer if it cannot."""
    try:
        scaled_weight = resolve_weight(module, group_size)
        obstacle = _obstacle(scaled_weight, group_size)
    except ValueError as error:
        obstacle = str(error)
    if obstacle:
        raise ValueError(f"Layer {name!r} cannot be split: {obstacle}. The model was not changed.")
    return scaled_weight


def _obstacle(scaled_weight: ScaledWeight, group_size: int) -> str | None:
    if not scaled_weight.splittable:
        return (
            f"its format is {scaled_weight.name}, expected one of those that can be split ({SPLITTABLE}); quantize "
            "the model in one of them, or in smaller groups"
        )
    if scaled_weight.device.type == "meta":
        return "it has no weights yet (it is on the meta device), expected weights; load the model onto a device"
    if scaled_weight.group_size % group_size:
        return (
            f"its group size is {scaled_weight.group_size}, expected a multiple of {group_size}; pass a divisor of "
            f"{scaled_weight.group_size}"
        )
    return None if scaled_weight.group_size == group_size else scaled_weight.split_obstacle(group_size)


def _warn_of_servers(scaled_weights: list[ScaledWeight], group_size: int) -> None:
    smallest, name = max((scaled_weight.smallest_served, scaled_weight.name) for scaled_weight in scaled_weights)
    if group_size < smallest:
        warnings.warn(
            f"Groups of {group_size} can be trained, merged and loaded by transformers, but no server takes them in "
            f"this format ({name}): vLLM's kernels start at {smallest}. Pass that where the model is to be served."
        )


# what the model says of itself


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a quantization config, to be read and written."""
    return config if isinstance(config, dict) else vars(config)


def _refuse_overrides(config: Any) -> None:
    for field in _OVERRIDES:
        if any("group_size" in own for own in _dicts(_fields(config).get(field))):
            raise ValueError(
                f"The quantization config gives single layers a group size of their own in `{field}`, expected one "
                "group size for all layers; quantize the model without it. The model was not changed."
            )


def _set_group_size(config: Any, group_size: int) -> None:
    fields = _fields(config)
    # HQQ's stands deeper, once or for each kind of layer.
    deeper = [own["weight_quant_params"] for own in _dicts(fields) if "weight_quant_params" in own]
    for own in (fields, *deeper):
        if own and "group_size" in own:
            own["group_size"] = group_size


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    """A dict and all that are in it."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _dicts(item)
