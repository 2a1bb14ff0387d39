"""What a training step of each method costs: time and memory, methods in turn in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comparison.bench import Bench
from comparison.data import inputs_of
from comparison.methods import Method, Unavailable
from measure import clock, in_turn, kept_bytes, peak_bytes


def measure_cost(bench: Bench, methods: list[Method], repeats: int = 15) -> dict[str, dict[str, float]]:
    """By method the median seconds of a step (CPU time on a CPU), its peak memory and what autograd keeps, in bytes.

    Args:
        bench (`Bench`): The setting; a step is one of its batches.
        methods (`list[Method]`): Which; those PEFT does not have for the base are left out.
        repeats (`int`): Steps measured of each.
    """
    device = bench.load().device
    seconds = clock(device)
    inputs = inputs_of(bench.train[: bench.arguments.batch_size].to(device))
    models: dict[str, tuple[Any, torch.optim.Optimizer]] = {}
    for method in methods:
        try:
            model = bench.adapted(method, 0).train()
        except Unavailable:
            continue
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        models[method.name] = model, torch.optim.AdamW(trained, lr=1e-6)

    def step(name: str) -> dict[str, float]:
        model, optimizer = models[name]
        start = seconds()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"step": seconds() - start}

    def job(name: str) -> Callable[[], dict[str, float]]:
        return lambda: step(name)

    found = in_turn({name: job(name) for name in models}, repeats)
    result = {}
    for name, (model, _) in models.items():
        kept = kept_bytes(model(**inputs).loss, model)
        peak = peak_bytes(job(name), device)
        result[name] = {"step": round(found[name]["step"]["median"], 5), "peak": peak, "kept": kept}
    return result
