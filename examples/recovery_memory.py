"""Memory and time of recovery: random Llamas of growing depth, each in a process of its own that watches itself.

    python examples/recovery_memory.py --blocks 2 8 32

For each depth: the most memory that recovery took beside the models in memory, with the reference read from its files
and with it in memory too, beside the sizes of a block and of all; and the time of a block in ratio to a forward
pass of one block over the data. Weights are float32 and rounded to 4 bits in plain layers, so a block of the quantized
model is as large as one of the reference.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from merge_memory import Watch
from selection_bench import round_to_grid
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from peft_sgrq import recover

VOCABULARY = 1024


def save_llama(directory: Path, width: int, blocks: int) -> None:
    """Saves a random float32 Llama."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


def quantized(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = round_to_grid(layer.weight.data, bits=4)
    return model


def measure(directory: str, small: str, batches: int, length: int, epochs: int, stream: bool) -> dict[str, float]:
    """Recovers the model of a folder: MB at the most, and the time of a block; run in a fresh process."""
    logging.disable_progress_bar()

    def run(path: str, data: Any, reference: Any) -> tuple[Any, Watch]:
        model = quantized(Path(path))
        forward_pass(model, data)
        with Watch() as watch:
            recovery = recover(model, reference, data, epochs=epochs, samples=None, progress=False)
        return recovery, watch

    data = [{"input_ids": torch.randint(0, VOCABULARY, (1, length))} for _ in range(batches)]
    run(small, [{"input_ids": torch.randint(0, VOCABULARY, (1, 8))}], small)  # so that what is imported late is there
    reference = directory if stream else AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    recovery, watch = run(directory, data, reference)
    model = recovery.model.unload()
    forward = statistics.median(forward_pass(model, data) for _ in range(5)) / len(recovery.blocks)
    return {
        "most MB": round(watch.most - watch.start, 1),
        "block over forward pass": round(statistics.median(block.seconds for block in recovery.blocks) / forward, 1),
    }


@torch.no_grad()
def forward_pass(model: Any, data: list[dict[str, torch.Tensor]]) -> float:
    """Seconds of a forward pass over the data, without the head."""
    start = time.perf_counter()
    for batch in data:
        model.model(**batch, use_cache=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 8, 32])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a batch")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "small"
        save_llama(small, 128, 1)
        for blocks in arguments.blocks:
            directory = Path(scratch) / str(blocks)
            save_llama(directory, arguments.width, blocks)
            block = 4 * sum(
                one.numel() for one in AutoModelForCausalLM.from_pretrained(directory).model.layers[0].parameters()
            )
            row: dict[str, Any] = {"blocks": blocks, "block MB": round(block / 1e6, 1)}
            row["all blocks MB"] = round(block * blocks / 1e6, 1)
            for name, stream in (("streamed", True), ("in memory", False)):
                fresh = multiprocessing.get_context("spawn").Pool(1)
                with fresh:
                    row[name] = fresh.apply(
                        measure,
                        (str(directory), str(small), arguments.batches, arguments.length, arguments.epochs, stream),
                    )
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.results:
        about = {key: value for key, value in vars(arguments).items() if key not in ("results", "blocks")}
        found = {
            "shared": about,
            "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} thread(s), no GPU",
            "rows": rows,
        }
        beside = arguments.results.with_suffix(".partial")
        beside.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(beside, arguments.results)


if __name__ == "__main__":
    main()
