"""Does it matter which scales are trained? Tunes one model with selections by different criteria and compares.

python examples/benchmarks/compare_selection.py MODEL --train TEXT --test TEXT --base nf4 --results results.json
python examples/benchmarks/selection_table.py results.json

A selection is named `CRITERION` or `CRITERION:HOW`. CRITERION is one of `calibrate`'s, or `bottom`, the least salient
columns by `obs`. HOW is `global` or `layerwise` (ratios by layer, at the same number of scales), or `scale`: single
scales with the largest mean gradient instead of whole columns of them, which saves no work and is for analysis only.

Every selection gets the same learning rates: all of them at the first seed, then for the others the one with the
lowest loss on the validation split, the last tenth of the training text. With `--all-rates` the other seeds get all of
them, too, which is for rates whose losses are close: the table takes the one with the lowest mean. The seed sets the
order of the data, the calibration rows and the random selection. What is done already is found in the results, so the
command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from results_file import ResultsFile, named
from selection_bench import Bench
from transformers.utils import logging

RUN_FIELDS = ("method", "ratio", "seed", "learning_rate")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a causal language model, not quantized")
    parser.add_argument(
        "--train", type=Path, required=True, help="a text, or .jsonl with `text` or question and answer"
    )
    parser.add_argument("--test", type=Path, required=True, help="held-out text of the same kind")
    parser.add_argument("--base", choices=["nf4", "dense", "dense-3bit"], default="nf4")
    parser.add_argument("--group-size", type=int, default=64, help="columns per scale of a dense base")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--methods", nargs="+", default=["obs", "diag", "gradient", "magnitude", "random", "bottom"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.4])
    parser.add_argument("--no-full", action="store_true", help="leave out ratio 1.0")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[2e-2, 4e-2, 8e-2, 0.16])
    parser.add_argument("--all-rates", action="store_true", help="all learning rates at all seeds")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--calibration-rows", type=int, default=64, help="windows of the training text")
    parser.add_argument("--evaluation-rows", type=int, default=96, help="windows of the validation and the test text")
    parser.add_argument("--characters", type=int, default=600_000, help="how much of the training text to read")
    parser.add_argument("--results", type=Path, required=True, help="a JSON file to add to")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no run after so many seconds")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start = time.perf_counter()
    results = Results(arguments)
    bench = Bench(arguments)
    pairs = [(method, ratio) for ratio in arguments.ratios for method in arguments.methods]
    pairs += [] if arguments.no_full else [("random", 1.0)]
    first, *others = arguments.seeds
    todo = [
        (method, ratio, first, rate) for method, ratio in pairs for rate in arguments.learning_rates
    ]  # the sweep; the other seeds are added as the sweep of a pair is done
    for method, ratio in pairs:
        rates = arguments.learning_rates if arguments.all_rates else [None]
        todo += [(method, ratio, seed, rate) for seed in others for rate in rates]
    for method, ratio, seed, rate in todo:
        if time.perf_counter() - start > arguments.limit:
            print("The time is up; run the command again to go on.")
            return
        rate = rate or results.best_rate(method, ratio, first, arguments.learning_rates)
        run = dict(zip(RUN_FIELDS, (method, ratio, seed, rate), strict=True))
        if results.find(run) is None:
            run |= bench.run(**run)
            results.add(run)
            print(json.dumps(run), flush=True)
    if "untrained" not in results.setting:
        results.setting["untrained"] = bench.evaluate(bench.load())
        results.save()
    for seed in arguments.seeds:
        if not results.has_overlaps(seed, [method for method in arguments.methods if ":scale" not in method]):
            results.add_overlaps(seed, bench.overlaps(seed))
    print("Everything is done.")


class Results(ResultsFile):
    """A JSON file: a list of settings (everything the runs in it share), each with its runs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.ratios: list[float] = arguments.ratios
        shared = {
            key: named(value)
            for key, value in vars(arguments).items()
            if key not in ("methods", "ratios", "no_full", "seeds", "learning_rates", "all_rates", "results", "limit")
        }
        versions = {package: version(package) for package in ("torch", "transformers", "peft", "bitsandbytes")}
        super().__init__(arguments.results, shared, versions, {"overlap": {}})

    def find(self, run: dict[str, Any]) -> dict[str, Any] | None:
        return next((old for old in self.setting["runs"] if all(old[key] == run[key] for key in RUN_FIELDS)), None)

    def best_rate(self, method: str, ratio: float, seed: int, rates: list[float]) -> float:
        runs = [
            run
            for run in self.setting["runs"]
            if (run["method"], run["ratio"], run["seed"]) == (method, ratio, seed) and run["learning_rate"] in rates
        ]
        return min(runs, key=lambda run: run["validation"])["learning_rate"]

    def has_overlaps(self, seed: int, methods: list[str]) -> bool:
        """Whether the overlap of every two of these selections is there, at all ratios of this call."""
        found = {pair_of(item) for item in self.setting["overlap"].get(str(seed), [])}
        pairs = itertools.combinations(methods, 2)
        return all((ratio, frozenset(pair)) in found for pair in pairs for ratio in self.ratios)

    def add_overlaps(self, seed: int, found: list[dict[str, Any]]) -> None:
        """Adds overlaps; those of the same selections are replaced."""
        new = {pair_of(item) for item in found}
        kept = [item for item in self.setting["overlap"].get(str(seed), []) if pair_of(item) not in new]
        self.setting["overlap"][str(seed)] = found + kept
        self.save()


def pair_of(overlap: dict[str, Any]) -> tuple[float, frozenset[str]]:
    """What an overlap is of: a ratio and two selections, in any order."""
    return overlap["ratio"], frozenset(overlap["methods"])


if __name__ == "__main__":
    main()
