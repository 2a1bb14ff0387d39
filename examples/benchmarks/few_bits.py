"""What `rotated_bits.py` and `planned_bits.py` run: a model, its texts, tuning of some numbers, perplexity."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from results_file import ResultsFile, named
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging

PACKAGES = ("torch", "transformers", "compressed-tensors", "peft_sgrq")
Run = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both scripts."""
    parser.add_argument("--model", required=True, help="a dense causal language model: a folder or a name on the Hub")
    parser.add_argument("--test", required=True, help="what perplexity is measured on")
    parser.add_argument("--calibration", required=True, help="another text like it")
    parser.add_argument("--out", required=True, type=Path, help="a JSON file to add to")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, default=8, help="windows of each text that is measured on")
    parser.add_argument("--length", type=int, default=256, help="tokens of those")
    parser.add_argument("--rows", type=int, default=16, help="windows of calibration data, of 128 tokens")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no run after so many seconds")


class Bench:
    """A model, its texts, and the file of results.

    Args:
        arguments (`argparse.Namespace`): As `add_arguments` declares them.
        texts (`dict[str, str]`): More texts to measure on, name -> file.
        apart (`tuple[str, ...]`): The arguments that the runs of a setting do not share, but for those here.
    """

    def __init__(self, arguments: argparse.Namespace, texts: dict[str, str], apart: tuple[str, ...]) -> None:
        logging.disable_progress_bar()
        self.arguments, self._start = arguments, time.perf_counter()
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        paths = {"test": arguments.test, **texts}
        self.parts = {name: self.read(path, arguments.windows, arguments.length) for name, path in paths.items()}
        own = ("out", "seeds", "limit", *apart)
        shared = {name: named(value) for name, value in vars(arguments).items() if name not in own}
        self.file = ResultsFile(arguments.out, shared, {name: version(name) for name in PACKAGES}, {})
        if "full precision" not in self.file.setting:
            self.file.setting["full precision"] = self.perplexity(self.load())

    def load(self) -> Any:
        """The dense model."""
        arguments = self.arguments
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()

    def read(self, path: str, count: int, length: int, seed: int | None = None) -> torch.Tensor:
        """Windows of the texts of a .jsonl file, each begun as a text is: the first, or those of a seed.

        Returns:
            int64 `[count, length]`.
        """
        from datasets import load_dataset

        ids: list[int] = []
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        wanted = count * length * (1 if seed is None else 4)
        for text in load_dataset("json", data_files=path, split="train")["text"]:
            ids += begin + self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if len(ids) >= wanted:
                break
        found = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
        if len(found) < count:
            raise ValueError(f"{path} has {len(found)} windows of {length} tokens, expected {count}; ask for fewer.")
        if seed is None:
            return found[:count]
        return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]]

    @torch.no_grad()
    def perplexity(self, model: Any) -> dict[str, float]:
        """Of each text, by name."""
        model.eval()
        found = {}
        for name, ids in self.parts.items():
            batches = ids.split(4)
            losses = [model(input_ids=x, labels=x, use_cache=False).loss.item() * len(x) for x in batches]
            found[name] = round(math.exp(sum(losses) / len(ids)), 4)
        return found

    def has(self, key: Run) -> bool:
        """Whether a run is in the file already."""
        return any(all(run.get(name) == value for name, value in key.items()) for run in self.file.setting["runs"])

    def time_is_up(self) -> bool:
        return time.perf_counter() - self._start > self.arguments.limit

    def add(self, run: Run) -> None:
        self.file.add(run)
        print(run, flush=True)


def tune(model: Any, parameters: Iterable[nn.Parameter], batches: Iterable[torch.Tensor], rate: float) -> None:
    """Trains some parameters with Adam and a cosine schedule, a step a batch `[B, T]` of tokens."""
    chosen, steps = list(parameters), list(batches)
    optimizer = torch.optim.Adam(chosen, lr=rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(steps) // 20, len(steps))
    model.train()
    for ids in steps:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
