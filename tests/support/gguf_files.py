"""Tiny GGUF files of random models, made as llama.cpp's converter makes them, and quantized by ggml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ggml
from support.bases import CHAT_TEMPLATE, byte_tokenizer

from peft_sgrq.formats.gguf.blocks import BY_NAME

HIDDEN, INTERMEDIATE = 256, 512
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
# transformers' model type -> llama.cpp's architecture, what its config needs beside sizes, and further metadata.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "llama": ("llama", {}, {"rope.dimension_count": 64}),
    "mistral": ("llama", {"head_dim": 64}, {"rope.dimension_count": 64}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 128}, {}),
    "gemma2": ("gemma2", {"head_dim": 64}, {"attention.key_length": 64, "attention.sliding_window": 64}),
    "gemma3_text": ("gemma3", {"head_dim": 64}, {"attention.key_length": 64, "attention.sliding_window": 64}),
    "phi3": ("phi3", {"pad_token_id": 0}, {"rope.dimension_count": 64}),
}
Types = Callable[[str], str | None]  # tensor name -> the name of its block type, or None for float32


def q4_0(name: str) -> str | None:
    """The types of a plain file: the embedding in Q8_0, all other matrices in Q4_0."""
    return "Q8_0" if name == "token_embd.weight" else "Q4_0"


def mixed(name: str) -> str | None:
    """The types of a Q4_K_M file: some matrices in Q6_K, and one that stays in half precision."""
    if name.endswith("attn_output.weight"):
        return "F16"
    return "Q6_K" if name.endswith(("attn_v.weight", "ffn_down.weight", "output.weight")) else "Q4_K"


def tiny_model(model_type: str, tied: bool = False, seed: int = 0, blocks: int = 1) -> Any:
    """A random float32 model, small, wide enough for super-blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    _, settings, _ = ARCHITECTURES[model_type]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokens()),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=blocks,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
        **_HEADS,
        **settings,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokens() -> list[str]:
    """A byte-level vocabulary with two merges."""
    vocabulary = byte_tokenizer().get_vocab()
    return [*sorted(vocabulary, key=lambda token: vocabulary[token]), "th", "the"]


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """The tensors of a model as llama.cpp's converter writes them."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    config = model.config
    architecture, _, _ = ARCHITECTURES[config.model_type]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor, model_type=architecture)
    state = model.state_dict()
    found = {}
    for name, parameter in names.items():
        value = state[parameter].float().numpy()
        if name == "output.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and ".attn_q.weight" in name:
            value = _permuted(value, config.num_attention_heads)
        if architecture == "llama" and ".attn_k.weight" in name:
            value = _permuted(value, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        found[name] = value
    return found


def write_gguf(
    path: Path,
    model: Any,
    types: Types = q4_0,
    *,
    name: str = "tiny",
    pre: str = "qwen2",
    extra: Mapping[str, np.ndarray] | None = None,
    vocabulary: list[str] | None = None,
) -> Path:
    """Writes a model as a GGUF file.

    Args:
        path (`Path`): The file.
        model: What `tiny_model` made.
        types (`Callable`): The type of each matrix.
        name (`str`): Its `general.name`.
        pre (`str`): Its `tokenizer.ggml.pre`.
        extra (`Mapping`): Further float32 tensors.
        vocabulary (`list[str]` or `None`): Other tokens.
    """
    gguf = pytest.importorskip("gguf")
    architecture, _, further = ARCHITECTURES[model.config.model_type]
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    numbers = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        **further,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    listed = vocabulary or tokens()
    writer.add_token_list(listed)
    writer.add_token_types([3 if token in ("<s>", "</s>", "<pad>") else 1 for token in listed])
    writer.add_token_merges(["t h", "th e"])
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    for key, value in {**tensors_of(model), **(extra or {})}.items():
        kind = types(key) if value.ndim == 2 else None
        if kind is None:
            writer.add_tensor(key, np.ascontiguousarray(value, np.float32))
        elif kind == "F16":
            writer.add_tensor(key, np.ascontiguousarray(value, np.float16))
        else:
            packed = ggml.some_blocks(BY_NAME[kind], value)
            writer.add_tensor(key, packed, raw_dtype=gguf.GGMLQuantizationType(BY_NAME[kind].id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
