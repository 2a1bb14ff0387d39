"""What `recover_low_bits.py` and `recover_then_tune.py` run: a model in few bits, its texts, recovery and losses."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from comparison.bases import hqq_layer
from results_file import ResultsFile, named
from selection_bench import round_to_grid, windows_of
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_sgrq import SGRQConfig, recover
from peft_sgrq.recovery.recover import Recovery

QUANTIZERS = ("rtn", "hqq")
PACKAGES = ("torch", "transformers", "peft", "hqq")
NOT_SHARED = ("bits", "recover", "seeds", "results", "limit", "stream", "learning_rates")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of both scripts."""
    parser.add_argument("model", help="a causal language model, not quantized: a folder or a name on the Hub")
    parser.add_argument(
        "--data", type=Path, required=True, help="a text to recover with, or .jsonl with `text` or question and answer"
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument(
        "--quantizer",
        choices=QUANTIZERS,
        default="rtn",
        help="round-to-nearest on an asymmetric grid, left in plain nn.Linear layers; or HQQ's own layers",
    )
    parser.add_argument("--group-size", type=int, default=64, help="columns per scale")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--samples", type=int, default=128, help="windows to recover with")
    parser.add_argument("--length", type=int, default=128, help="tokens in a window")
    parser.add_argument("--batch-size", type=int, default=8, help="windows in a step")
    parser.add_argument("--evaluation-rows", type=int, default=64, help="windows of each held-out text")
    parser.add_argument("--characters", type=int, default=600_000, help="how much of each text to read")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the samples and their order")
    parser.add_argument("--stream", action="store_true", help="read the reference from its files block by block")
    parser.add_argument("--results", type=Path, required=True, help="a JSON file to add to")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no run after so many seconds")


def settings_of(text: str) -> dict[str, Any]:
    """Arguments of `recover` written as `"epochs=20 augmented=true"`; an empty text stands for its defaults.

    Raises:
        ValueError: If a part is not `name=value`.
    """
    found: dict[str, Any] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is no argument of `recover`, expected name=value, as in 'epochs=20'.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


class Bench:
    """The model, the texts, and what is measured on them.

    Args:
        arguments (`argparse.Namespace`): As `add_arguments` declares them.
        texts (`dict[str, Path]`): Held-out texts by what they are called in the results.

    Attributes:
        data (`torch.Tensor`): All of the text but its last tenth, to recover with: int64 `[windows, length]`.
        parts (`dict[str, torch.Tensor]`): Held-out windows by name; `validation` is the last tenth.
    """

    def __init__(self, arguments: argparse.Namespace, texts: dict[str, Path]) -> None:
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        windows = self.windows(arguments.data)
        held = max(1, len(windows) // 10)
        self.data = windows[:-held]
        rows = arguments.evaluation_rows
        self.parts = {"validation": windows[-held:][:rows]}
        self.parts |= {name: self.windows(path)[:rows] for name, path in texts.items()}

    def windows(self, path: Path) -> torch.Tensor:
        return windows_of(self.tokenizer, path, self.arguments.length, self.arguments.characters)

    # models

    def full(self) -> Any:
        """The model before quantization."""
        arguments = self.arguments
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()

    def quantized(self, bits: int) -> Any:
        """The model with all its linear layers but the head in a number of bits."""
        model, size = self.full(), self.arguments.group_size
        head = model.get_output_embeddings()
        linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        for name, layer in linear.items():
            if layer is head:
                continue
            if self.arguments.quantizer == "rtn":
                layer.weight.data = round_to_grid(layer.weight.data, bits, size)
            else:
                model.set_submodule(name, hqq_layer(layer, bits, size))
        return model

    def config(self, ratio: float = 1.0) -> SGRQConfig:
        return SGRQConfig(ratio=ratio, group_size=self.arguments.group_size, task_type="CAUSAL_LM")

    # what is done with them

    def samples(self, seed: int) -> list[dict[str, torch.Tensor]]:
        """Batches of windows of the data, drawn by the seed."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(1000 + seed))
        rows = self.data[order[: self.arguments.samples]]
        return [
            {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
            for batch in rows.split(self.arguments.batch_size)
        ]

    def recover(self, bits: int, seed: int, settings: dict[str, Any]) -> Recovery:
        """The quantized model, recovered with the samples of a seed."""
        reference = self.arguments.model if self.arguments.stream else self.full()
        return recover(
            self.quantized(bits), reference, self.samples(seed), self.config(), seed=seed, samples=None, **settings
        )

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """The mean loss by token on each held-out text, in nats; perplexity is `exp` of it."""
        model.eval()
        losses = {}
        for part, windows in self.parts.items():
            batches = windows.to(model.device).split(16)
            sums = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches]
            losses[part] = round(sum(sums) / len(windows), 5)
        return losses


class Results(ResultsFile):
    """A JSON file: a list of settings (what the runs in it share), each with the losses of its bases, and its runs.

    Args:
        arguments (`argparse.Namespace`): All of them; `NOT_SHARED` differ by run.
        keys (`tuple[str, ...]`): The fields of a run that say which it is.
    """

    def __init__(self, arguments: argparse.Namespace, keys: tuple[str, ...]) -> None:
        self.keys = keys
        shared = {key: named(value) for key, value in vars(arguments).items() if key not in NOT_SHARED}
        versions = {package: version(package) for package in PACKAGES if package != "hqq" or _uses_hqq(shared)}
        super().__init__(arguments.results, shared, versions, {"bases": {}})

    def base(self, name: str, bench: Bench, load: Any) -> dict[str, float]:
        """The losses of a base, measured if they have not been."""
        if name not in self.setting["bases"]:
            self.setting["bases"][name] = bench.evaluate(load())
            self.save()
        return self.setting["bases"][name]

    def find(self, run: dict[str, Any]) -> dict[str, Any] | None:
        return next((old for old in self.setting["runs"] if all(old[key] == run[key] for key in self.keys)), None)


def _uses_hqq(shared: dict[str, Any]) -> bool:
    return shared["quantizer"] == "hqq"
