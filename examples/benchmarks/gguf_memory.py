"""Memory of loading a GGUF file: by peft_sgrq, packed, and by transformers, dequantized; each in a process of its own.

    python examples/benchmarks/gguf_memory.py SmolLM2-135M-Instruct.Q4_1.gguf --out docs/results/gguf-memory.json

For each dtype: the memory that the model and its tokenizer took, and the most there was while they were loaded, beside
what the process had before: it had imported what loading imports. Pages of the mapped file do not count. The processes
hand back whatever is freed (MALLOC_MMAP_THRESHOLD_ of glibc), or what the allocator keeps for later would be counted
as well. `smollm2.py` says how the file is had. `gguf_report.py` makes Markdown of the results.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from merge_memory import Watch
from results_file import machine, replace_text
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from peft_sgrq import load_gguf
from peft_sgrq.formats.gguf import quantizer  # noqa: F401  (imported before memory is measured)

LOADERS = ("peft_sgrq", "transformers")


def load(loader: str, path: Path, dtype: torch.dtype) -> Any:
    """The model and the tokenizer of a file."""
    if loader == "peft_sgrq":
        return load_gguf(path, dtype=dtype)
    name = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**name, dtype=dtype, quantization_config=GgufConfig(dequantize=True))
    return model, AutoTokenizer.from_pretrained(**name)


def measure(loader: str, path: Path, dtype: str) -> dict[str, float]:
    """MB that were taken in the end, and at the most; run in a fresh process."""
    logging.disable_progress_bar()
    with torch.device("meta"):  # so that what is imported late is there
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name))
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    gc.collect()
    with Watch() as watch:
        loaded = load(loader, path, getattr(torch, dtype))
    gc.collect()
    held = Watch.now() - watch.start
    del loaded
    return {"most MB": round(watch.most - watch.start, 1), "held MB": round(held, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="the JSON file")
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"
    rows = []
    for dtype in args.dtypes:
        for loader in LOADERS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found = pool.apply(measure, (loader, args.file.absolute(), dtype))
            rows.append({"loader": loader, "dtype": dtype, **found})
            print(json.dumps(rows[-1]), flush=True)
    results = {
        "settings": {"file": args.file.name, "file MB": round(args.file.stat().st_size / 1e6, 1)},
        "machine": machine(),
        "versions": {package: version(package) for package in ("torch", "transformers", "gguf")},
        "rows": rows,
    }
    if args.out:
        replace_text(args.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
