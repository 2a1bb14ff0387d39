"""How a base of each format is loaded, as Python code for error messages and model cards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft_sgrq.formats.bnb_4bit import weight as bnb_4bit
from peft_sgrq.formats.hqq import weight as hqq
from peft_sgrq.formats.int32_packed import autoround, awq, gptq
from peft_sgrq.formats.quanto import weight as quanto
from peft_sgrq.formats.torchao import weight as torchao

Load = Callable[..., str]  # renders `from_pretrained(...)` with further arguments

_CODE: dict[str, Callable[[Load, Mapping[str, Any]], str]] = {
    "bitsandbytes": bnb_4bit.loading_code,
    "hqq": hqq.loading_code,
    "quanto": quanto.loading_code,
    "torchao": torchao.loading_code,
}
# Formats whose kernel is chosen at loading, so that a quantized checkpoint, too, needs an argument.
_KERNEL_CODE: dict[str, Callable[[Load, Mapping[str, Any]], str]] = {
    "auto-round": autoround.loading_code,
    "awq": awq.loading_code,
    "gptq": gptq.loading_code,
}
_NAMES = {
    "autoround": "AutoRound",
    "awq": "AWQ",
    "bnb": "bitsandbytes",
    "ct": "compressed-tensors",
    "gptq": "GPTQ",
    "hqq": "HQQ",
}  # by the first word of a format's name


def kernel_is_chosen(quantization: Mapping[str, Any]) -> bool:
    """Whether loading a quantized checkpoint of this method needs an argument that chooses the kernel."""
    return quantization.get("quant_method") in _KERNEL_CODE


def loading_expression(load: Load, quantization: Mapping[str, Any] | None) -> str:
    """The Python code that loads a base and quantizes it as recorded.

    Args:
        load (`Callable`): Renders `from_pretrained(...)` with the arguments given as strings.
        quantization (`Mapping`): What `ScaledWeight.quantization` and the config of the model said.
    """
    method = str((quantization or {}).get("quant_method"))
    if quantization is not None and method in _KERNEL_CODE:
        return _KERNEL_CODE[method](load, quantization)
    code = _CODE.get(method)
    if quantization is None or quantization.get("pre_quantized") or code is None:
        return load()
    return code(load, quantization)


def spoken(name: str) -> str:
    """A format's name, as it stands in fingerprints, for a sentence."""
    kind, _, rest = name.partition("-")
    if kind == "dense":
        return f"not quantized (dense, group size {rest})"
    if kind == "fp8":
        return f"in fine-grained fp8 ({rest}; `peft_sgrq.restore_codes(model)` where transformers dequantized it)"
    return f"quantized with {_NAMES.get(kind, kind)} ({rest})"
