"""Is a recovered model the better start? Tunes a model of few bits from plain scales and from recovered ones.

python examples/benchmarks/recover_then_tune.py MODEL --data TEXT --train TEXT --test TEXT --results results.json
python examples/benchmarks/recovery_table.py results.json

`--data` is what is recovered with, `--train` and `--test` are the task. Both starts train the same adapter for the
same steps on the same batches: one begins with deltas of zero, the other with those of the recovery. Both get the same
learning rates: all of them at the first seed, then for the others the one with the lowest loss on the validation
split, the last tenth of the training text. The seed sets the samples recovered with and the order of both.

What is done already is found in the results, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from recovery_bench import Bench, Results, add_arguments, settings_of
from torch import nn
from transformers import get_cosine_schedule_with_warmup
from transformers.utils import logging

STARTS = ("plain", "recovered")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--train", type=Path, required=True, help="text to tune on")
    parser.add_argument("--test", type=Path, required=True, help="held-out text of the same kind")
    parser.add_argument("--recovery", default="", help="how to recover, as in `recover_low_bits.py`")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="windows in a step of tuning")
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-2, 2e-2, 4e-2])
    return parser.parse_args()


class Tuning(Bench):
    """The bench with a task, and the recovered deltas of the seeds that have been asked for."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments, {"test": arguments.test})
        windows = self.windows(arguments.train)
        held = max(1, len(windows) // 10)
        self.train = windows[:-held]
        self.parts["validation"] = windows[-held:][: arguments.evaluation_rows]
        self._starts: dict[tuple[int, int], list[torch.Tensor]] = {}

    def begin(self, start: str, bits: int, seed: int) -> Any:
        """The quantized model with an adapter on all its scales, at its start."""
        model = get_peft_model(self.quantized(bits), self.config())
        if start == "recovered":
            if (bits, seed) not in self._starts:
                recovery = self.recover(bits, seed, settings_of(self.arguments.recovery))
                self._starts[bits, seed] = [delta.detach().clone() for delta in trained(recovery.model)]
            with torch.no_grad():
                for delta, value in zip(trained(model), self._starts[bits, seed], strict=True):
                    delta.copy_(value)
        return model

    def tune(self, start: str, bits: int, seed: int, learning_rate: float) -> dict[str, Any]:
        """Losses before and after tuning, and seconds of it."""
        arguments = self.arguments
        model = self.begin(start, bits, seed)
        before = self.evaluate(model)
        clock = time.perf_counter()
        deltas = trained(model)
        optimizer = torch.optim.AdamW(deltas, lr=learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 10, arguments.steps)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        for _ in range(arguments.steps):
            batch = self.train[torch.randint(len(self.train), (arguments.rows,), generator=generator)]
            batch = batch.to(deltas[0].device)
            model(input_ids=batch, labels=batch).loss.backward()
            nn.utils.clip_grad_norm_(deltas, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds = round(time.perf_counter() - clock, 1)
        return {**self.evaluate(model), "untuned": before["test"], "seconds": seconds}


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The deltas of a model."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def best_rate(runs: list[dict[str, Any]], start: str, bits: int, seed: int) -> float:
    """The learning rate with the lowest validation loss at a seed."""
    own = [run for run in runs if (run["start"], run["bits"], run["seed"]) == (start, bits, seed)]
    return min(own, key=lambda run: run["validation"])["learning_rate"]


def main() -> None:
    arguments = parse_arguments()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start = time.perf_counter()
    bench = Tuning(arguments)
    results = Results(arguments, ("start", "bits", "seed", "learning_rate"))
    print(json.dumps({"full precision": results.base("full", bench, bench.full)}), flush=True)
    first, *others = arguments.seeds
    pairs = [(bits, name) for bits in arguments.bits for name in STARTS]
    todo: list[tuple[int, str, int, float | None]] = [
        (*pair, first, rate) for pair in pairs for rate in arguments.learning_rates
    ]
    todo += [(*pair, seed, None) for seed in others for pair in pairs]
    for bits, name, seed, rate in todo:
        if time.perf_counter() - start > arguments.limit:
            print("The time is up; run the command again to go on.")
            return
        rate = rate or best_rate(results.setting["runs"], name, bits, first)
        run = {"start": name, "bits": bits, "seed": seed, "learning_rate": rate}
        if results.find(run) is None:
            run |= bench.tune(**run)
            results.add(run)
            print(json.dumps(run), flush=True)
    print("Everything is done.")


if __name__ == "__main__":
    main()
