"""How a base is quantized again as an adapter's config records it, as Python code, and what its format is called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers

from peft_sgrq.formats.code import Code
from peft_sgrq.formats.registry import quantizing_code

# Formats whose kernel is chosen at loading, so that a quantized checkpoint, too, needs an argument; these are the
# kernels that can be trained through.
_KERNELS: dict[str, tuple[str, str, bool]] = {  # its config, the kernel, and whether the config needs the bits
    "auto-round": ("AutoRoundConfig", "torch", False),
    "awq": ("AwqConfig", "torch_awq", True),
    "gptq": ("GPTQConfig", "torch", True),
}
_NAMES = {
    "autoround": "AutoRound",
    "awq": "AWQ",
    "bnb": "bitsandbytes",
    "ct": "compressed-tensors",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "hqq": "HQQ",
}  # by the first word of a format's name


def kernel_arguments(quantization: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The config of transformers that loads a checkpoint's trainable kernel, and its arguments, if one does."""
    method = quantization.get("quant_method")
    found = _KERNELS.get(getattr(method, "value", method) or "")
    if found is None:
        return None
    name, kernel, needs_bits = found
    return name, {**({"bits": quantization.get("bits")} if needs_bits else {}), "backend": kernel}


def quantization_code(quantization: Mapping[str, Any]) -> Code:
    """The Python code that quantizes a base as recorded; empty where it is loaded as it is.

    Args:
        quantization (`Mapping`): What `ScaledWeight.quantization` and the config of the model said.
    """
    method = quantization.get("quant_method")
    method = str(getattr(method, "value", method))
    code = Code()
    kernel = kernel_arguments(quantization)
    if kernel is not None:
        name, values = kernel
        quoted = {key: f'"{value}"' if isinstance(value, str) else str(value) for key, value in values.items()}
        arguments = ", ".join(f"{key}={value}" for key, value in quoted.items())
        code = Code({"transformers": {name}}, f"{name}({arguments})")
    elif not quantization.get("pre_quantized"):
        after = quantizing_code(method)
        code = (after and after(quantization)) or _config_code(method, quantization)
    if method == "gguf":
        fields = "" if quantization.get("sub_blocks", True) else "sub_blocks=False"
        code = Code({"peft_sgrq": {"SGRQGgufConfig"}}, f"SGRQGgufConfig({fields})")
    if quantization.get("restored_codes"):
        code = code.then({"peft_sgrq": {"restore_codes"}}, "restore_codes(base)")
    if size := quantization.get("split_groups"):
        code = code.then({"peft_sgrq": {"split_groups"}}, f"split_groups(base, {size})")
    return code


def _config_code(method: str, quantization: Mapping[str, Any]) -> Code:
    """transformers' quantization config, with the fields that are not what they are by default."""
    if method == "torchao":
        given = set(inspect.signature(transformers.TorchAoConfig).parameters)
        fields = {key: value for key, value in quantization.items() if key in given and value}
        return Code({"transformers": {"TorchAoConfig"}}, f"TorchAoConfig.from_dict({fields!r})")
    cls: Any = {"bitsandbytes": transformers.BitsAndBytesConfig, "quanto": transformers.QuantoConfig}.get(method)
    if cls is None:
        return Code()
    known, default = list(inspect.signature(cls).parameters), cls().to_dict()
    set_keys = [key for key, value in quantization.items() if key in known and value != default.get(key)]
    set_keys.sort(key=lambda key: ("dtype" in key or "storage" in key, known.index(key)))  # dtypes are the details
    arguments = ", ".join(f"{key}={quantization[key]!r}" for key in set_keys)
    return Code({"transformers": {cls.__name__}}, f"{cls.__name__}({arguments})")


def spoken(name: str) -> str:
    """A format's name, as it stands in fingerprints, for a sentence."""
    kind, _, rest = name.partition("-")
    if kind == "dense":
        return f"not quantized (dense, group size {rest})"
    if kind == "fp8":
        return f"in fine-grained fp8 ({rest}; `peft_sgrq.restore_codes(model)` where transformers dequantized it)"
    return f"quantized with {_NAMES.get(kind, kind)} ({rest})"
