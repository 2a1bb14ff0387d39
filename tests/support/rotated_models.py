"""Tiny models of many architectures to be rotated, with norms and biases moved so that a missing fusion shows."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr
from torch import nn

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROTATED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 172}),
    "mistral": ("Mistral", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", {"embedding_multiplier": 2.0, "residual_multiplier": 0.5}),
    "smollm3": ("SmolLM3", {}),
}
_OPT = {"ffn_dim": 128, "word_embed_proj_dim": 64}
_EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2", {"head_dim": 16}, "no norm or gate behind them"),
    "olmo2": ("Olmo2", {}, "no norm or gate behind them"),
    "glm4": ("Glm4", {"head_dim": 16}, "no norm or gate behind them"),
    "starcoder2": ("Starcoder2", {}, "takes the mean away"),
    "opt": ("OPT", _OPT, "takes the mean away"),
    "gpt2": ("GPT2", {}, "takes the mean away"),
    "qwen3 moe": ("Qwen3Moe", _EXPERTS, "several experts"),
    "mixtral": ("Mixtral", {"num_local_experts": 2}, "several experts"),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "is a Conv1d with the parameters"),
}


def random_model(kind: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random causal language model in eval mode."""
    torch.manual_seed(0)
    name, settings = (ROTATED.get(kind) or REFUSED[kind])[:2]
    made = getattr(tr, f"{name}Config")(**{**_COMMON, **settings, **config})
    model = tr.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
    return model.to(dtype)


def in_float64(model: nn.Module) -> Any:
    """The model in float64, with norms that are computed in it: transformers casts what they take to float32."""
    model.double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = _norm(module, "Gemma" in type(module).__name__)
    return model


def _norm(module: Any, offset: bool) -> Any:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * (offset + module.weight)

    return forward


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all tensors of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """That a model has the same tensors, bit for bit."""
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
