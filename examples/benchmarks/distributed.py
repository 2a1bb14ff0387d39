"""Training by two processes against one with the same batch, SGRQ and LoRA: differences, and bytes sent.

    python -m examples.benchmarks.distributed --page docs/distributed.md

Both processes are on this machine and talk by gloo, so nothing here is a measurement of speed. For each engine, base
and kind of checkpointing: the relative difference (by norm) between what two processes and one process train in three
steps of SGD, of the whole adapter and of the tensor where it is largest, and the bytes of the tensors that a process
hands to collective operations in the last step, counted where torch dispatches them. The model is a random Llama of
width 128 with two blocks, if none is given. Cases of DeepSpeed are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from examples.benchmarks.markdown_tables import put_between, table
from examples.benchmarks.rank_processes import run
from examples.benchmarks.ranks import NON_REENTRANT, REENTRANT, Case, train

START, END = "<!-- engines: measured -->", "<!-- /engines -->"
PACKAGES = ("torch", "accelerate", "transformers", "trl", "peft", "bitsandbytes", "deepspeed", "peft_sgrq")
CHECKPOINTING = {"none": {}, "reentrant": REENTRANT, "non-reentrant": NON_REENTRANT}
BASES = {
    "ddp": ("nf4", "nf4-nested", "int8", "dense"),
    "fsdp2": ("nf4", "nf4 in bytes", "dense"),
    "zero2": ("nf4", "int8", "dense"),
    "zero3": ("nf4", "dense"),
}
NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3"}


class BytesSent(TorchDispatchMode):
    """Counts the bytes of the tensors handed to collective operations, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
            # Of what is gathered or scattered the larger of input and output is there, whole.
            sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
            self.counts[func._schema.name.split("::")[1].strip("_")] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


class EachStep(TrainerCallback):
    """What is counted in each step."""

    def __init__(self, counter: BytesSent) -> None:
        self._counter = counter
        self.steps: list[dict[str, int]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._counter.counts.clear()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(dict(self._counter.counts))


def counted(case: Case, directory: Path, out: Path, processes: int) -> dict[str, Any]:
    """`train`, and the bytes of the last step."""
    with BytesSent() as counter:
        each = EachStep(counter)
        found = train(case, directory, out, processes, lambda trainer: trainer.add_callback(each))
    return {**found, "bytes": each.steps[-1]}


def cases(engines: Sequence[str]) -> dict[str, Case]:
    """All of them, by name."""
    found = {}
    for engine in engines:
        for base in BASES[engine]:
            for checkpointing, arguments in CHECKPOINTING.items():
                storage = "float32" if engine == "fsdp2" and base == "nf4" else "uint8"
                # With reentrant checkpointing DDP must not look for unused parameters, for any adapter.
                own = {"ddp_find_unused_parameters": False} if engine == "ddp" and checkpointing == "reentrant" else {}
                for method in ("sgrq", "lora"):
                    case = Case(engine, base.split()[0], method, storage=storage, arguments=arguments)
                    name = " / ".join((engine, base, checkpointing, method))
                    found[name] = replace(case, engine_arguments=own)
    return found


def differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative differences by norm: of all tensors together (`all`), and the largest of one (`largest`)."""
    changes = {name: float((first[name].double() - value.double()).norm()) for name, value in second.items()}
    norms = {name: float(value.double().norm()) for name, value in second.items()}
    largest = max(changes[name] / norm for name, norm in norms.items() if norm)
    return {"all": math.hypot(*changes.values()) / math.hypot(*norms.values()), "largest": largest}


def random_model(folder: Path) -> Path:
    """Saves a random Llama in float32: width 128, two blocks, with the demo model's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "demo_model").save_pretrained(folder)
    return folder


def measure(model: Path | None, engines: Sequence[str]) -> list[dict[str, Any]]:
    """An entry for each case."""
    entries = []
    wanted = cases(engines)
    alone: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "two")
        results.mkdir()
        model = model or random_model(Path(folder, "model"))
        first, second = run(wanted, model, results, counted)
        for name, case in wanted.items():
            engine, base, checkpointing, method = name.split(" / ")
            entry = {"engine": engine, "base": base, "checkpointing": checkpointing, "method": method}
            if "error" in first[name]:
                entries.append({**entry, "error": first[name]["error"].splitlines()[0][:200]})
                continue
            key = (case.base, case.storage, checkpointing, method)
            if key not in alone:
                alone[key] = train(replace(case, engine_arguments={}), model, Path(folder, "one", str(len(alone))))
            trained, again = first[name]["parameters"], second[name]["parameters"]
            entries.append(
                {
                    **entry,
                    "wrapped": first[name]["wrapped"],
                    "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in trained.values()}),
                    "difference": differences(trained, alone[key]["parameters"]),
                    "processes_equal": all(torch.equal(again[name], value) for name, value in trained.items()),
                    "trained_numbers": sum(value.numel() for value in trained.values()),
                    "bytes": first[name]["bytes"],
                }
            )
    return entries


def tables(known: dict[str, Any]) -> str:
    """The results as Markdown: a row for each engine, base and kind of checkpointing, LoRA beside SGRQ."""
    rows = [["engine", "base", "checkpointing", "SGRQ", "largest", "LoRA", "largest", "KB, SGRQ", "KB, LoRA"]]
    by_case: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in known["entries"]:
        by_case.setdefault((entry["engine"], entry["base"], entry["checkpointing"]), {})[entry["method"]] = entry
    for (engine, base, checkpointing), methods in by_case.items():
        found = [methods.get(method, {"error": "not run"}) for method in ("sgrq", "lora")]
        cells = []
        for one in found:
            both = one.get("difference", {})
            cells += [f"{both[kind]:.0e}" if both else "fails" for kind in ("all", "largest")]
        cells += [f"{sum(one['bytes'].values()) / 1e3:,.0f}" if "bytes" in one else "" for one in found]
        row = [NAMES[engine], base, checkpointing, *cells]
        if rows[-1][:2] + rows[-1][3:] == row[:2] + row[3:]:
            rows[-1][2] += ", " + checkpointing  # the same bits, mostly
        else:
            rows.append(row)
    machine = known["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    return f"{table(rows)}\n\n`{machine['command']}`, {machine['date']}, {machine['CPU']}; {versions}."


def machine() -> dict[str, Any]:
    """Where it was measured."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    command = "python -m examples.benchmarks.distributed " + shlex.join(sys.argv[1:])
    return {
        "CPU": f"{os.cpu_count()} cores of {name}",
        "date": date.today().isoformat(),
        "versions": found,
        "command": command.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Llama with its tokenizer; a random one if not given")
    parser.add_argument("--engines", nargs="+", choices=list(BASES), help="all that are installed, if not given")
    parser.add_argument("--out", type=Path, default=Path("docs/results/distributed-cpu.json"))
    parser.add_argument("--page", type=Path, help="the page to write the table into")
    parser.add_argument("--tables", action="store_true", help="of what is in the file, with nothing measured")
    args = parser.parse_args()
    installed = [engine for engine in BASES if not engine.startswith("zero") or find_spec("deepspeed")]
    if args.tables:
        known = json.loads(args.out.read_text())
    else:
        known = {"machine": machine(), "entries": measure(args.model, args.engines or installed)}
        args.out.write_text(json.dumps(known, indent=1) + "\n")
    text = tables(known)
    print(text)
    if args.page:
        args.page.write_text(put_between(args.page.read_text(), START, END, text))


if __name__ == "__main__":
    main()
