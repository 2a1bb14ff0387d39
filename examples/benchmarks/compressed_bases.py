"""Bases that are read from a checkpoint: compressed-tensors and block fp8, quantized by rounding to nearest.

transformers turns both into dense weights before LoRA can be merged (compressed-tensors at the first forward pass,
fp8 on a CPU while loading), so PEFT merges into dense weights. To have the format again they are quantized anew, by
the format's own formulas and its own compressor; what comes out of that is what the merged LoRA is measured by.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from bases import base
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

BLOCK = [128, 128]


def _quantized_alike(model: Any, layer: Any) -> torch.Tensor:
    """The dense weight of a layer after compressing it anew by its scheme, scales from its extremes: `[N, K]`."""
    from compressed_tensors.compressors import BaseCompressor

    scheme, weight = layer.quantization_scheme, layer.weight.data
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    scale, zero = _scales_of(weight, scheme.weights)
    state = {"weight": weight, "weight_scale": scale}
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = zero
    return compressor.decompress(compressor.compress(state, scheme), scheme)["weight"].to(weight.dtype)


def _scales_of(weight: torch.Tensor, args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points as compressed-tensors computes them from the extremes of each group, row or block."""
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, columns = weight.shape
    height, width = {
        "group": (1, args.group_size),
        "channel": (1, columns),
        "tensor": (rows, columns),
        "block": args.block_structure,
    }[args.strategy]
    blocks = weight.unflatten(0, (-1, height)).unflatten(-1, (-1, width))
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    return scale.to(weight.dtype), zero


def _from_scheme(scheme: str) -> Any:
    def load(model: str, dtype: torch.dtype) -> nn.Module:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            apply_quantization_config,
            preset_name_to_scheme,
        )

        dense = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
        apply_quantization_config(
            dense, QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="frozen")
        )
        for layer in dense.modules():
            args = getattr(getattr(layer, "quantization_scheme", None), "weights", None)
            if args is not None:
                scale, zero = _scales_of(layer.weight.data, args)
                layer.weight_scale.data = scale.reshape(layer.weight_scale.shape)
                layer.weight_zero_point.data = zero.reshape(layer.weight_zero_point.shape)
        compressor = ModelCompressor.from_pretrained_model(dense)
        compressor.compress_model(dense)
        with tempfile.TemporaryDirectory() as directory:
            dense.save_pretrained(directory)
            compressor.update_config(directory)
            return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()

    return load


for _scheme in ("W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"):
    base(f"ct-{_scheme}", "compressed_tensors", _quantized_alike)(_from_scheme(_scheme))


def _fp8_quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block scales as transformers quantizes a matrix when it saves one."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(weight_block_size=BLOCK))
    made = Fp8Quantize(quantizer).convert({"layer.weight": weight})
    return made["layer.weight"], made["layer.weight_scale_inv"]


def _fp8_again(model: Any, layer: Any) -> torch.Tensor:
    from peft_sgrq.formats.fp8_blocks.weight import dequantize_blocks

    codes, scales = _fp8_quantize(layer.weight.data)
    return dequantize_blocks(codes, scales, BLOCK).to(layer.weight.dtype)


@base("fp8-128x128", "transformers", _fp8_again)
def _fp8_blocks(model: str, dtype: torch.dtype) -> nn.Module:
    from peft_sgrq import restore_codes

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    with tempfile.TemporaryDirectory() as directory:
        dense.save_pretrained(directory)
        tensors = {}
        tied = {"lm_head.weight"} if dense.config.tie_word_embeddings else set()
        for name, tensor in dense.state_dict().items():
            if name in tied:
                continue
            tensors[name] = tensor
            if name.endswith("_proj.weight"):
                tensors[name], tensors[f"{name}_scale_inv"] = _fp8_quantize(tensor)
        save_file(tensors, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        config = Path(directory) / "config.json"
        quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
        quantization["modules_to_not_convert"] = ["lm_head"]
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantization}))
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
        restore_codes(loaded)
        return loaded
