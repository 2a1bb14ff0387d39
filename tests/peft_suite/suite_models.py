"""The models that PEFT's own tests get: tiny local ones, in 4 bit with the base nf4."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

BASE = os.environ.get("SGRQ_SUITE_BASE", "dense")
MODELS = Path(os.environ.get("SGRQ_SUITE_MODELS", "models"))
WIDTH = 64  # the block size of nf4, which has to divide in_features


def quantized(**kwargs: Any) -> BitsAndBytesConfig:
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **kwargs}
    return BitsAndBytesConfig(**settings)


def local_models(base: str = BASE) -> dict[str, Path]:
    """Makes the decoder models, in 4 bit with the base nf4. Their names hold none that PEFT's tests know."""
    # PEFT's tests strip the eos token for padding, and feed the tokens 1 and 2, which must not be padding then.
    common = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 3}
    size = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    spread = {"initializer_range": 0.2}  # larger than usual, so that a change of scales shows in the outputs
    configs = {
        "tiny-lama": LlamaConfig(**common, **size, **spread, intermediate_size=128, num_key_value_heads=2),
        "tiny-qwen": Qwen2Config(**common, **size, **spread, intermediate_size=128, num_key_value_heads=2),
        "tiny-0pt": OPTConfig(**common, **size, init_std=0.2, ffn_dim=128, word_embed_proj_dim=WIDTH),
    }
    if base == "dense":  # its layers are Conv1D, which bitsandbytes quantizes the other way round
        configs["tiny-conv1d"] = GPT2Config(**common, **spread, n_embd=WIDTH, n_layer=2, n_head=2)
    paths = {name: MODELS / base / name for name in configs}
    for name, path in paths.items():
        if not path.is_dir():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(configs[name])
            model.save_pretrained(path)
            if base == "nf4":
                AutoModelForCausalLM.from_pretrained(path, quantization_config=quantized()).save_pretrained(path)
    return paths


class LocalModels(AutoModelForCausalLM):
    """Gives a local model for the name of one of the Hub."""

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, **kwargs: Any) -> Any:
        path = name if Path(name).is_dir() else local_models()["tiny-lama"]
        return AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)


def quantize_linears(model: nn.Module) -> nn.Module:
    """Turns the linear layers into 4-bit ones, those of a width that allows it, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.in_features % WIDTH == 0:
                has_bias = child.bias is not None
                layer = bnb.nn.Linear4bit(child.in_features, child.out_features, has_bias, torch.float32)
                layer.weight = bnb.nn.Params4bit(child.weight.detach(), requires_grad=False, quant_type="nf4")
                layer.bias = child.bias
                setattr(parent, name, layer.to("cpu"))
    return model


def replace_custom_models(module: types.ModuleType) -> None:
    """Gives the classes `MLP` and `DeepMLP` of PEFT's test module the base, under their names."""

    class MLP(module.MLP):  # type: ignore[name-defined]
        def __init__(self, bias: bool = True) -> None:
            super().__init__(bias=bias)
            self.lin0, self.lin1 = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, 32, bias=bias)
            quantize_linears(self)

        def forward(self, X: torch.Tensor) -> torch.Tensor:
            return super().forward(X.repeat(1, 7)[:, :WIDTH])

    class DeepMLP(module.DeepMLP):  # type: ignore[name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            torch.manual_seed(0)  # PEFT's tests load adapters into a model with other weights; SGRQ refuses that
            super().__init__(*args, **kwargs)
            if BASE == "nf4":
                quantize_linears(self)

    for cls in (MLP, DeepMLP) if BASE == "nf4" else (DeepMLP,):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__  # for pickle
        setattr(module, cls.__name__, cls)


class Loader:
    """What test_quantization.py calls a quantization method: a quantized model and what to expect of it."""

    supports_merge = True
    expected_layer_count = 4  # q_proj and v_proj in two blocks

    def __init__(self, name: str, config: BitsAndBytesConfig, backend_cls: type) -> None:
        self.name, self.config, self.backend_cls = name, config, backend_cls
        # Of random weights, fp4 alone already gives outputs that correlate by less than the test asks for.
        self.supports_non_quantized_comparison = name != "fp4"

    @property
    def model_id(self) -> str:
        return str(local_models("dense")["tiny-lama"])

    def load_model(self) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model_id, quantization_config=self.config)


LOADERS = (
    Loader("nf4", quantized(), Bnb4bitBackend),
    Loader("nf4-nested", quantized(bnb_4bit_use_double_quant=True), Bnb4bitBackend),
    Loader("fp4", quantized(bnb_4bit_quant_type="fp4"), Bnb4bitBackend),
    Loader("int8", BitsAndBytesConfig(load_in_8bit=True), Bnb8bitBackend),
)
