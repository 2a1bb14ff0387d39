"""Perplexity of models that are rotated and rounded to few bits, before and after tuning.

python examples/benchmarks/rotated_bits.py --model MODEL --test TEXT --calibration TEXT --out FILE
    --methods none scales dense straight-through --train TEXT --task TEXT

Texts are .jsonl files with a column `text`. `--test` is of the kind that the model was trained on, `--train` and
`--task` of another. Methods are what is tuned on the latter: nothing, the scales of the quantized model by an SGRQ
adapter, all weights before they are rotated and quantized, or all weights through the rounding (RoSTE's own).
What is done is found in the file, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import time
import warnings
from itertools import product
from typing import Any

import torch
from few_bits import Bench, Run, add_arguments, tune
from peft import get_peft_model
from straight_through import straight_through

from peft_sgrq import SGRQConfig, quantize, rotate
from peft_sgrq.rotation.quantize import quantizable_layers

ROTATIONS = {"none": (), "R1": ("R1",), "R1+R2": ("R1", "R2"), "all": ("R1", "R2", "R3", "R4"), "adaptive": ()}
METHODS = ("none", "scales", "dense", "straight-through")
APART = ("schemes", "rotations", "methods", "group_sizes")


class RotatedBench(Bench):
    """The bench with a task to tune on."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        task = {"task": arguments.task} if arguments.task else {}
        super().__init__(arguments, task, APART)
        self.data = self.read(arguments.calibration, arguments.rows, 128)
        self._dense: dict[str, torch.Tensor] = {}

    def batches(self) -> Any:
        arguments = self.arguments
        rows = self.read(arguments.train, arguments.steps * arguments.batch, arguments.train_length)
        return rows.split(arguments.batch)

    def tuned_dense(self) -> Any:
        """The model with all its linear layers tuned in full precision, which happens once."""
        model = self.load()
        if not self._dense:
            model.requires_grad_(False)
            weights = [layer.weight.requires_grad_(True) for layer in quantizable_layers(model).values()]
            tune(model, weights, self.batches(), self.arguments.weight_rate)
            self.file.setting["tuned in full precision"] = self.perplexity(model)
            self._dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self._dense)
        return model

    def run(self, rotation: str, scheme: str, group_size: int, seed: int, method: str) -> Run:
        """What one cell of the table has in it."""
        model = self.tuned_dense() if method == "dense" else self.load()
        chosen: dict[str, int] = {}
        if rotation == "adaptive":
            found = rotate(
                model, [self.data], scheme=scheme, rotations=ROTATIONS["all"], group_size=group_size, seed=seed
            )
            chosen = {name: len(blocks) for name, blocks in found.chosen.items()}
        elif ROTATIONS[rotation]:
            rotate(model, rotations=ROTATIONS[rotation], seed=seed)
        start, trained = time.process_time(), 0
        if method == "straight-through":
            weights = straight_through(model, scheme, group_size)
            trained = sum(weight.numel() for weight in weights)
            tune(model, weights, self.batches(), self.arguments.weight_rate)
        else:
            quantize(model, scheme, group_size=group_size)
        if method == "scales":
            model = get_peft_model(model, SGRQConfig(task_type="CAUSAL_LM"))
            deltas = [parameter for parameter in model.parameters() if parameter.requires_grad]
            trained = sum(delta.numel() for delta in deltas)
            tune(model, deltas, self.batches(), self.arguments.rate)
        result: Run = {"perplexity": self.perplexity(model), "cpu_seconds": round(time.process_time() - start, 1)}
        return {**result, **({"chosen": chosen} if chosen else {}), **({"trained": trained} if trained else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--schemes", nargs="+", default=["W4A16", "W4A8KV8", "W4A4KV8", "W4A4KV4"])
    parser.add_argument("--rotations", nargs="+", choices=ROTATIONS, default=list(ROTATIONS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["none"])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[64, 16])
    parser.add_argument("--train", help="text to tune on")
    parser.add_argument("--task", help="held-out text of that kind")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="windows in a step")
    parser.add_argument("--train-length", type=int, default=64, help="tokens in a window")
    parser.add_argument("--rate", type=float, default=5e-2, help="of scales")
    parser.add_argument("--weight-rate", type=float, default=1e-3, help="of weights")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "The model has online rotations")
    bench = RotatedBench(arguments)
    cells = product(arguments.seeds, arguments.methods, arguments.group_sizes, arguments.schemes, arguments.rotations)
    for seed, method, group_size, scheme, rotation in cells:
        key = {"rotation": rotation, "scheme": scheme, "group_size": group_size, "seed": seed, "method": method}
        if bench.has(key) or (rotation == "none" and seed != 0):  # without a rotation the seed means nothing
            continue
        if bench.time_is_up():
            print("The time is up; run the command again to go on.")
            return
        bench.add({**key, **bench.run(rotation, scheme, group_size, seed, method)})
    print("Everything is done.")


if __name__ == "__main__":
    main()
