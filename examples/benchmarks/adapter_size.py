"""Sizes of SGRQ and LoRA adapters on all linear layers of models of known shape; no weights are made.

python examples/benchmarks/adapter_size.py
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_sgrq.selection.ratio import count_selected

BLOCK_SIZE = 64  # of bitsandbytes, by default
SHAPES = {
    "1B (Llama 3.2)": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8
    ),
    "8B (Llama 3.1)": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
    ),
    "70B (Llama 3.1)": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}


def linear_shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    """(out_features, in_features) of every linear layer but the output head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    return [(layer.out_features, layer.in_features) for layer in layers]


def main() -> None:
    print("| model | adapter | parameters | float32 | bfloat16 |\n|---|---|---|---|---|")
    for name, config in SHAPES.items():
        shapes = linear_shapes(config)
        rows = {
            f"SGRQ, ratio {ratio}": sum(
                rows * count_selected(ratio, columns // BLOCK_SIZE) for rows, columns in shapes
            )
            for ratio in (0.05, 0.1, 0.4, 1.0)
        }
        rows |= {f"LoRA, r={rank}": sum(rank * (rows + columns) for rows, columns in shapes) for rank in (8, 16)}
        for label, count in rows.items():
            print(f"| {name} | {label} | {count / 1e6:.1f} M | {count * 4 / 1e6:.0f} MB | {count * 2 / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
