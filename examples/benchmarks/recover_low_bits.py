"""What does recovery give back? Quantizes a model to few bits, recovers it, and compares held-out perplexity.

python examples/benchmarks/recover_low_bits.py MODEL --data TEXT --test TEXT --other TEXT --results results.json
python examples/benchmarks/recovery_table.py results.json

`--test` is held-out text like the data, `--other` text of another kind. `--recover` names ways to recover, each the
arguments of `peft_sgrq.recover` that differ from its defaults: `--recover "" "preservation=0.1" "distill_steps=60"`.
The last tenth of the data is not recovered with; the loss on it is `validation`, to choose settings by.

What is done already is found in the results, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from recovery_bench import Bench, Results, add_arguments, settings_of
from transformers.utils import logging


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--test", type=Path, required=True, help="held-out text of the kind of the data")
    parser.add_argument("--other", type=Path, help="text of another kind")
    parser.add_argument("--recover", nargs="+", default=[""], help="ways to recover")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start = time.perf_counter()
    texts = {"test": arguments.test} | ({"other": arguments.other} if arguments.other else {})
    bench = Bench(arguments, texts)
    results = Results(arguments, ("bits", "seed", "recover"))
    tell("full precision", results.base("full", bench, bench.full))
    for bits in arguments.bits:
        tell(f"{bits} bits", results.base(str(bits), bench, lambda bits=bits: bench.quantized(bits)))
    for seed in arguments.seeds:
        for bits in arguments.bits:
            for way in arguments.recover:
                if time.perf_counter() - start > arguments.limit:
                    print("The time is up; run the command again to go on.")
                    return
                run = {"bits": bits, "seed": seed, "recover": settings_of(way)}
                found = results.find(run)
                if found is None:
                    found = run | recovered(bench, run)
                    results.add(found)
                tell(f"{bits} bits, seed {seed}, recovered {way or 'by default'}", found)
    print("Everything is done.")


def recovered(bench: Bench, run: dict[str, Any]) -> dict[str, Any]:
    """Recovers once: losses, the errors of the blocks, and seconds."""
    recovery = bench.recover(run["bits"], run["seed"], run["recover"])
    found: dict[str, Any] = bench.evaluate(recovery.model)
    found["blocks"] = [[round(block.before, 5), round(block.after, 5)] for block in recovery.blocks]
    if recovery.distillation:
        found["divergence"] = [round(recovery.distillation.before, 4), round(recovery.distillation.after, 4)]
    found["seconds"] = round(recovery.seconds, 1)
    return found


def tell(what: str, found: dict[str, Any]) -> None:
    """Prints perplexities and, of a recovery, how far the blocks' outputs were off before and after."""
    names = [name for name in ("validation", "test", "other") if name in found]
    print(f"{what}: perplexity " + ", ".join(f"{name} {math.exp(found[name]):.2f}" for name in names), flush=True)
    if "blocks" in found:
        details = {key: found[key] for key in ("blocks", "divergence", "seconds") if key in found}
        print(f"  {json.dumps(details)}", flush=True)


if __name__ == "__main__":
    main()
