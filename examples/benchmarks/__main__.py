"""Speed and memory of SGRQ, LoRA and the bare base, in turn in one process: tables, JSON and a plot.

    python -m examples.benchmarks layers --shapes 2048x2048 4096x11008 --tokens 512 2048
    python -m examples.benchmarks training --model examples/demo_model
    python -m examples.benchmarks decoding --model examples/demo_model
    python -m examples.benchmarks startup
    python -m examples.benchmarks tables --page docs/speed.md

Each writes what it measured into `--out` (docs/results/speed-<device>.json), beside what is there already.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks import layers, report, startup, training
from examples.benchmarks.measure import cpu
from examples.benchmarks.methods import RATIOS, sgrq_name
from peft_sgrq.files.output import written

LIMITS = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA")  # make a CPU do without its newer instructions
PACKAGES = ("torch", "bitsandbytes", "peft", "transformers", "trl", "peft_sgrq")


def machine(device: torch.device) -> dict[str, Any]:
    """Where it was measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    model, extensions = cpu()
    return {
        "device": name,
        "CPU": model,
        "CPU extensions": extensions,
        "CPU capability": torch.backends.cpu.get_cpu_capability(),  # lower where ATEN_CPU_CAPABILITY says so
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "versions": {package: version(package) for package in PACKAGES},
        "command": "python -m examples.benchmarks " + shlex.join(map(training.local, sys.argv[1:])),
    }


def run_layers(args: argparse.Namespace, device: torch.device) -> tuple[Any, str]:
    reached = layers.ceilings(device)
    entries, texts = [], []
    for shape in args.shapes:
        for tokens in args.tokens:
            size = layers.SHAPES.get(shape) or tuple(int(part) for part in shape.split("x"))
            result = layers.measure_layer(size, tokens, device, args.repeats, args.quant, getattr(torch, args.dtype))
            floors = {}
            if args.quant == "nf4" and args.dtype == "bfloat16":  # the ceilings are those of bfloat16
                floors = {"base": layers.floor(size, tokens, 0.0, reached)}
                floors |= {sgrq_name(ratio): layers.floor(size, tokens, ratio, reached) for ratio in RATIOS}
            entry = {
                "shape": shape,
                "tokens": tokens,
                "quant": args.quant,
                "dtype": args.dtype,
                "floors": floors,
                "result": result,
            }
            entries.append(entry)
            texts.append(f"{shape}, {tokens} tokens, {args.quant}\n\n{report.layer_table(entry)}\n")
            print(texts[-1], flush=True)
    if args.plot:
        report.plot(entries, args.plot)
    return {"ceilings": reached, "entries": entries}, ""


def run_training(args: argparse.Namespace, device: torch.device) -> tuple[Any, str]:
    result = training.measure_training(
        args.model, device, args.repeats, args.batch, args.tokens[0], args.checkpointing, getattr(torch, args.dtype)
    )
    return {"model": training.local(args.model), "dtype": args.dtype, "result": result}, report.training_table(result)


def run_decoding(args: argparse.Namespace, device: torch.device) -> tuple[Any, str]:
    result = training.measure_decoding(args.model, device, args.repeats, args.tokens[0])
    return {"model": training.local(args.model), "result": result}, report.decoding_table(result)


def run_startup(args: argparse.Namespace, device: torch.device) -> tuple[Any, str]:
    result = startup.measure_startup(device, args.blocks)
    imported = startup.measure_import()
    text = f"{report.startup_table(result)}\n\nimport peft_sgrq, after peft: {imported['seconds']:.3f} s"
    return {"result": result, "import": imported}, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"layers": run_layers, "training": run_training, "decoding": run_decoding, "startup": run_startup}
    parser.add_argument("what", choices=[*commands, "tables"])
    parser.add_argument("--page", type=Path, help="of `tables`: the page to write them into")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one by default, times are CPU times")
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "4096x11008"], help=f"of {list(layers.SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--quant", choices=tuple(layers.QUANTS), default="nf4")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of `layers`, `training`")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", default="examples/demo_model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--blocks", type=int, default=startup.BLOCKS)
    parser.add_argument("--plot", type=Path, help="PNG file, of `layers`")
    parser.add_argument("--name", help="what to call the results in the file")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    out = args.out or Path(f"docs/results/speed-{device.type}.json")
    if args.what == "tables":
        known = json.loads(out.read_text())
        if args.page:
            report.update(args.page, known)
        else:
            print(report.sections(known))
        return
    results, text = commands[args.what](args, device)
    print(text)
    known = json.loads(out.read_text()) if out.exists() else {}
    known[args.name or args.what] = {"what": args.what, "machine": machine(device), "results": results}
    out.parent.mkdir(parents=True, exist_ok=True)
    with written(out) as file:
        Path(file).write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
