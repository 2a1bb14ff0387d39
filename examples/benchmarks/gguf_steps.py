"""How long a training step through a packed GGUF layer takes, over the bare layer and over LoRA on a dense one.

    python examples/benchmarks/gguf_steps.py --out docs/results/gguf-steps.json
    python examples/benchmarks/gguf_steps.py --model FILE.gguf --out docs/results/gguf-steps-model.json
    python examples/benchmarks/gguf_steps.py --widen CHECKPOINT --out docs/results/gguf-steps-wide.json

A step is a forward and a backward pass, the gradient of the input included, by CPU time on CPUs; of a model it
includes AdamW's. `--widen` makes a random model of four blocks as wide as Llamas of a billion parameters are, with the
tokenizer of a Llama of any size. LoRA with r=16 is measured on a dense layer, or the file dequantized by transformers,
in the dtype of the input. `gguf_report.py` makes Markdown of the file. Needs `pip install xllamacpp`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.gguf_files import TYPES, convert
from benchmarks.llama_cpp import quantize
from benchmarks.measure import clock, in_turn
from benchmarks.results_file import machine, replace_text
from peft_sgrq import SGRQConfig, load_gguf
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
    parser.add_argument("--model", type=Path, help="a .gguf file: measure its model, and no single layer")
    parser.add_argument(
        "--widen", type=Path, help="a Llama checkpoint: measure a wide random model with its tokenizer"
    )
    parser.add_argument("--kinds", nargs="+", default=["Q4_1", "Q4_K_M"], choices=TYPES, help="what that is made of")
    parser.add_argument("--types", nargs="+", default=["Q4_1", "Q4_K"], choices=list(BY_NAME))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        files = [args.model] if args.model else []
        if args.widen:
            files = [wide(args.widen, kind, Path(scratch)) for kind in args.kinds]
        for subject, name in itertools.product(files or args.types, args.dtypes):
            dtype = getattr(torch, name)
            if files:
                times = measure_model(subject, dtype, args.tokens, args.repeats)
            else:
                times = measure(subject, dtype, args.width, args.tokens, args.repeats)
            rows.append({"type": subject.stem if files else subject, "dtype": name, "milliseconds": times})
            print(json.dumps(rows[-1]), flush=True)
    width = None if files else args.width
    settings = {"width": width, "tokens": args.tokens, "repeats": args.repeats}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    found = {"settings": settings, "machine": machine(), "versions": versions, "rows": rows}
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
    return _medians({name: _step(model, x, dy) for name, model in models.items()}, repeats)


def measure_model(path: Path, dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a step of a whole model, the median, by method."""
    models: dict[str, nn.Module] = {"base": load_gguf(path, dtype=dtype)[0]}
    for name, settings in METHODS.items():
        config = SGRQConfig(task_type="CAUSAL_LM", **settings)
        models[name] = get_peft_model(load_gguf(path, dtype=dtype)[0], config)
    dense = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    models["lora"] = get_peft_model(dense, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    steps = {}
    for name, model in models.items():
        model.train()
        if name == "base":
            model.requires_grad_(False)
        model.enable_input_require_grads()  # type: ignore[operator]
        steps[name] = _model_step(model, tokens)
    return _medians(steps, repeats)


def wide(checkpoint: Path, kind: str, scratch: Path) -> Path:
    """A file with random weights in the widths of TinyLlama 1.1B, four blocks of it."""
    config = AutoConfig.from_pretrained(checkpoint)
    config.update({"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4})
    config.update({"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64})
    folder = scratch / "wide"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return convert(folder, scratch / f"{kind}.gguf", kind)


def _medians(steps: dict[str, Callable[[], dict[str, float]]], repeats: int) -> dict[str, float]:
    found = in_turn(steps, repeats)
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


def _model_step(model: nn.Module, tokens: int) -> Callable[[], dict[str, float]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=6e-3, weight_decay=0.0) if trained else None
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))  # type: ignore
    now = clock(ids.device)

    def step() -> dict[str, float]:
        start = now()
        model(input_ids=ids, labels=ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return {"seconds": now() - start}

    return step


if __name__ == "__main__":
    main()
