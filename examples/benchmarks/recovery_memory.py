"""Memory and time of recovery: random Llamas of growing depth, each in a process of its own that watches itself.

    python examples/benchmarks/recovery_memory.py --blocks 2 8 32

For each depth: the most memory that recovery took beside the models in memory, with the reference (float32) read
from its files and with it in memory too, beside the sizes of a block of the reference and of all blocks. Then, for the
first depth, the time of a block in ratio to a forward pass of one block over the data. The models are in NF4.

For memory the processes hand back whatever is freed (MALLOC_MMAP_THRESHOLD_ of glibc), or what the allocator keeps for
later would be counted as well.
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
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from peft_sgrq import recover
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing
from peft_sgrq.files.output import written

VOCABULARY = 1024
TIME = "block over forward pass"
STREAM = {"streamed": True, "in memory": False}  # the reference


def save_llama(directory: Path, width: int, blocks: int) -> None:
    """Saves a random float32 Llama."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


def quantized(directory: Path) -> Any:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, quantization_config=settings).eval()
    disable_cpu_packing(model)
    return model


def measure(directory: str, small: str, batches: int, length: int, epochs: int, stream: bool) -> dict[str, float]:
    """Recovers the model of a folder: MB at the most, and the time of a block; run in a fresh process."""
    logging.disable_progress_bar()

    def run(path: str, data: Any, reference: Any) -> tuple[Any, Watch, float]:
        model = quantized(Path(path))
        forward = statistics.mean(forward_pass(model, data) for _ in range(10)) / model.config.num_hidden_layers
        with Watch() as watch:
            recovery = recover(model, reference, data, epochs=epochs, samples=None, progress=False)
        return recovery, watch, forward

    data = [{"input_ids": torch.randint(0, VOCABULARY, (1, length))} for _ in range(batches)]
    run(small, data[:1], small)  # so that what is imported late is there
    reference = directory if stream else AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    recovery, watch, forward = run(directory, data, reference)
    return {
        "most MB": round(watch.most - watch.start, 1),
        TIME: round(statistics.median(block.seconds for block in recovery.blocks) / forward, 1),
    }


def in_fresh_process(environment: dict[str, str], *arguments: Any) -> dict[str, float]:
    """`measure` in a process of its own, with environment variables."""
    os.environ.update(environment)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(measure, arguments)
    finally:
        for name in environment:
            del os.environ[name]


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
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="tokens in a batch")
    parser.add_argument("--time-length", type=int, default=512, help="the same when time is measured")
    parser.add_argument("--epochs", type=int, default=5, help="when time is measured")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) / "small"
        save_llama(small, 128, 1)
        for blocks in arguments.blocks:
            save_llama(Path(scratch) / str(blocks), arguments.width, blocks)
        data = (str(small), arguments.batches)
        for blocks in arguments.blocks:
            directory = Path(scratch) / str(blocks)
            layers = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).model.layers
            size = 4 * sum(one.numel() for one in layers[0].parameters()) / 1e6
            row = {"blocks": blocks, "block MB": round(size, 1), "all blocks MB": round(size * blocks, 1)}
            for name, stream in STREAM.items():
                given = (str(directory), *data, arguments.length, 1, stream)
                found = in_fresh_process({"MALLOC_MMAP_THRESHOLD_": "262144"}, *given)
                row[f"most MB, {name}"] = found["most MB"]
            rows.append(row)
            print(json.dumps(row), flush=True)
        first = str(Path(scratch) / str(arguments.blocks[0]))
        times = {
            name: in_fresh_process({}, first, *data, arguments.time_length, arguments.epochs, stream)[TIME]
            for name, stream in STREAM.items()
        }
        print(json.dumps(times))
    if arguments.results:
        about = {key: value for key, value in vars(arguments).items() if key not in ("results", "blocks")}
        found = {
            "shared": about,
            "versions": {package: version(package) for package in ("torch", "transformers", "peft", "bitsandbytes")},
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} thread(s), no GPU",
            "rows": rows,
            TIME: times,
        }
        with written(arguments.results) as file:
            Path(file).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
