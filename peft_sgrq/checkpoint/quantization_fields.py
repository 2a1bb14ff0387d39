"""Which fields of a `quantization_config` say how codes are read, and which only say how they were made.

transformers writes the config of a GPTQ, AWQ or AutoRound model anew when it saves: it adds its own defaults for the
quantizer and the name of the kernel, and leaves out what GPTQModel wrote beside. A field that is not known here counts
as one that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PACKED = ("gptq", "awq", "auto-round")
# What the quantizer was told, its version and its log; no loader reads codes by it.
_OF_THE_QUANTIZER = {
    "gptq": (
        "act_group_aware",
        "batch_size",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "max_input_length",
        "meta",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "mse",
        "pad_token_id",
        "quantizer",
        "static_groups",
        "tokenizer",
        "true_sequential",
    ),
    "auto-round": (
        "autoround_version",
        "batch_size",
        "enable_minmax_tuning",
        "enable_quanted_input",
        "gradient_accumulate_steps",
        "iters",
        "low_gpu_mem_usage",
        "lr",
        "minmax_lr",
        "nsamples",
        "seqlen",
    ),
    "compressed-tensors": ("version",),
}
_OF_THE_QUANTIZER["awq"] = _OF_THE_QUANTIZER["gptq"]
_OF_THE_KERNEL = ("backend", "disable_exllama", "exllama_config", "use_cuda_fp16", "use_exllama")
_WHEN_LEFT_OUT = {"desc_act": False, "is_marlin_format": False, "lm_head": False, "pack_dtype": "int32"}
_FORMAT_WHEN_LEFT_OUT = {"gptq": "gptq", "awq": "gemm"}


def reading_fields(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say how codes are read, in one form however they are spelled.

    Args:
        quantization (`Mapping[str, Any]`): A `quantization_config` as it stands in `config.json`.

    Returns:
        `dict[str, Any]`: Equal for two configs if, and only if, loaders read the same tensors in the same way. Values
            that are empty or `None` are left out; so are, in GPTQ, AWQ and AutoRound, the defaults of fields that some
            writers leave out.
    """
    method = str(quantization.get("quant_method", ""))
    fields = without_empty({key: item for key, item in quantization.items() if key not in _unread(quantization)})
    if method not in _PACKED:
        return fields
    # Patterns of layers: one with nothing beside it says something, too (GPTQModel leaves those layers out).
    fields |= {key: quantization[key] for key in ("dynamic", "extra_config") if quantization.get(key)}
    fields = {**_WHEN_LEFT_OUT, **fields}
    if method == "auto-round":
        return fields
    # One fact under several names; names that contradict each other stay two.
    names = ("format", "checkpoint_format", *(["version"] if method == "awq" else []))
    formats = {str(fields.pop(name)).lower() for name in names if name in fields} or {_FORMAT_WHEN_LEFT_OUT[method]}
    return {**fields, "method": fields.get("method", method), "format": sorted(formats)}


def _unread(quantization: Mapping[str, Any]) -> set[str]:
    """Names of the fields by which no codes are read."""
    method = str(quantization.get("quant_method", ""))
    unread = {*_OF_THE_QUANTIZER.get(method, ())}
    # Files of early versions of AutoRound name their packing in `backend`.
    if method in _PACKED and (method != "auto-round" or quantization.get("packing_format")):
        unread |= {*_OF_THE_KERNEL}
    if method == "awq" and "zero_point" in quantization:
        unread.add("sym")  # the same said again, by transformers as the default of GPTQ
    return unread


def without_empty(value: Any) -> Any:
    """A JSON value without fields that are `None` or empty, which transformers leaves out when it saves."""
    if isinstance(value, Mapping):
        items = ((key, without_empty(item)) for key, item in value.items())
        return {key: item for key, item in items if item not in (None, {}, [])}
    return [without_empty(item) for item in value] if isinstance(value, list) else value
