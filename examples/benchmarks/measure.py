"""Measuring: things in turn in one process, medians, bytes that autograd keeps, peak memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def cpu() -> tuple[str, list[str]]:
    """The CPU's name, and which of the instructions it has that decide how fast products are."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), "")
    return name, [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in text]


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of this process's CPU time on a CPU (other processes do not count), of the wall clock on a GPU."""
    if device.type == "cpu":
        return time.process_time

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def in_turn(
    jobs: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int, warmup: int = 2
) -> dict[str, dict[str, dict[str, float]]]:
    """Runs each job once, then each again, and so on, so that whatever slows the machine slows all of them.

    Args:
        jobs (`Mapping`): Name -> a function that returns measured values by name.
        repeats (`int`): How often each is measured.
        warmup (`int`): How often each runs before that.

    Returns:
        name -> value's name -> `median`, `low` and `high` (the quartiles).
    """
    values: dict[str, dict[str, list[float]]] = {name: {} for name in jobs}
    for round_ in range(warmup + repeats):
        for name, job in jobs.items():
            measured = job()
            if round_ >= warmup:
                for key, value in measured.items():
                    values[name].setdefault(key, []).append(value)
    return {name: {key: spread(found) for key, found in by_key.items()} for name, by_key in values.items()}


def spread(values: list[float]) -> dict[str, float]:
    """The median and the quartiles of some values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def kept_bytes(output: torch.Tensor, model: nn.Module) -> int:
    """Bytes that the graph of an output keeps for its backward pass, beside the tensors of the model.

    Args:
        output (`torch.Tensor`): What a forward pass returned.
        model (`nn.Module`): The model; its parameters and buffers do not count.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages: dict[int, torch.Tensor] = {}
    seen, nodes = set(), [output.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += list(getattr(node, "saved_tensors", ()))
        for value in saved:
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor
    return sum(tensor.untyped_storage().nbytes() for place, tensor in storages.items() if place not in own)


def peak_bytes(job: Callable[[], Any], device: torch.device) -> int:
    """The most memory that tensors made by a job took at once, beside what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        job()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        job()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
