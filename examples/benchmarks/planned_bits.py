"""Perplexity of models rounded to few bits a weight, by who decides where the bits go, before and after `recover`.

python examples/benchmarks/planned_bits.py --model MODEL --test TEXT --calibration TEXT --out FILE --group-size 64

Bits are those of codes; scales come on top, the same for all. All variants are dense models with rounded weights, so
that they are recovered alike: `quantize` gives a checkpoint of the same numbers for uniform widths and for plans, and
there is none for several widths by columns. What is done is found in the file, so the command can be stopped and
repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from few_bits import Bench, Run, add_arguments
from mixed_columns import WAYS, Columns, diagonal_fisher

from peft_sgrq import SGRQConfig, allocate_bits, recover
from peft_sgrq.passes.data import load_batches
from peft_sgrq.rotation.bit_plan import BitPlan, stored_bits
from peft_sgrq.rotation.bit_values import Rounding
from peft_sgrq.rotation.quantize import quantizable_layers
from peft_sgrq.rotation.scheme import Scheme
from peft_sgrq.selection.layerwise.gains import halves
from peft_sgrq.selection.layerwise.probe import split_rows

CRITERIA = ("output", "fisher", "measured")
METHODS = ("uniform", *WAYS, *CRITERIA, "autoround uniform", "autoround planned")
WIDTHS = (2, 3, 4)
APART = ("bits", "methods", "no_recovery")


class PlannedBench(Bench):
    """The bench, and what is known of the dense model by calibration seed."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments, {}, APART)
        self.scheme = Scheme(WIDTHS[-1], group_size=arguments.group_size)
        self._columns: dict[int, tuple[Any, Columns, Any]] = {}
        self._plans: dict[tuple[str, float, int], Any] = {}

    def data(self, seed: int) -> torch.Tensor:
        return self.read(self.arguments.calibration, self.arguments.rows, 128, seed)

    def rounded(self, method: str, bits: float, seed: int) -> tuple[Any, Run]:
        """A dense model with rounded weights, and what to say of it."""
        if method.startswith("autoround"):
            return self._autoround(method, bits, seed)
        model = self.load()
        layers = quantizable_layers(model)
        if method == "uniform":
            return self._put(model, Rounding(layers, [int(bits)], self.scheme), dict.fromkeys(layers, int(bits))), {}
        if method in CRITERIA:
            plan = self.plan(method, bits, seed)
            widths = sorted(set(plan.layers.values()))
            known = {"uniform": plan.uniform, "held out": plan.held_out}
            return self._put(model, Rounding(layers, widths, self.scheme), plan.layers), known
        if seed not in self._columns:
            dense = self.load()
            own = quantizable_layers(dense)
            rows = halves(split_rows(load_batches([self.data(seed)])))[0]
            self._columns[seed] = (dense, Columns(own, diagonal_fisher(dense, own, rows), WIDTHS, self.scheme), rows)
        dense, columns, rows = self._columns[seed]
        budget = int(bits * sum(layer.weight.numel() for layer in layers.values()))
        options = columns.choose(method, budget, dense, rows)
        spent = sum(columns.cost(name, option) for name, option in options.items())
        known = {"options": list(options.values()), "spent": round(bits * spent / budget, 4)}
        return self._put(model, columns, options), known

    def plan(self, criterion: str, bits: float, seed: int) -> Any:
        if (criterion, bits, seed) not in self._plans:
            model = self.load()
            layers = quantizable_layers(model)
            width = max(width for width in WIDTHS if width <= bits)  # so that the uniform plan of it is affordable
            beside = sum(
                stored_bits(layer, width, self.scheme) - width * layer.weight.numel() for layer in layers.values()
            )
            budget = bits + beside / sum(layer.weight.numel() for layer in layers.values())
            self._plans[criterion, bits, seed] = allocate_bits(
                model,
                [self.data(seed)],
                bits=budget,
                widths=WIDTHS,
                group_size=self.arguments.group_size,
                criterion=criterion,  # type: ignore[arg-type]
                progress=False,
            )
        return self._plans[criterion, bits, seed]

    def _put(self, model: Any, rounding: Rounding, widths: Mapping[str, int]) -> Any:
        for name, layer in quantizable_layers(model).items():
            layer.weight.data = rounding.weight(name, widths[name]).clone()
        return model

    def _autoround(self, method: str, bits: float, seed: int) -> tuple[Any, Run]:
        """AutoRound's learned rounding, at one width or at those of the plan by the Fisher information."""
        from auto_round import AutoRound

        model, known = self.load(), {}
        layers = quantizable_layers(model)
        if method == "autoround planned":
            plan = self.plan("fisher", bits, seed)
            known = {"uniform": plan.uniform}
        else:
            by_row = [name for name, layer in layers.items() if self.scheme.by_row(layer.in_features)]
            widths = dict.fromkeys(layers, int(bits))
            plan = BitPlan(widths, self.scheme.group_size, bits, 0, 0, method, by_row)
        rounder = AutoRound(
            self.load(),
            self.tokenizer,
            bits=int(bits),
            group_size=self.arguments.group_size,
            sym=True,
            layer_config=plan.autoround(),
            iters=self.arguments.iterations,
            nsamples=self.arguments.rows,
            seqlen=128,
            batch_size=4,
            seed=seed,
            dataset=list(self.data(seed).split(1)),
            device_map="cpu",
            enable_torch_compile=False,
        )
        found = rounder.quantize()[0]
        rounded = {name: found.get_submodule(name).weight.detach() for name in layers}
        refuse_unrounded(rounded, plan.layers, self.scheme)
        for name, layer in layers.items():  # AutoRound leaves all other weights in bfloat16
            layer.weight.data = rounded[name].to(layer.weight.dtype)
        return model, known

    def run(self, method: str, bits: float, seed: int) -> Run:
        """Perplexities before and after `recover`."""
        arguments = self.arguments
        model, known = self.rounded(method, bits, seed)
        before = self.perplexity(model)["test"]
        if arguments.no_recovery:
            return {**known, "before": before}
        config = SGRQConfig(group_size=arguments.group_size, task_type="CAUSAL_LM")
        rows = self.read(arguments.calibration, arguments.recovery_rows, 128, 100 + seed)
        recovered = recover(
            model, self.load(), [rows], config, epochs=arguments.epochs, samples=None, seed=seed, progress=False
        )
        return {**known, "before": before, "after": self.perplexity(recovered.model)["test"]}


