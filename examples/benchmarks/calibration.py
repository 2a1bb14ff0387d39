"""What calibration costs beside a forward pass over the same tokens, and how stable its selections are.

    python examples/benchmarks/calibration.py cost MODEL TEXT --quantize   # time and memory by criterion
    python examples/benchmarks/calibration.py cost                         # of a random model of 4 wide blocks
    python examples/benchmarks/calibration.py depth                        # peak memory against the number of layers
    python examples/benchmarks/calibration.py overlap MODEL TEXT           # selections from two halves of the text

MODEL is a causal language model, TEXT a `.jsonl` file with a `text` in each line. Times are medians of ratios of
things run in turn. Memory is that of tensors made meanwhile, without the model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from calibration_memory import PeakMemory
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from peft_sgrq import SGRQConfig, calibrate
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing
from peft_sgrq.layer.masks import decode_mask

CRITERIA = ("diag", "obs", "billm", "fisher", "gradient")
Batches = list[dict[str, torch.Tensor]]


def forward_pass(model: Any, batches: Batches) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)


def run_calibration(model: Any, batches: Batches, criterion: str) -> Any:
    return calibrate(
        model, SGRQConfig(task_type="CAUSAL_LM"), batches, criterion=criterion, samples=None, progress=False
    )


def random_llama(hidden: int, layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def random_batches(count: int, rows: int, length: int) -> Batches:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 4096, (rows, length))} for _ in range(count)]


def load(model: str, quantize: bool) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    kwargs = {"quantization_config": quantization} if quantize else {}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **kwargs).eval()
    disable_cpu_packing(loaded)
    return loaded


def windows(model: str, texts: list[str], length: int, rows: int, limit: int) -> Batches:
    """Texts one after another, cut into windows without padding."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]])
    count = min(limit, len(ids) // (length * rows))
    return [{"input_ids": part} for part in ids[: count * length * rows].view(count, rows, length)]


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]


def cost(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.model:
        model = load(arguments.model, arguments.quantize)
        batches = windows(arguments.model, read(arguments.text), arguments.length, 8, arguments.batches)
    else:
        model = random_llama(1024, 4)
        batches = random_batches(arguments.batches, 8, arguments.length)
    forward_pass(model, batches[:1])
    rows: dict[str, Any] = {}
    for criterion in arguments.criteria:
        seconds = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            forward_pass(model, batches)
            between = time.perf_counter()
            run_calibration(model, batches, criterion)
            seconds.append((between - start, time.perf_counter() - between))
        with PeakMemory(model) as plain:
            forward_pass(model, batches[:2])
        with PeakMemory(model) as memory:
            run_calibration(model, batches, criterion)
        rows[criterion] = {
            "forward seconds": round(statistics.median(forward for forward, _ in seconds), 2),
            "calibration seconds": round(statistics.median(calibration for _, calibration in seconds), 2),
            "ratio": round(statistics.median(calibration / forward for forward, calibration in seconds), 2),
            "ratios": [round(calibration / forward, 2) for forward, calibration in seconds],
            "forward peak MB": round(plain.peak / 1e6, 1),
            "calibration peak MB": round(memory.peak / 1e6, 1),
        }
        print(json.dumps({criterion: rows[criterion]}), flush=True)
    return {"tokens": sum(batch["input_ids"].numel() for batch in batches), "quantized": arguments.quantize}


def depth(arguments: argparse.Namespace) -> dict[str, Any]:
    batches = random_batches(4, 4, 64)
    for layers in (1, 2, 4, 16, 64):
        model = random_llama(256, layers)
        hessians = 3 * 256**2 + 704**2  # of one block: q, k and v; o; gate and up; down
        row: dict[str, Any] = {"layers": layers, "all Hessians MB": round(layers * hessians * 4 / 1e6, 2)}
        for criterion in ("diag", "obs", "gradient"):
            with PeakMemory(model) as memory:
                run_calibration(model, batches, criterion)
            row[f"{criterion} peak MB"] = round(memory.peak / 1e6, 2)
        print(json.dumps(row), flush=True)
    return {"width": 256, "tokens": 4 * 4 * 64}


def overlap(arguments: argparse.Namespace) -> dict[str, Any]:
    model = load(arguments.model, arguments.quantize)
    texts = read(arguments.text)
    halves = [windows(arguments.model, texts[start::2], arguments.length, 8, arguments.batches) for start in (0, 1)]
    for criterion in (*arguments.criteria, "random"):
        found = [run_calibration(model, half, criterion) for half in halves]
        if criterion == "random":  # what two draws have in common by chance
            found[1] = calibrate(model, SGRQConfig(task_type="CAUSAL_LM"), criterion="random", seed=1, progress=False)
        row = {}
        for ratio in (0.1, 0.4, "knee"):
            masks = [saliency.select(ratio) for saliency in found]
            shared = joined = 0
            for name, layer in found[0].layers.items():
                one, other = (set(decode_mask(mask[name], layer.selectable).tolist()) for mask in masks)
                shared, joined = shared + len(one & other), joined + len(one | other)
            row[str(ratio)] = round(shared / joined, 3)
        print(json.dumps({criterion: row}), flush=True)
    return {"tokens of each half": [sum(batch["input_ids"].numel() for batch in half) for half in halves]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "depth", "overlap"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--criteria", nargs="+", default=CRITERIA)
    parser.add_argument("--quantize", action="store_true", help="to NF4, in place of bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="of 8 sequences, at most")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    about = {"cost": cost, "depth": depth, "overlap": overlap}[arguments.what](arguments)
    about |= {name: version(name) for name in ("torch", "transformers", "bitsandbytes")}
    print(json.dumps({**about, "threads": torch.get_num_threads(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
