"""Tables of what `recover_low_bits.py`, `recover_then_tune.py` and `recovery_memory.py` found.

python examples/benchmarks/recovery_table.py docs/results/recovery-*.json
python examples/benchmarks/recovery_table.py docs/results/recovery-*.json --update docs/recovery.md

On a page the tables of a file stand between `<!-- NAME.json -->` and `<!-- end of NAME.json -->`.
"""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

from markdown_tables import spell, table
from page_tables import print_or_update
from recover_then_tune import STARTS, best_rate

Run = dict[str, Any]


def main() -> None:
    print_or_update(__doc__, describe)


def describe(found: Any) -> str:
    """Markdown for what a file holds."""
    if isinstance(found, dict):
        return memory(found)
    parts = []
    for setting in found:
        parts += [about(setting), (tuned if "start" in setting["runs"][0] else recovered)(setting)]
    return "\n\n".join(parts)


def about(setting: dict[str, Any]) -> str:
    """The models, the texts, what all runs recover with, and the machine."""
    shared = setting["shared"]
    quantizer = {"rtn": "rounded to nearest", "hqq": "HQQ"}[shared["quantizer"]]
    texts = f"recovered with {shared['samples']} x {shared['length']} tokens of {shared['data']}"
    if "train" in shared:
        texts += (
            f", tuned {shared['steps']} steps of {shared['rows']} x {shared['length']} tokens of {shared['train']}"
        )
    held = f"test is {shared['test']}" + (f", other {shared['other']}" if shared.get("other") else "")
    return (
        f"**{shared['model']}, {quantizer}**, groups of {shared['group_size']}, {shared['dtype']}; {texts}; {held}, "
        f"{shared['evaluation_rows']} windows each. {settings_of_all(setting)}{versions(setting)}"
    )


def settings_of_all(setting: dict[str, Any]) -> str:
    """The arguments of `recover` that are the same in all runs."""
    if "recovery" in setting["shared"]:
        return f"`recover` with `{setting['shared']['recovery'] or 'its defaults'}`. "
    same = shared_settings(setting["runs"])
    return f"All with {spell_settings(same)}. " if same else ""


def shared_settings(runs: list[Run]) -> dict[str, Any]:
    first = runs[0]["recover"]
    return {key: value for key, value in first.items() if all(run["recover"].get(key) == value for run in runs)}


def versions(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found["versions"].items()) + f". {found['machine']}."


def recovered(setting: dict[str, Any]) -> str:
    """Perplexity of the bases and of each way to recover, and the share of the gap that it closed."""
    bases, runs, same = setting["bases"], setting["runs"], shared_settings(setting["runs"])
    texts = [name for name in ("test", "other") if name in bases["full"]]
    head = ["bits", "recovered", *(f"{name}{what}" for name in texts for what in ("", ", gap closed")), "seeds"]
    rows = [
        head,
        ["", "full precision", *(cell for name in texts for cell in (perplexity([bases["full"][name]]), "")), ""],
    ]
    for bits in sorted({run["bits"] for run in runs}):
        base = bases[str(bits)]
        rows.append([str(bits), "no", *(cell for name in texts for cell in (perplexity([base[name]]), "")), ""])
        ways: dict[str, list[Run]] = {}
        for run in runs:
            if run["bits"] == bits:
                different = {key: value for key, value in run["recover"].items() if key not in same}
                ways.setdefault(spell_settings(different) or "yes", []).append(run)
        for way, own in ways.items():
            cells = []
            for name in texts:
                gap = base[name] - bases["full"][name]
                cells += [
                    perplexity([run[name] for run in own]),
                    spell([100 * (base[name] - run[name]) / gap for run in own], 0) + " %",
                ]
            rows.append([str(bits), way, *cells, str(len(own))])
    return table(rows)


def spell_settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in settings.items())


def tuned(setting: dict[str, Any]) -> str:
    """Perplexity before and after tuning from both starts, and the difference in loss seed by seed."""
    runs = setting["runs"]
    rows = [["bits", "start", "learning rate", "test before", "test tuned", "loss less plain", "seeds"]]
    for bits in sorted({run["bits"] for run in runs}):
        chosen = {}
        for start in STARTS:
            own = [run for run in runs if (run["bits"], run["start"]) == (bits, start)]
            rate = best_rate(runs, start, bits, min(run["seed"] for run in own))
            chosen[start] = {run["seed"]: run for run in own if run["learning_rate"] == rate}
        for start, by_seed in chosen.items():
            own = list(by_seed.values())
            less = [
                run["test"] - chosen["plain"][seed]["test"] for seed, run in by_seed.items() if seed in chosen["plain"]
            ]
            rows.append(
                [
                    str(bits),
                    start,
                    f"{own[0]['learning_rate']:g}",
                    perplexity([run["untuned"] for run in own]),
                    perplexity([run["test"] for run in own]),
                    "" if start == "plain" else spell(less),
                    str(len(own)),
                ]
            )
    return f"Full precision, untuned: perplexity {perplexity([setting['bases']['full']['test']])}.\n\n{table(rows)}"


def memory(found: dict[str, Any]) -> str:
    """The most memory of recovery by depth, and the time of a block."""
    shared, times = found["shared"], found["block over forward pass"]
    keys = list(found["rows"][0])
    rows = [[key.replace(" MB", ", MB", 1) for key in keys]]
    rows += [[f"{row[key]:g}" for key in keys] for row in found["rows"]]
    parts = [
        f"Width {shared['width']}, {shared['batches']} x {shared['length']} tokens. {versions(found)}",
        table(rows),
        f"Time of a block, {shared['batches']} x {shared['time_length']} tokens, {shared['epochs']} epochs: "
        f"{times['streamed']:g} forward passes with the reference from disk, "
        f"{times['in memory']:g} with it in memory.",
    ]
    return "\n\n".join(parts)


def perplexity(losses: list[float]) -> str:
    """The mean and the standard deviation over seeds of perplexities, in four digits."""
    values = [math.exp(loss) for loss in losses]
    return spell(values, max(0, 3 - math.floor(math.log10(mean(values)))))


if __name__ == "__main__":
    main()
