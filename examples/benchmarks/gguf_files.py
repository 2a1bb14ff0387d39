"""GGUF files of a Llama: made from a checkpoint, with other weights, and LoRA adapters as llama.cpp reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from benchmarks.llama_cpp import quantize
from peft_sgrq.formats.gguf.blocks import BY_NAME
from peft_sgrq.formats.gguf.file import GGUFFile
from peft_sgrq.formats.gguf.layers import dequantized
from peft_sgrq.formats.gguf.names import find_places
from peft_sgrq.formats.gguf.writing import in_file_order, write_file

Types = Callable[[str, int], str | None]  # tensor name, number of blocks -> block type


def q4_k_m(name: str, blocks: int) -> str | None:
    """The types llama.cpp's quantizer gives a Q4_K_M file: half of the value and down projections in Q6_K."""
    if not name.startswith("blk."):
        return "Q6_K"
    block = int(name.split(".")[1])
    more_bits = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    return "Q6_K" if more_bits and ("attn_v" in name or "ffn_down" in name) else "Q4_K"


TYPES: dict[str, Types] = {
    "Q4_K_M": q4_k_m,
    **{name: lambda tensor, blocks, name=name: name if tensor.startswith("blk.") else "Q8_0" for name in BY_NAME},
}


def convert(folder: Path, out: Path, kind: str) -> Path:
    """Writes a Llama in Hugging Face format with a byte-level BPE tokenizer as a GGUF file.

    Args:
        folder (`Path`): The checkpoint, with `tokenizer.json`.
        out (`Path`): The file.
        kind (`str`): A name in `TYPES`.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name(folder.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {
        **tokenizer["model"]["vocab"],
        **{entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]},
    }
    special = {entry["content"] for entry in tokenizer["added_tokens"] if entry["special"]}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    for name, weight in _tensors(model).items():
        chosen = TYPES[kind](name, config.num_hidden_layers) if weight.ndim == 2 else None
        if chosen is None:
            writer.add_tensor(name, weight)
            continue
        block = BY_NAME[chosen]
        packed = quantize(block.id, weight, block.row_bytes(weight.shape[1]))
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType(block.id))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _tensors(model: Any) -> dict[str, np.ndarray]:
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    config, state = model.config, model.state_dict()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for name, parameter in get_gguf_hf_weights_map(model, TensorProcessor(), model_type="llama").items():
        if name == "output.weight" and config.tie_word_embeddings:
            continue
        weight = state[parameter].float().numpy()
        count = next((number for part, number in heads.items() if f".{part}.weight" in name), None)
        if count is not None:  # llama.cpp's converter interleaves the halves of each head
            weight = weight.reshape(count, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        tensors[name] = np.ascontiguousarray(weight)
    return tensors


def with_changes(base: Path, out: Path, model: Any, changes: Mapping[str, torch.Tensor], quantized: bool) -> Path:
    """A file whose matrices are those of the base, dequantized, plus a change.

    Args:
        base (`Path`): The file.
        out (`Path`): The file to make.
        model: Its model, for the names.
        changes (`Mapping[str, torch.Tensor]`): By layer name, float32 `[N, K]`.
        quantized (`bool`): Round to F16 and quantize again to the types they had, as `llama-quantize` would; else each
            is stored in F16, as `llama-export-lora` does it.
    """
    file = GGUFFile(base)
    places = find_places(file, model)
    made = {}
    for name, place in places.items():
        info, change = file.tensors[name], changes.get(place.parameter.removesuffix(".weight"))
        if info.kind is None or (change is None and quantized):
            continue
        weight = dequantized(info.kind, file.data(name), torch.float32)
        if change is not None:
            weight = weight + in_file_order(change, place.rows)
        weight = weight.half()
        if quantized:
            packed = quantize(info.kind.id, weight.float().numpy(), info.kind.row_bytes(info.shape[1]))
            made[name] = torch.from_numpy(packed)
        else:
            made[name] = weight
    if quantized:
        write_file(file, out, {name: lambda packed=packed: packed for name, packed in made.items()})
        return out
    reader = gguf.GGUFReader(base)
    writer = gguf.GGUFWriter(out, file.architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for name in file.tensors:
        writer.add_tensor(name, made[name].numpy() if name in made else file.numbers(name).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def write_lora(base: Path, out: Path, model: Any, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """A LoRA adapter as llama.cpp's `--lora` reads it.

    Args:
        base (`Path`): The file it is for.
        out (`Path`): The file to make.
        model: Its model, for the names.
        factors (`Mapping`): By layer name, `A` `[r, K]` and `B` `[N, r]`, the scaling in `B`.
    """
    file = GGUFFile(base)
    rank = len(next(iter(factors.values()))[0])
    writer = gguf.GGUFWriter(out, file.architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for name, place in find_places(file, model).items():
        pair = factors.get(place.parameter.removesuffix(".weight"))
        if pair is not None:
            writer.add_tensor(f"{name}.lora_a", pair[0].contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", in_file_order(pair[1], place.rows).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
