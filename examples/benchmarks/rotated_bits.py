"""Perplexity of models rounded to few bits: by rotations and schemes, and by plans of bits.

    cd examples
    python -m benchmarks.rotated_bits rotations --model MODEL --test TEXTS --calibration TEXTS --out FILE
    python -m benchmarks.rotated_bits bits --model MODEL --test TEXTS --calibration TEXTS --out FILE

Texts are .jsonl files with a column `text`. Each run is printed and added to the file when it is done.
"""

from __future__ import annotations

import argparse
import math
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from results_file import ResultsFile
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_sgrq

ROTATIONS = {"none": (), "R1": ("R1",), "R1+R2": ("R1", "R2"), "all": ("R1", "R2", "R3", "R4"), "adaptive": ()}
SCHEMES = ("W4A16", "W4A8KV8", "W4A4KV8", "W4A4KV4")
CRITERIA = ("output", "fisher", "measured")
PACKAGES = ("torch", "transformers", "compressed-tensors", "peft_sgrq")


def windows(tokenizer: Any, path: str, count: int, length: int) -> torch.Tensor:
    """The first tokens of the texts of a file, each text begun as a text is, int64 `[count, length]`."""
    from datasets import load_dataset

    ids: list[int] = []
    for text in load_dataset("json", data_files=path, split="train")["text"]:
        ids += ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]) + tokenizer(
            text, add_special_tokens=False, verbose=False
        ).input_ids
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise ValueError(f"{path} has {len(ids)} tokens, expected {count * length}; ask for fewer.")


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of the tokens of windows `[count, length]`, each window by itself."""
    losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in ids]
    return math.exp(sum(losses) / len(losses))


def load(args: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()


def run_rotations(args: argparse.Namespace, file: ResultsFile, test: torch.Tensor, data: torch.Tensor) -> None:
    done = {(run["rotation"], run["scheme"], run["seed"]) for run in file.setting["runs"]}
    for seed in args.seeds:
        for scheme in SCHEMES:
            for name, rotations in ROTATIONS.items():
                if (name, scheme, seed) in done or (name == "none" and seed != args.seeds[0]):
                    continue
                model = load(args)
                chosen: dict[str, int] = {}
                if name == "adaptive":
                    found = peft_sgrq.rotate(
                        model, [data], scheme=scheme, rotations=ROTATIONS["all"], group_size=args.group_size, seed=seed
                    )
                    chosen = {rotation: len(blocks) for rotation, blocks in found.chosen.items()}
                elif rotations:
                    peft_sgrq.rotate(model, rotations=rotations, seed=seed)
                peft_sgrq.quantize(model, scheme, group_size=args.group_size)
                found_perplexity = perplexity(model, test)
                file.add(
                    {
                        "rotation": name,
                        "scheme": scheme,
                        "seed": seed,
                        "perplexity": found_perplexity,
                        "chosen": chosen,
                    }
                )
                print(name, scheme, seed, f"{found_perplexity:.2f}", chosen, flush=True)


def run_bits(args: argparse.Namespace, file: ResultsFile, test: torch.Tensor, data: torch.Tensor) -> None:
    done = {(run["criterion"], run["bits"]) for run in file.setting["runs"]}
    for width in (2, 3, 4):
        if ("uniform", width) not in done:
            model = peft_sgrq.quantize(load(args), f"W{width}A16", group_size=args.group_size)
            file.add({"criterion": "uniform", "bits": width, "perplexity": perplexity(model, test)})
    overhead = 8 * getattr(torch, args.dtype).itemsize / args.group_size  # bits of scales, where groups divide columns
    for bits in args.bits:
        for criterion in CRITERIA:
            if (criterion, bits) in done:
                continue
            model = load(args)
            plan = peft_sgrq.allocate_bits(
                model, [data], bits=bits + overhead, group_size=args.group_size, criterion=criterion, progress=False
            )
            found = perplexity(peft_sgrq.quantize(model, plan), test)
            run = {"criterion": criterion, "bits": bits, "with scales": plan.bits, "uniform": plan.uniform}
            file.add({**run, "perplexity": found, "held out": plan.held_out})
            print(criterion, bits, f"{found:.2f}", "uniform" if plan.uniform else "", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rotations", "bits"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=float, nargs="+", default=[2.25, 2.5, 2.75, 3.0], help="of codes alone")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "The model has online rotations")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    test, data = (windows(tokenizer, path, args.windows, args.length) for path in (args.test, args.calibration))
    names = ("what", "dtype", "group_size", "windows", "length")
    shared = {name: getattr(args, name) for name in names}
    shared |= {name: Path(getattr(args, name)).name for name in ("model", "test", "calibration")}
    file = ResultsFile(args.out, shared, {package: version(package) for package in PACKAGES}, {})
    dense = perplexity(load(args), test)
    file.setting["full precision"] = dense
    print("full precision", f"{dense:.2f}", flush=True)
    (run_rotations if args.what == "rotations" else run_bits)(args, file, test, data)


if __name__ == "__main__":
    main()
