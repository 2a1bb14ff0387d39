"""Quantized checkpoints in every format that can be made here, and what the tests of merging on files do with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.bases import VOCABULARY, Base, byte_tokenizer, save_tiny_gpt2, save_tiny_llama
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_sgrq import SGRQConfig, restore_codes
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing
from peft_sgrq.layer.masks import pack_mask

BLOCK = 128


@dataclass(frozen=True)
class Format:
    """A format on the disk.

    Attributes:
        name (`str`): What the test is called.
        save (`Callable`): Makes the checkpoint, given the directory of a dense model and the one to make.
        source (`Callable`): Makes the dense model.
        needs (`str` or `None`): The optional package it needs.
        prepare (`Callable`): What is to be done with a loaded model before the adapter is added.
        config (`dict`): Settings of the adapter.
    """

    name: str
    save: Callable[[Path, Path], None]
    source: Callable[[Path], Path]
    needs: str | None = None
    prepare: Callable[[Any], Any] = disable_cpu_packing
    config: tuple[tuple[str, Any], ...] = ()

    def make(self, directory: Path) -> Path:
        """The checkpoint, made in a directory; skips where its package is absent."""
        if self.needs:
            pytest.importorskip(self.needs)
        dense = self.source(directory / "dense")
        self.save(dense, directory / "base")
        byte_tokenizer().save_pretrained(directory / "base")
        return directory / "base"

    def load(self, directory: Path) -> Any:
        """The model, in eval mode, ready for an adapter."""
        model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.prepare(model)
        return model

    def adapted(self, directory: Path, **config: Any) -> PeftModel:
        """The model with a new adapter, its deltas zero unless told."""
        settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "ratio": 0.5, **dict(self.config), **config}
        return get_peft_model(self.load(directory), SGRQConfig(**settings)).eval()


def save_wide_llama(directory: Path) -> Path:
    """Saves a random float32 Llama of one block, wide enough for groups and blocks of 128: hidden 256, inner 384."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _by_transformers(base: Base) -> Callable[[Path, Path], None]:
    return lambda dense, out: base.load(dense).save_pretrained(out)


def _by_compressed_tensors(scheme: str) -> Callable[[Path, Path], None]:
    """Rounding to nearest with the scales of compressed-tensors' own formulas, saved by its own compressor."""

    def save(dense: Path, out: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationConfig,
            apply_quantization_config,
            preset_name_to_scheme,
        )
        from compressed_tensors.quantization.utils import calculate_qparams

        model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
        groups = {"group_0": preset_name_to_scheme(scheme, ["Linear"])}
        apply_quantization_config(
            model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="frozen")
        )
        for module in model.modules():
            args = getattr(getattr(module, "quantization_scheme", None), "weights", None)
            if args is None:
                continue
            height, width = {
                "group": (1, args.group_size),
                "channel": (1, module.in_features),
                "tensor": (module.out_features, module.in_features),
                "block": args.block_structure,
            }[args.strategy]
            blocks = module.weight.data.unflatten(0, (-1, height)).unflatten(-1, (-1, width))
            scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
            module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
            module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)
            if hasattr(module, "input_scale"):
                module.input_scale.data.fill_(0.02)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(out)
        compressor.update_config(out)

    return save


def _as_fp8_blocks(dense: Path, out: Path) -> None:
    """DeepSeek's layout, made by hand: no loader of transformers quantizes to it without a GPU."""
    shutil.copytree(dense, out)
    tensors = {}
    for name, weight in load_file(dense / "model.safetensors").items():
        if "proj" not in name:
            tensors[name] = weight.to(torch.bfloat16)
            continue
        blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
        scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scales[:, None, :, None]).reshape(weight.shape)
        tensors |= {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    edit_config(out, dtype="bfloat16", quantization_config={**quantization, "modules_to_not_convert": ["lm_head"]})


FLOAT16 = Base("dense", False, torch.float16)
CT_SCHEMES = ("W4A16", "W8A16", "W3A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK")
FP8_BLOCKS = Format("fp8-blocks", _as_fp8_blocks, save_wide_llama, prepare=restore_codes)
NF4_NESTED_FILES = Format("nf4-nested", _by_transformers(Base("nf4", True, torch.bfloat16)), save_tiny_llama)
DENSE_FILES = Format("dense-float32", _by_transformers(Base("dense", False, torch.float32)), save_tiny_llama)
FORMATS = [
    *(
        Format(base.name, _by_transformers(base), save_tiny_llama)
        for base in (
            Base("nf4", False, torch.float32),
            Base("fp4", True, torch.float32),
            Base("int8", False, torch.bfloat16),
            Base("dense", False, torch.bfloat16),
        )
    ),
    NF4_NESTED_FILES,
    DENSE_FILES,
    # 64 columns in groups of 48: the last group of each row is partial
    Format("dense-partial", DENSE_FILES.save, save_tiny_llama, config=(("group_size", 48),)),
    Format("gpt2", DENSE_FILES.save, save_tiny_gpt2),
    Format("gpt2-nf4", _by_transformers(Base("nf4", False, torch.float32)), save_tiny_gpt2),
    *(
        Format(f"compressed-tensors-{scheme}", _by_compressed_tensors(scheme), save_wide_llama, "compressed_tensors")
        for scheme in CT_SCHEMES
    ),
    FP8_BLOCKS,
]


def edit_config(directory: Path, **fields: Any) -> None:
    """Sets fields of a checkpoint's `config.json`."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever files they are in."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def in_shards(directory: Path, out: Path, count: int = 3) -> Path:
    """The checkpoint with its tensors dealt to several files, a layer's codes and scales to different ones."""
    out.mkdir()
    for path in directory.iterdir():
        if path.name != "model.safetensors":
            shutil.copyfile(path, out / path.name)
    tensors = tensors_of(directory)
    names = [f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]
    where = {tensor: names[index % count] for index, tensor in enumerate(sorted(tensors))}
    for name in names:
        part = {tensor: tensors[tensor] for tensor in where if where[tensor] == name}
        save_file(part, out / name, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def write_adapter(directory: Path, deltas: dict[str, tuple[torch.Tensor, list[int], int]], **config: Any) -> Path:
    """An adapter made by hand: layer name -> its deltas, the groups they belong to, and how many groups there are."""
    directory.mkdir()
    tensors = {}
    for name, (values, groups, selectable) in deltas.items():
        prefix = f"base_model.model.{name}.sgrq_delta"
        tensors[f"{prefix}.weight"] = values
        tensors[f"{prefix}.selection"] = pack_mask(torch.tensor(groups), selectable)
    save_file(tensors, directory / "adapter_model.safetensors")
    SGRQConfig(target_modules=sorted(deltas), **config).save_pretrained(str(directory))
    return directory


def base_and_adapter(form: Format, root: Path, **config: Any) -> tuple[Path, Path]:
    """A base and an adapter with random deltas."""
    torch.manual_seed(0)
    base = form.make(root)
    form.adapted(base, init_weights=False, **config).save_pretrained(root / "adapter")
    return base, root / "adapter"


def snapshot(directory: Path) -> dict[str, bytes]:
    """All files below a directory, with what is in them."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edited(adapter: Path, out: Path, **fields: Any) -> Path:
    """A copy of an adapter with fields of its config changed."""
    shutil.copytree(adapter, out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return out
