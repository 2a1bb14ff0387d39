r"""When does SGRQ beat LoRA, and when not? Tunes one quantized base by several methods and compares them.

python examples/benchmarks/compare_methods.py MODEL --base nf4 --train TEXT --test TEXT --other TEXT \
    --results results.json
python examples/benchmarks/methods_report.py results.json --plots docs/results \
    --update docs/results.md docs/results/methods.md

The methods are those of `comparison/methods.py`. Every method begins with the same number of learning rates, a factor
apart around its usual one, at the first seed; where the lowest validation loss is at an edge, the sweep goes on, and
with `--refine` it looks closer around the best. The other seeds get the best rate; where the best one after merging is
another than before, they get both. The validation text is the last tenth of the training text. `--other` is text of a
kind the model knew before: what is lost on it was forgotten. With `--chat` the two texts are .jsonl files of
`question` and `answer`, tuned on as chats; losses are those of the answers. What is done already is found in the
results, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

from comparison.arguments import check_count, parse_rate
from comparison.bases import FORMATS
from comparison.bench import Bench
from comparison.cost import measure_cost
from comparison.methods import CENTRES, DEFAULT_METHODS, Method, Unavailable, parse_method
from comparison.store import STATES, Results, best_rate, loss_of
from selection_bench import CONTROLS
from transformers.utils import logging

from peft_sgrq.files.hub import check_source

_COUNTS = ("rates", "steps", "batch_size", "length", "rows", "calibration_rows", "evaluation_rows", "characters")
_EXTENSIONS = 4  # rates added to a sweep at most
_APART = 0.1  # refined rates that differ by less than this, in logarithms, are one


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub name of a causal language model")
    parser.add_argument("--base", default="nf4", help=FORMATS)
    parser.add_argument(
        "--train", required=True, help="a text, a .jsonl file, or a dataset on the Hub (`name:config`)"
    )
    parser.add_argument("--test", required=True, help="held-out text of the same kind")
    parser.add_argument("--other", required=True, help="text of another kind, which the model knew before")
    parser.add_argument("--questions", help="a .jsonl file of `context`, `choices` and `label`")
    parser.add_argument(
        "--column", default="text", help="of a dataset on the Hub; several are joined: question,answer"
    )
    parser.add_argument("--recover", help="a text the model knew: the base is recovered with it before it is tuned")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=list(DEFAULT_METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", type=int, default=3, help="learning rates of a sweep")
    parser.add_argument("--factor", type=float, default=3.0, help="between neighbouring learning rates")
    parser.add_argument("--refine", type=int, default=0, help="rounds of rates on both sides of the best, ever nearer")
    parser.add_argument("--centre", nargs="*", default=[], help=f"middle of the sweep by kind; by default {CENTRES}")
    parser.add_argument("--at", nargs="*", type=float, default=[], help="learning rates to take instead of a sweep")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens in a window, or at most in a chat")
    parser.add_argument("--chat", action="store_true", help="--train and --test are questions and answers of a chat")
    parser.add_argument("--rows", type=int, default=8000, help="lines of questions and answers to read at most")
    parser.add_argument("--calibration-rows", type=int, default=64, help="windows of the training text")
    parser.add_argument("--evaluation-rows", type=int, default=40, help="windows of each text that is evaluated on")
    parser.add_argument("--question-count", type=int, default=64)
    parser.add_argument("--context-length", type=int, default=48, help="tokens kept of the context of a question")
    parser.add_argument("--characters", type=int, default=600_000, help="how much of a text to read")
    parser.add_argument("--results", type=Path, required=True, help="a JSON file to add to")
    parser.add_argument("--cost", action="store_true", help="measure step time and memory of the methods, and stop")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no run after so many seconds")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    methods = [parse_method(name) for name in arguments.methods]
    centres = CENTRES | dict(parse_rate("--centre", text, CENTRES) for text in arguments.centre)
    for name in _COUNTS:
        check_count(f"--{name.replace('_', '-')}", getattr(arguments, name))
    if not all(rate > 0 for rate in arguments.at):
        raise ValueError(f"--at has {arguments.at}, expected learning rates above 0; leave out what is not.")
    check_source(arguments.model, "model")
    arguments.seeds = sorted(set(arguments.seeds))
    results = Results(arguments)
    bench = Bench(arguments)
    if arguments.cost:
        results.setting["cost"] = measure_cost(bench, methods)
        results.save()
        return
    comparison = Comparison(arguments, bench, results, centres)
    if "untrained" not in results.setting:
        for name, model in (("full_precision", bench.load_full_precision()), ("untrained", bench.load())):
            results.setting[name] = bench.losses(model) | bench.answers(model)
        results.save()
    for method in methods:
        if not comparison.complete(method):
            print("The time is up; run the command again to go on.")
            return
    print("Everything is done.")


class Comparison:
    """The runs of a setting that are still to be made."""

    def __init__(
        self, arguments: argparse.Namespace, bench: Bench, results: Results, centres: dict[str, float]
    ) -> None:
        self.arguments, self.bench, self.results, self.centres = arguments, bench, results, centres
        self._end = time.perf_counter() + arguments.limit

    def complete(self, method: Method) -> bool:
        """Makes the missing runs of a method; `False` if the time is up before that."""
        setting, first = self.results.setting, self.arguments.seeds[0]
        if method.name in setting["unavailable"] or method.name in setting["same"]:
            return True
        twin = self._twin(method)
        if twin is not None:
            setting["same"][method.name] = twin
            self.results.save()
            return True
        try:
            for rate in self._sweep(method):
                if not self._run(method, first, rate):
                    return False
        except Unavailable as reason:
            setting["unavailable"][method.name] = str(reason)
            self.results.save()
            return True
        if self.arguments.at:
            rates = set(self.arguments.at)
        else:
            rates = {best_rate(self.results.runs(method.name), state) for state in STATES} - {None}
        return all(self._run(method, seed, rate) for seed in self.arguments.seeds for rate in sorted(rates))

    def _sweep(self, method: Method):
        """The learning rates of a method: those around its centre, then further ones while the best is at an edge."""
        if self.arguments.at:
            yield from self.arguments.at
            return
        factor, count = self.arguments.factor, self.arguments.rates
        tried = [_rounded(self.centres[method.kind] * factor ** (i - count // 2)) for i in range(count)]
        yield from tried
        for _ in range(_EXTENSIONS):
            runs = self.results.runs(method.name, self.arguments.seeds[0])
            runs = [run for run in runs if run["learning_rate"] in tried]
            found = {best_rate(runs, state) for state in STATES}
            if max(tried) in found:
                tried.append(_rounded(max(tried) * factor))
            elif min(tried) in found:
                tried.append(_rounded(min(tried) / factor))
            else:
                break
            yield tried[-1]
        for round_ in range(self.arguments.refine):
            step = factor ** (0.5 ** (round_ + 1))
            runs = self.results.runs(method.name, self.arguments.seeds[0])
            runs = [run for run in runs if run["learning_rate"] in tried]
            centres = {best_rate(runs, state) for state in STATES} - {None}
            nearer = sorted({_rounded(rate * side) for rate in centres for side in (1 / step, step)})
            for rate in nearer:
                if all(abs(math.log(rate / other)) > _APART for other in tried):
                    tried.append(rate)
                    yield rate

    def _run(self, method: Method, seed: int, rate: float) -> bool:
        if self.results.find(method.name, seed, rate) is None:
            if time.perf_counter() > self._end:
                return False
            best = {}
            if seed == self.arguments.seeds[0]:
                earlier = self.results.runs(method.name, seed)
                losses = {state: [loss_of(run, state) for run in earlier if run[state]] for state in STATES}
                best = {state: min(found) for state, found in losses.items() if found}
            run = {"method": method.name, "seed": seed, "learning_rate": rate}
            run |= self.bench.run(method, seed, rate, best)
            self.results.add(run)
            print(json.dumps(run), flush=True)
        return True

    def _twin(self, method: Method) -> str | None:
        """A method done already that selects the same groups: in narrow layers small ratios round to the same."""
        if not method.selects or method.criterion in CONTROLS:
            return None
        mine = self.bench.select(method, self.arguments.seeds[0])
        for name in dict.fromkeys(run["method"] for run in self.results.setting["runs"]):
            other = parse_method(name)
            plain = {**vars(other), "name": "", "ratio": 0} == {**vars(method), "name": "", "ratio": 0}
            if name == method.name or not plain or not other.selects:
                continue
            if self.bench.select(other, self.arguments.seeds[0]) == mine:
                return name
        return None


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


if __name__ == "__main__":
    main()
