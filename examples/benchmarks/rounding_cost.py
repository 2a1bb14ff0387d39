"""What the storage dtype of scales costs: how much of a change survives rounding, and when rounding is trained with.

    python examples/benchmarks/rounding_cost.py --only kept       # the first table
    python examples/benchmarks/rounding_cost.py --only float16    # rows of the second one; also bfloat16, e4m3
    python examples/benchmarks/rounding_cost.py --table           # prints both tables from the results so far

First table: an NF4 base (float32 scales) is tuned at some learning rates; its changed scales are then rounded to each
dtype. "Kept" is how much of the change is still there: one minus the norm of what rounding changes over the norm of
the change; below it is the share of scales that do not move at all. Second table: a base with scales in that dtype is
tuned with the rounding in the forward pass, as SGRQ does it, and without; held-out loss before and after merging.
Results are kept in a JSON file, to which each run adds its own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bases import BASES
from merge_error import versions
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from peft_sgrq import SGRQConfig, SGRQLinear
from peft_sgrq.files.output import written
from peft_sgrq.layer.functional import effective_scales

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from demo_text import task_documents  # noqa: E402
from perplexity import perplexity, tokenize  # noqa: E402

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
}
LARGEST_E4M3 = torch.finfo(torch.float8_e4m3fn).max


def texts(arguments: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of the training text and of the held-out text of the demo."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, held_out = ("\n\n".join(documents) for documents in task_documents())
    length = arguments.length
    return tokenize(tokenizer, train, length, 10**6), tokenize(tokenizer, held_out, length, arguments.eval_windows)


def tune(model: nn.Module, windows: torch.Tensor, rate: float, arguments: argparse.Namespace) -> None:
    """AdamW with warm-up and a cosine schedule over random batches."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warmup = max(1, arguments.steps // 20)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(arguments.steps):
        progress = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / arguments.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * progress
        batch = windows[torch.randint(len(windows), (arguments.batch_size,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def layers(model: nn.Module) -> list[SGRQLinear]:
    return [module for module in model.modules() if isinstance(module, SGRQLinear)]


def rounded(scales: torch.Tensor, name: str, base: torch.Tensor) -> torch.Tensor:
    """Scales on the grid of a dtype; e4m3 as in NVFP4, over a factor that puts the base's largest near its end."""
    if name != "e4m3":
        return scales.to(DTYPES[name]).float()
    factor = base.abs().max() / LARGEST_E4M3
    return (scales / factor).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(DTYPES[name]).float() * factor


@torch.no_grad()
def kept(rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """What is left of a change of float32 scales, by the dtype it is rounded to."""
    train, _ = texts(arguments)
    model = get_peft_model(BASES["bnb-nf4"].load(arguments.model, torch.bfloat16), SGRQConfig(ratio=arguments.ratio))
    with torch.enable_grad():
        tune(model, train, rate, arguments)
    found: dict[str, Any] = {}
    totals = {name: [0.0, 0.0, 0, 0] for name in DTYPES}
    sizes = []
    for layer in layers(model):
        groups = layer.sgrq_delta["default"].selected()
        old = layer.scaled_weight.scales()[:, groups]
        new = effective_scales(layer.scaled_weight, *layer.combined_delta(("default",)))[:, groups]
        sizes.append(((new - old) / old).abs().flatten())
        for name, total in totals.items():
            base = rounded(old, name, old)  # the base has its scales in that dtype already
            stored = rounded(base * (new / old), name, old)
            wanted = (new / old - 1) * base
            total[0] += (stored - base - wanted).square().sum().item()
            total[1] += wanted.square().sum().item()
            total[2] += int((stored == base).sum())
            total[3] += stored.numel()
    found["median change"] = torch.cat(sizes).median().item()
    for name, (lost, wanted, same, count) in totals.items():
        found[name] = {"kept": 1 - math.sqrt(lost / wanted), "unmoved": same / count}
    return found


def load_base(dtype: str, arguments: argparse.Namespace) -> nn.Module:
    """A float32 model with 4-bit weights whose scales are in `dtype`."""
    if dtype == "e4m3":
        return BASES["torchao-nvfp4"].load(arguments.model, torch.float32)
    model = BASES["torchao-intx4-64"].load(arguments.model, torch.float32)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(weight).__name__ == "IntxUnpackedToInt8Tensor":
            weight.scale = weight.scale.to(DTYPES[dtype])
    return model


@contextmanager
def without_rounding() -> Iterator[None]:
    """Lets the forward pass compute with scales in float32, as if they could be stored so."""
    from peft_sgrq.formats.torchao.nvfp4 import TorchaoNVFP4Weight
    from peft_sgrq.formats.torchao.weight import TorchaoPlainWeight

    def scales_as_they_are(scaled_weight: Any, scales: torch.Tensor) -> torch.Tensor:
        return scales

    def unrounded(scaled_weight: Any, scales: torch.Tensor) -> torch.Tensor:
        return scales.view(scaled_weight.stored_scales.shape)

    def unrounded_e4m3(scaled_weight: Any, scales: torch.Tensor) -> torch.Tensor:
        return scales / scaled_weight._factor

    replaced = [
        (TorchaoPlainWeight, "prepare", unrounded),
        (TorchaoPlainWeight, "round_to_storage", scales_as_they_are),
        (TorchaoNVFP4Weight, "_to_e4m3", unrounded_e4m3),
    ]
    originals = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, original in originals:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


def with_and_without(dtype: str, rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss of a tuned base before and after merging, with rounding in the forward pass and without."""
    train, held_out = texts(arguments)

    def loss(model: nn.Module) -> float:
        return math.log(perplexity(model, held_out))

    found: dict[str, Any] = {}
    model = load_base(dtype, arguments)
    found["base"] = loss(model)
    model = get_peft_model(model, SGRQConfig(ratio=arguments.ratio))
    tune(model, train, rate, arguments)
    found["with: unmerged"] = loss(model)
    model.merge_adapter()
    found["with: merged"] = loss(model)

    model = get_peft_model(load_base(dtype, arguments), SGRQConfig(ratio=arguments.ratio))
    with without_rounding():
        tune(model, train, rate, arguments)
        found["without: unmerged"] = loss(model)
    model.merge_adapter()  # rounds
    found["without: merged"] = loss(model)
    return found


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    """Both tables, as far as there are results."""
    print("| learning rate | median change |", " | ".join(f"{name}: kept, unmoved" for name in DTYPES), "|")
    print("|---|---|" + "---|" * len(DTYPES))
    for rate, found in sorted(results.get("kept", {}).items(), key=lambda item: float(item[0])):
        cells = [f"{found[name]['kept']:.1%}, {found[name]['unmoved']:.0%}" for name in DTYPES]
        print(f"| {float(rate):g} | {found['median change']:.2%} |", " | ".join(cells), "|")
    keys = ("base", "with: unmerged", "with: merged", "without: unmerged", "without: merged")
    print("\n| scales in | learning rate |", " | ".join(keys), "|")
    print("|---|---|" + "---|" * len(keys))
    for dtype in DTYPES:
        for rate, found in sorted(results.get(dtype, {}).items(), key=lambda item: float(item[0])):
            print(f"| {dtype} | {float(rate):g} |", " | ".join(f"{found[key]:.4f}" for key in keys), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parent / "demo_model"), help="a causal language model, dense")
    parser.add_argument("--only", choices=("kept", *DTYPES), help="one part alone (default: all)")
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-3, 1e-2, 4e-2], help="learning rates")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a sequence")
    parser.add_argument("--eval-windows", type=int, default=80, help="windows of held-out text at most")
    parser.add_argument("--ratio", type=float, default=0.4, help="share of the scales that are trained")
    parser.add_argument("--table", action="store_true", help="print the tables and measure nothing")
    parser.add_argument("--output", type=Path, default=Path("outputs/rounding_cost.json"))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for part in [] if arguments.table else [arguments.only] if arguments.only else ["kept", *DTYPES]:
        for rate in arguments.rates:
            torch.manual_seed(0)
            measured = kept(rate, arguments) if part == "kept" else with_and_without(part, rate, arguments)
            results.setdefault(part, {})[str(rate)] = measured
            with written(arguments.output) as file:
                Path(file).write_text(json.dumps(results, indent=2))
    print_tables(results)
    print(f"\n{arguments.steps} steps of {arguments.batch_size} x {arguments.length} tokens; {versions()}")


if __name__ == "__main__":
    main()
