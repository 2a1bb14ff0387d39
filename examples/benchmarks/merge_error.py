"""What merging costs on each base: LoRA's merge beside SGRQ's, as error over effect.

    python examples/benchmarks/merge_error.py                              # every format that is installed
    python examples/benchmarks/merge_error.py --bases bnb-nf4 torchao-int8-row

An adapter with random numbers is scaled so that it changes every quantized weight by 2 % or 10 % of its norm. Error is
the distance of the merged model's logits from the unmerged one's, effect that of the unmerged one's from the base's: 1
means that as much is wrong as the adapter does. Drift is what is left in the base after unmerging, over its logits.
PEFT merges LoRA by dequantizing, adding and quantizing again; SGRQ writes scales. Where PEFT merges into dense weights
instead, the script quantizes them anew, after merging and after unmerging (see compressed_bases.py). A table is
printed, and numbers are kept in a JSON file, to which a run adds those of its formats.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import compressed_bases  # noqa: F401 (registers its formats)
import torch
from bases import Base, installed, quantized_layers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.utils import logging as transformers_logging

from peft_sgrq import SGRQConfig, SGRQLinear
from peft_sgrq.files.output import written

HERE = Path(__file__).resolve().parent
PACKAGES = ("peft", "torch", "transformers", "bitsandbytes", "torchao", "hqq", "optimum-quanto", "compressed-tensors")


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits.float()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).norm().item()


@torch.no_grad()
def scale_lora(model: nn.Module, size: float) -> None:
    """Gives every LoRA layer random numbers whose product has `size` times the norm of the weight."""
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        norm = weight_norm(module.get_base_layer())
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        a.normal_()
        b.normal_()
        b.mul_(size * norm / ((b.float() @ a.float()).norm() * module.scaling["default"]))


@torch.no_grad()
def scale_sgrq(model: nn.Module, size: float) -> None:
    """Gives every SGRQ layer random changes of all scales by `size` in the mean square."""
    for module in model.modules():
        if isinstance(module, SGRQLinear):
            module.sgrq_delta["default"].weight.normal_(std=size)


def weight_norm(layer: nn.Module) -> float:
    from peft_sgrq.formats.registry import resolve_weight

    weight: Any = layer.weight
    if type(weight) is nn.Parameter and weight.element_size() > 1 and weight.is_floating_point():
        return weight.float().norm().item()  # dense by now
    scaled_weight = resolve_weight(layer, 64)
    return scaled_weight.dequantize(scaled_weight.scales(), torch.float32).norm().item()


@torch.no_grad()
def quantize_again(model: nn.Module, base: Base) -> None:
    """Gives every layer with an adapter the dense weight that quantizing it anew leaves."""
    if base.requantize is None:
        return
    for module in model.modules():
        if hasattr(module, "lora_A"):
            layer = module.get_base_layer()
            layer.weight.data = base.requantize(model, layer)


def measure(base: Base, method: str, size: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Error over effect, and drift, of one method on one base at one size of the adapter."""
    torch.manual_seed(0)
    ids = torch.randint(3, 256, (4, 64))
    before = logits(base.load(arguments.model, torch.bfloat16), ids)
    model = base.load(arguments.model, torch.bfloat16)
    lora = method == "LoRA"
    if lora:
        targets = quantized_layers(model)
        if base.requantize is not None:
            model = dense_of(model, ids)
        model = get_peft_model(model, LoraConfig(r=16, target_modules=targets, task_type="CAUSAL_LM"))
        scale_lora(model, size)
    else:
        model = get_peft_model(model, SGRQConfig(ratio=1.0, task_type="CAUSAL_LM"))
        scale_sgrq(model, size)
    unmerged = logits(model, ids)
    try:
        model.merge_adapter()
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"[:200]}
    if lora:
        quantize_again(model, base)
    merged = logits(model, ids)
    model.unmerge_adapter()
    if lora:
        quantize_again(model, base)
    with model.disable_adapter():
        after = logits(model, ids)
    return {
        "effect": distance(unmerged, before) / before.norm().item(),
        "error over effect": distance(merged, unmerged) / distance(unmerged, before),
        "equal bits": torch.equal(merged, unmerged),
        "drift": distance(after, before) / before.norm().item(),
    }


def dense_of(model: Any, ids: torch.Tensor) -> Any:
    """The model as PEFT's LoRA gets it: decompressed by its first forward pass, or fp8 layers as dense ones."""
    from peft_sgrq.formats.fp8_blocks.weight import Fp8BlockLinear

    logits(model, ids)
    for name, module in list(model.named_modules()):
        if isinstance(module, Fp8BlockLinear):
            dense = nn.Linear(module.in_features, module.out_features, module.bias is not None, dtype=model.dtype)
            dense.weight.data = module.dense_weight(module.weight_scale_inv)
            if module.bias is not None:
                dense.bias.data = module.bias.data
            model.set_submodule(name, dense)
    return model


def spell(result: dict[str, Any], key: str) -> str:
    if "refused" in result:
        return "refused"
    value = result[key]
    return "0" if value == 0 else f"{value:.3f}" if math.isfinite(value) else str(value)


def print_table(results: dict[str, dict[str, Any]], sizes: list[float]) -> None:
    """A row a format; numbers of both methods for each size of the adapter."""
    columns = [(method, size) for method in ("LoRA", "SGRQ") for size in sizes]
    print("| base |", " | ".join(f"{method} {size:.0%}: error / effect, drift" for method, size in columns), "|")
    print("|---|" + "---|" * len(columns))
    for name, found in results.items():
        cells = [found[f"{method} {size}"] for method, size in columns]
        text = [f"{spell(cell, 'error over effect')}, {spell(cell, 'drift')}" for cell in cells]
        print(f"| {name} |", " | ".join(text), "|")


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found) + f"; {platform.machine()}, {os.cpu_count()} CPUs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE.parent / "demo_model"), help="a causal language model, dense")
    parser.add_argument("--bases", nargs="*", default=[], help="names of formats (default: all)")
    parser.add_argument(
        "--sizes", nargs="*", type=float, default=[0.02, 0.1], help="norm of the change over the weight"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/merge_error.json"))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("peft_sgrq").setLevel(logging.ERROR)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for base in installed(arguments.bases):
        results[base.name] = {
            f"{method} {size}": measure(base, method, size, arguments)
            for method in ("LoRA", "SGRQ")
            for size in arguments.sizes
        }
        with written(arguments.output) as file:
            Path(file).write_text(json.dumps(results, indent=2))
    print_table(results, arguments.sizes)
    print("\n" + versions())


if __name__ == "__main__":
    main()
