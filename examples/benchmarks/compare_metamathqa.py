"""Methods on the task of PEFT's own comparison: trained on MetaMathQA, asked the questions of GSM8K.

python examples/benchmarks/compare_metamathqa.py --results metamathqa.json
python examples/benchmarks/compare_metamathqa.py --config my.json --results my-results.json

Model, data, prompt, number of steps, batches, lengths, weight decay, schedule and metric are those of
https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA, on a base in NF4 instead of bfloat16; the
answers are generated greedily. Each method is asked before and after its merge, and the loss on Wikipedia text says
what was forgotten. `configs/metamathqa.json` has all of that; a `dataset` may be a .jsonl file as well. It is made for
a GPU. What is done already is found in the results, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from comparison.bases import load_base, targets_of
from comparison.generation import Task, generated_accuracy, text_loss
from comparison.merging import merge
from comparison.methods import Method, Unavailable, adapt, count_trained, parse_method
from comparison.selections import choose, criterion_of
from comparison.store import STATES
from results_file import replace_text
from torch import nn
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging

from peft_sgrq import SGRQConfig, calibrate

CONFIG = Path(__file__).parent / "configs" / "metamathqa.json"
WARMUP = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--methods", nargs="+", help="some of the config's")
    parser.add_argument("--results", type=Path, required=True, help="a JSON file to add to")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    config = json.loads(arguments.config.read_text())
    runs = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    experiment = Experiment(config)
    names = arguments.methods or list(config["methods"])
    if unknown := sorted(set(names) - set(config["methods"])):
        raise ValueError(
            f"--methods has {unknown}, expected some of {list(config['methods'])}; add them, with their learning "
            "rates, to the config."
        )
    setting = {key: value for key, value in config.items() if key not in ("methods", "seeds")}
    for name in names:
        for rate in config["methods"][name]:
            for seed in config["seeds"]:
                key = {"setting": setting, "method": name, "seed": seed, "rate": rate}
                if any(key.items() <= run.items() for run in runs):
                    continue
                try:
                    run = key | experiment.run(parse_method(name), seed, rate)
                except Unavailable as reason:
                    print(f"{name}: {reason}")
                    continue
                runs.append(run)
                replace_text(arguments.results, json.dumps(runs, indent=1) + "\n")
                print(json.dumps(run), flush=True)


class Experiment:
    """The data and the untrained base of a config."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(config["model"])
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.task = Task(config, self.tokenizer)
        self._untrained: dict[str, Any] = {}

    def run(self, method: Method, seed: int, learning_rate: float) -> dict[str, Any]:
        """Trains and merges one method.

        Returns:
            `dict`: `trained` numbers; by state (`untrained`, `tuned`, and `merged`, `None` where PEFT cannot merge)
            the generated accuracy on the `validation` and the `test` questions, and the loss on the `other` text;
            `seconds` of training and `peak` bytes of GPU memory in it.
        """
        config = self.config
        base = load_base(config["model"], config["base"], getattr(torch, config["dtype"]), self.task.texts[:128])
        self._untrained = self._untrained or self.evaluate(base)
        torch.manual_seed(seed)
        targets = targets_of(base)
        model = adapt(base, method, targets, self.select(base, method, targets, seed))
        trained = count_trained(model, method)
        start = time.perf_counter()
        self.fit(model, seed, learning_rate)
        found = {
            "trained": trained,
            "seconds": round(time.perf_counter() - start, 1),
            "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "untrained": self._untrained,
        }
        evaluated = [self.evaluate(model)]
        merged = merge(model, method)
        evaluated.append(None if merged is None else self.evaluate(merged))
        return found | dict(zip(STATES, evaluated, strict=True))

    def select(self, base: Any, method: Method, targets: list[str], seed: int) -> dict[str, str] | None:
        if not method.selects:
            return None
        saliency = calibrate(
            base,
            SGRQConfig(ratio=0.4, target_modules=targets, task_type="CAUSAL_LM"),
            self.task.texts[: self.config["calibration_rows"]],
            tokenizer=self.tokenizer,
            criterion=criterion_of(method),
            max_length=self.config["max_length"],
            batch_size=self.config["batch_size"],
        )
        return choose(saliency, method, seed)

    def fit(self, model: Any, seed: int, learning_rate: float) -> None:
        """AdamW with a cosine schedule; the loss is on question and answer, and on one end-of-text token."""
        config = self.config
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=config["weight_decay"])
        schedule = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * config["steps"]), config["steps"])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        model.train()
        for batch in self.task.batches(config["steps"], config["batch_size"], seed):
            model(**{key: value.to(model.device) for key, value in batch.items()}).loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def evaluate(self, model: Any) -> dict[str, float]:
        model.eval()
        found = {part: generated_accuracy(model, self.task, part) for part in ("validation", "test")}
        return found | {"other": text_loss(model, self.task)}


if __name__ == "__main__":
    main()
