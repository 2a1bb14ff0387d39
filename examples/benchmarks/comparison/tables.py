"""Tables in Markdown of what `compare_methods.py` found."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean
from typing import Any

from comparison.store import STATES, Run, best_rate
from markdown_tables import spell, table

Setting = dict[str, Any]


def describe(setting: Setting) -> str:
    """A section for one setting: how it was run, a row for each method, and one for each thing that was tried."""
    shared, runs = setting["shared"], setting["runs"]
    versions = ", ".join(f"{name} {number}" for name, number in setting["versions"].items())
    parts = [
        f"### {title(setting)}",
        f"{shared['steps']} steps of {shared['batch_size']} x {shared['length']} tokens, {shared['dtype']}; out of "
        f"domain is {shared['other']}. {versions}. {setting['machine']}.",
        methods_table(setting),
    ]
    notes = [f"{name} selects what {other} does." for name, other in setting["same"].items()]
    notes += [f"{name}: not available." for name in setting["unavailable"]]
    tried = tried_table(runs)
    parts += [" ".join(notes)] if notes else []
    parts += (
        [f"What was tried there; the difference is to the method without it, seed by seed:\n\n{tried}"]
        if tried
        else []
    )
    return "\n\n".join(parts)


def title(setting: Setting) -> str:
    shared = setting["shared"]
    recovered = ", recovered first" if "recover" in shared else ""
    rows = shared.get("evaluation_rows", 0)
    windows = f", {rows} windows" if rows > 100 else ""
    data = shared["train"].split("/")[0]
    return f"{shared['model']}, {shared['base']}{recovered}, {data}, {shared['steps']} steps{windows}"


def methods_table(setting: Setting) -> str:
    """A row for each method: mean and standard deviation over seeds, each state at its own best learning rate."""
    rows = [
        ["method", "learning rate", "trained", "adapter kB"]
        + [f"{what}, {state}" for what in ("in domain", "out of domain", "questions") for state in STATES]
    ]
    for name, key in (("not quantized", "full_precision"), ("base, untrained", "untrained")):
        if key in setting:
            found = setting[key]
            cells = [_number(found["test"]), "", _number(found["other"]), "", _percent([found.get("accuracy")]), ""]
            rows.append([name, "", "", "", *cells])
    for method in methods_of(setting["runs"]):
        if ":" in method:
            continue
        by_state = {state: best_runs(setting["runs"], method, state) for state in STATES}
        one = next(iter(by_state["tuned"].values()))
        rates = dict.fromkeys(f"{run['learning_rate']:g}" for found in by_state.values() for run in found.values())
        cells = [method, ", ".join(rates), f"{one['trained']:,}", f"{one['adapter_bytes'] / 1000:.0f}"]
        for part in ("test", "other"):
            cells += [spell(values(by_state[state], state, part)) for state in STATES]
        cells += [_percent(values(by_state[state], state, "accuracy")) for state in STATES]
        rows.append(cells)
    return table(rows)


def tried_table(runs: list[Run]) -> str:
    """A row for each method with options (`sgrq-0.4:exp`): merged losses, less those of the plain method.

    Both at their own best learning rates, and where the plain one was run with all seeds at the rate of the other, at
    the same rate. What PEFT cannot merge is left out.
    """
    both = ("in domain", "out of domain")
    heads = ("learning rates", "trained", *(f"{part}, merged" for part in both))
    rows = [
        ["tried", *heads, *(f"less plain, {part}" for part in both), *(f"at the same rate, {part}" for part in both)]
    ]
    for method in methods_of(runs):
        own = best_runs(runs, method, "merged")
        if ":" not in method or not own:
            continue
        name, one = method.partition(":")[0], next(iter(own.values()))
        plain = best_runs(runs, name, "merged")
        alike = [run for run in runs if (run["method"], run["learning_rate"]) == (name, one["learning_rate"])]
        same = {run["seed"]: run for run in alike}
        rates = [f"{next(iter(found.values()))['learning_rate']:g}" for found in (own, plain) if found]
        cells = [method, ", plain ".join(rates), f"{one['trained']:,}"]
        cells += [spell(values(own, "merged", part)) for part in ("test", "other")]
        for others in (plain, same if set(same) == set(own) else {}):
            cells += [spell(differences(own, others, part), sign="+") for part in ("test", "other")]
        rows.append(cells)
    return table(rows) if len(rows) > 1 else ""


def summary_table(settings: Iterable[Setting]) -> str:
    """After merging, in each setting: the best LoRA, SGRQ and PEQA in domain, and the methods on the front.

    The best are chosen by validation loss. "LoRA into the original" is the best of those merged into the weights
    before quantization.
    """
    bests = ("best LoRA", "LoRA into the original", "best SGRQ below 1.0", "PEQA")
    less = ("SGRQ less LoRA", "PEQA less LoRA", "the same out of domain")
    rows = [["setting", "base", *bests, *less, "on the front"]]
    for setting in settings:
        runs = setting["runs"]
        plain = [name for name in methods_of(runs) if ":" not in name]
        groups = {
            "lora": loras(runs),
            "original": loras(runs, "original"),
            "sgrq": [name for name in plain if name.startswith("sgrq-")],
            "peqa": [name for name in plain if name == "peqa"],
        }
        best = {key: best_method(runs, names) for key, names in groups.items()}
        found = {key: best_runs(runs, name, "merged") for key, name in best.items() if name is not None}
        if not {"lora", "peqa"} <= set(found):
            continue
        cells = [title(setting), _number(setting["untrained"]["test"])]
        for key in groups:
            name = "" if key == "peqa" else f"{(best[key] or '').partition(':')[0]}: "
            cells.append(name + spell(values(found[key], "merged", "test")) if key in found else "")
        others = [found[key] for key in ("sgrq", "peqa") if key in found]
        pairs = [
            [spell(differences(own, found["lora"], part), sign="+") for own in others] for part in ("test", "other")
        ]
        cells += [*([""] * (2 - len(others))), *pairs[0], ", ".join(pairs[1]), ", ".join(front(runs))]
        rows.append(cells)
    return table(rows)


def exactness(settings: Iterable[Setting]) -> str:
    """In how many runs the merged model gave the logits of the tuned one, bit for bit."""
    merged = [run for setting in settings for run in setting["runs"] if run["merged"] is not None]
    scales = [run for run in merged if run["method"].startswith(("sgrq-", "peqa", "random-", "bottom-"))]
    plain = [run for run in scales if ":zeros" not in run["method"]]
    others = [run for run in merged if run["method"].startswith("lora-")]
    counts = [f"{sum(run['same_bits'] for run in found)} of {len(found)}" for found in (plain, others)]
    return f"Merged gave the logits of tuned, bit for bit, in {counts[0]} runs of scales and in {counts[1]} of LoRA."


def cost_table(settings: Iterable[Setting]) -> str:
    """Step time and peak memory of each method, over those of lora-16 in the same setting."""
    measured = [setting for setting in settings if "lora-16" in setting.get("cost", {})]
    names = dict.fromkeys(name for setting in measured for name in setting["cost"])
    heads = [title(setting).rpartition(", ")[0] for setting in measured]
    rows = [["method", *(f"{head}: {what}" for head in heads for what in ("step", "peak memory", "kept"))]]
    for name in names:
        cells = [name]
        for setting in measured:
            own, other = setting["cost"].get(name), setting["cost"]["lora-16"]
            cells += [f"{own[key] / other[key]:.2f}" if own else "" for key in ("step", "peak", "kept")]
        rows.append(cells)
    return table(rows) if measured else ""


def methods_of(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in runs))


def loras(runs: list[Run], option: str = "") -> list[str]:
    """The methods that are LoRA with just this option; by default with none."""
    return [name for name in methods_of(runs) if name.startswith("lora-") and name.partition(":")[2] == option]


def best_runs(runs: list[Run], method: str, state: str) -> dict[int, Run]:
    """By seed the runs of a method at the learning rate that is best in a state; empty if it has no such state."""
    own = [run for run in runs if run["method"] == method]
    rate = best_rate(own, state)
    return {run["seed"]: run for run in own if run["learning_rate"] == rate} if rate is not None else {}


def best_method(runs: list[Run], names: list[str]) -> str | None:
    """Of some methods the one with the lowest mean validation loss after merging."""
    means = {}
    for name in names:
        found = values(best_runs(runs, name, "merged"), "merged", "validation")
        if found and None not in found:
            means[name] = mean(found)
    return min(means, key=means.__getitem__) if means else None


def front(runs: list[Run]) -> list[str]:
    """Methods that no other beats both in and out of domain after merging (means over seeds); options left out."""
    points = {}
    for name in methods_of(runs):
        found = best_runs(runs, name, "merged")
        losses = [values(found, "merged", part) for part in ("test", "other")]
        if ":" not in name and losses[0] and None not in losses[0] + losses[1]:
            points[name] = (mean(losses[0]), mean(losses[1]))
    return [
        name
        for name, (test, other) in points.items()
        if not any(a <= test and b <= other and (a, b) != (test, other) for a, b in points.values())
    ]


def values(runs: dict[int, Run], state: str, key: str) -> list[Any]:
    """What the runs have under a key, by seed in order; only of those that have it."""
    return [runs[seed][state][key] for seed in sorted(runs) if runs[seed][state] and key in runs[seed][state]]


def differences(one: dict[int, Run], other: dict[int, Run], key: str) -> list[float]:
    """Seed by seed, after merging."""
    pairs = [(one[seed]["merged"][key], other[seed]["merged"][key]) for seed in sorted(set(one) & set(other))]
    return [a - b for a, b in pairs if a is not None and b is not None]


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.3f}"


def _percent(numbers: list[float | None]) -> str:
    found = [number for number in numbers if number is not None]
    return f"{100 * mean(found):.0f} %" if found else ""
