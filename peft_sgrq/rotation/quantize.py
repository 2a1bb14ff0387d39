"""`quantize`: a dense model as a compressed-tensors checkpoint, rounded to nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from peft_sgrq.formats.compressed_tensors.weight import keep_compressed
from peft_sgrq.rotation.bit_plan import BitPlan
from peft_sgrq.rotation.refused import refuse_model
from peft_sgrq.rotation.rounding import weight_scales
from peft_sgrq.rotation.scheme import FULL, WIDTHS, Scheme, parse_scheme, require_compressed_tensors
from peft_sgrq.rotation.snapshot import restored_on_failure


def quantize(
    model: nn.Module,
    scheme: str | BitPlan = "W4A16",
    *,
    group_size: int = 64,
    symmetric: bool = True,
    ignore: Sequence[str] = (),
) -> nn.Module:
    """Quantizes a dense model in place to integers of few bits, as compressed-tensors stores them.

    Weights are rounded to nearest, each scale clipped where the squared error of its group is least, and packed.
    Activations and the KV cache are rounded when the model runs, by scales of their own: one a token for the inputs of
    linear layers, one a token and head for keys and values. Embeddings, and heads outside of the blocks, stay. The
    result is trained, merged and saved as any model of that format: `save_pretrained` writes a checkpoint that plain
    transformers loads. Better codes than the nearest come from AutoRound or GPTQModel.

    The model stays packed: each layer unpacks its weight when it computes, so that it can be saved after it was used.
    What transformers loads is unpacked at its first forward pass, and is faster from then on.

    With rounded activations a model's outputs depend on the shapes of its inputs, as sums in another order round to
    other codes: a step of decoding differs from the same position in a longer input. That is so in the base, too.

    Args:
        model (`nn.Module`): A dense model, in the dtype its scales are to have. It may have been rotated.
        scheme (`str` or `BitPlan`): Bits of weights, activations and cache: "W4A16", "W4A8KV8", "W4A4KV8", "W4A4KV4"
            or other widths from 2 to 8; or what [`allocate_bits`] found, for weights alone.
        group_size (`int`): Columns of a weight that share a scale. A layer whose columns are no multiple of it gets
            one scale a row. A plan has its own.
        symmetric (`bool`): Codes of activations and cache around zero. With `False` they get zero points, which costs
            less error at 4 bits, and which vLLM does not run. Those of weights always are around zero.
        ignore (`Sequence[str]`): Names of linear layers to leave as they are.

    Returns:
        `nn.Module`: The same model.

    Raises:
        ValueError: If the model is quantized, has adapters or experts, a layer that is named is not there, or the
            size of its heads cannot be found. The model is as it was then, and after an interrupt.
        TypeError: If an argument has the wrong type.
        ImportError: If compressed-tensors is missing.

    Example:
        ```py
        >>> peft_sgrq.quantize(model, "W4A8KV8").save_pretrained("w4a8kv8")
        ```
    """
    require_compressed_tensors()
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import apply_quantization_config

    bits, widths = _widths(scheme, group_size, symmetric)
    layers = quantizable_layers(model, ignore)
    if widths is None:
        widths = dict.fromkeys(layers, bits.weights)
    elif set(widths) != set(layers):
        wrong = sorted(set(widths) ^ set(layers))[0]
        raise ValueError(
            f"The plan and the model differ in {wrong}, expected the same linear layers; allocate bits on this model."
        )
    by_row = {name for name, layer in layers.items() if bits.by_row(layer.in_features)}
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    config = bits.config(widths, by_row, others, _head_dim(model) if bits.cache < FULL else None)
    rounded = {
        name: weight_scales(layer.weight.detach(), bits.weight_args(widths[name], name in by_row))
        for name, layer in layers.items()
    }
    with restored_on_failure(model, overwritten=False):  # weights are replaced, the scales were computed before
        apply_quantization_config(model, config, show_progress=False)
        for name, layer in layers.items():
            scales, zeros = rounded.pop(name)
            layer.weight_scale.data.copy_(scales)  # type: ignore[operator]
            if hasattr(layer, "weight_zero_point"):
                layer.weight_zero_point.data.copy_(zeros)  # type: ignore[operator]
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        _declare(model, compressor.quantization_config)
        keep_compressed(model)  # else its first forward pass would leave no codes to be saved
        model.requires_grad_(False)
    return model


def quantizable_layers(model: nn.Module, ignore: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers that are to be quantized, by name: those of the blocks, but for those ignored.

    Raises:
        ValueError: If there is none, one is not finite, or the model is quantized, lost its online rotations, or has
            an adapter or experts.
    """
    refuse_model(model, "quantize")
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(ignore, str):
        raise TypeError(
            f"`ignore` is the string {ignore!r}, expected names of linear layers in a list; put it in one."
        )
    unknown = sorted(set(ignore) - set(linears))
    if unknown:
        raise ValueError(
            f"`ignore` has {unknown[0]!r}, expected names of linear layers such as {next(iter(linears))!r}."
        )
    stacks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layers = {
        name: module
        for name, module in linears.items()
        if module is not head and name not in ignore and (not stacks or name.startswith(tuple(stacks)))
    }
    if not layers:
        raise ValueError(
            "The model has no linear layers to quantize, expected some; another tool may know its layers."
        )
    broken = next((name for name, layer in layers.items() if not bool(layer.weight.isfinite().all())), None)
    if broken is not None:
        raise ValueError(f"{broken} has NaN or infinite weights, expected finite ones; load the model anew.")
    return layers


def _widths(scheme: Any, group_size: int, symmetric: bool) -> tuple[Scheme, Mapping[str, int] | None]:
    if isinstance(scheme, BitPlan):  # which says all
        wrong = next((name for name, width in scheme.layers.items() if width not in WIDTHS), None)
        if wrong is not None:
            raise ValueError(
                f"The plan gives {wrong} {scheme.layers[wrong]!r} bits, expected {WIDTHS[0]} to {WIDTHS[-1]}; correct "
                "it, or allocate bits anew."
            )
        return parse_scheme(f"W{max(scheme.layers.values())}A{FULL}", scheme.group_size), scheme.layers
    return parse_scheme(scheme, group_size, symmetric), None


def _head_dim(model: Any) -> int:
    from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module

    sizes = {getattr(module, "head_dim", None) for module in model.modules() if is_cached_attention_module(module)}
    if len(sizes) != 1 or not isinstance(size := next(iter(sizes)), int):
        raise ValueError(
            f"The attention modules have heads of the sizes {sorted(map(str, sizes))}, expected one for all; choose a "
            "scheme without KV."
        )
    return size


def _declare(model: Any, config: Any) -> None:
    """Has the model say what it is, as one that transformers loaded: it is saved with its quantization config."""
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils.quantization_config import CompressedTensorsConfig

    fields = config.model_dump(mode="json", exclude={"quant_method"})
    # Where queries are rotated it takes attention for a layer, whose queries are rounded; the cache stands by itself.
    fields["config_groups"] = {
        name: group for name, group in fields["config_groups"].items() if group["weights"] is not None
    }
    quantizer = AutoHfQuantizer.from_config(CompressedTensorsConfig(**fields), pre_quantized=True)
    quantizer.validate_environment()  # sets what its `is_trainable` asks
    if getattr(model, "config", None) is not None:
        model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