def refuse_unrounded(weights: Mapping[str, torch.Tensor], widths: Mapping[str, int], scheme: Scheme) -> None:
    """Refuses weights `[N, K]` with more numbers in a group than codes of their width: AutoRound passed them over."""
    wrong = []
    for name, weight in weights.items():
        size = weight.shape[1] if scheme.by_row(weight.shape[1]) else scheme.group_size
        numbers = weight.reshape(-1, size).sort(dim=1).values  # (groups, size)
        if int((numbers.diff(dim=1) != 0).sum(1).max()) + 1 > 2 ** widths[name]:
            wrong.append(f"{name} {list(weight.shape)}")
    if wrong:
        raise ValueError(
            f"AutoRound left {len(wrong)} of {len(weights)} layers as they were, expected all of them rounded: "
            f"{', '.join(wrong)}; it passes over those with a side that is no multiple of 32: choose another model."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 2.25, 2.75, 3.0], help="of codes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--iterations", type=int, default=50, help="of AutoRound, for each block")
    parser.add_argument("--recovery-rows", type=int, default=32, help="windows of 128 tokens to recover with")
    parser.add_argument("--epochs", type=int, default=3, help="of the recovery")
    parser.add_argument("--no-recovery", action="store_true", help="leave out what comes after `recover`")
    arguments = parser.parse_args()
    bench = PlannedBench(arguments)
    cells = [
        (seed, method, float(bits))
        for seed, method in product(arguments.seeds, arguments.methods)
        for bits in ((2, 3) if method.endswith("uniform") else arguments.bits)
    ]
    for seed, method, bits in cells:
        key = {"method": method, "bits": bits, "seed": seed}
        if bench.has(key):
            continue
        if bench.time_is_up():
            print("The time is up; run the command again to go on.")
            return
        bench.add({**key, **bench.run(method, bits, seed)})
    print("Everything is done.")


if __name__ == "__main__":
    main()
