"""How long a training step through a packed GGUF layer takes, over the bare layer and over LoRA on a dense one.

    python examples/benchmarks/gguf_steps.py --out docs/results/gguf-steps.json

A step is a forward and a backward pass, the gradient of the input included, by CPU time on CPUs. LoRA with r=16 is
measured on a dense layer in the dtype of the input. `gguf_report.py` makes Markdown of the file. Needs
`pip install xllamacpp`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.llama_cpp import quantize
from benchmarks.measure import clock, in_turn
from benchmarks.results_file import machine, replace_text
from peft_sgrq import SGRQConfig
from peft_sgrq.formats.gguf.blocks import BY_NAME
from peft_sgrq.formats.gguf.layers import GGUFLinear

METHODS: dict[str, dict[str, Any]] = {
    "scales": {"ratio": 1.0},
    "zero points": {"ratio": 0, "zero_points": True},
    "both": {"ratio": 1.0, "zero_points": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--types", nargs="+", default=["Q4_1", "Q4_K"], choices=list(BY_NAME))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for kind in args.types:
        for dtype in args.dtypes:
            times = measure(kind, getattr(torch, dtype), args.width, args.tokens, args.repeats)
            rows.append({"type": kind, "dtype": dtype, "milliseconds": times})
            print(json.dumps(rows[-1]), flush=True)
    settings = {"width": args.width, "tokens": args.tokens, "repeats": args.repeats}
    found = {"settings": settings, "machine": machine(), "versions": {"torch": torch.__version__}, "rows": rows}
    if args.out:
        replace_text(args.out, json.dumps(found, indent=1) + "\n")


def measure(kind: str, dtype: torch.dtype, width: int, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a step, the median, by method."""
    block = BY_NAME[kind]
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32) / width**0.5
    packed = torch.from_numpy(quantize(block.id, weight, block.row_bytes(width)))
    dense = nn.Linear(width, width, bias=False, dtype=dtype).requires_grad_(False)
    models: dict[str, nn.Module] = {"base": nn.Sequential(_layer(block.id, width, packed)), "dense": dense}
    for name, settings in METHODS.items():
        config = SGRQConfig(target_modules=["0"], **settings)
        models[name] = get_peft_model(nn.Sequential(_layer(block.id, width, packed)), config).train()  # type: ignore
    twin = nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype))
    models["lora"] = get_peft_model(twin, LoraConfig(r=16, target_modules=["0"])).train()  # type: ignore[arg-type]
    torch.manual_seed(0)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, width, dtype=dtype)
    found = in_turn({name: _step(model, x, dy) for name, model in models.items()}, repeats)
    return {name: round(1e3 * values["seconds"]["median"], 2) for name, values in found.items()}


def _layer(ggml_type: int, width: int, packed: torch.Tensor) -> GGUFLinear:
    layer = GGUFLinear(width, width, ggml_type)
    layer.packed.data = packed.clone()
    return layer


def _step(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], dict[str, float]]:
    now = clock(x.device)

    def step() -> dict[str, float]:
        x.grad = None
        model.zero_grad(set_to_none=True)
        start = now()
        model(x).backward(dy)
        return {"seconds": now() - start}

    return step


if __name__ == "__main__":
    main()
