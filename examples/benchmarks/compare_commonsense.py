"""Are 40 % of the scales better than all of them? Multiple-choice tasks before and after tuning on some of them.

python examples/benchmarks/compare_commonsense.py DATA MODEL --results results.json --save adapters
python examples/benchmarks/compare_commonsense.py DATA --results results.json --table

SGR-Q claims that 40 % of the scales, chosen by `obs`, beat all of them by 2.5 % on six commonsense tasks. DATA is a
folder of `NAME.train.jsonl` and `NAME.test.jsonl`, whose rows have `question`, `choices` and `answer`, the index of
the right choice: a task joins as a file. All adapters are tuned on the same rows of `--train-tasks`, by default all
that have a train file, and asked `--tasks`, by default all that have a test file. Answers are chosen by
log-likelihood, after merging. What is done is found in the results, and adapters in the folder `--save`: with further
tasks the same command asks those alone and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from comparison.arguments import check_count, parse_rate
from comparison.bases import FORMATS, load_base, targets_of
from comparison.commonsense import Question, answered, read_task, tasks_of, training_batches
from comparison.commonsense_table import accuracy_table
from comparison.data import existing
from comparison.evaluation import label_loss
from comparison.methods import Method, adapt, count_trained, parse_method
from comparison.selections import choose, criterion_of
from comparison.store import version_of
from peft import PeftModel
from results_file import ResultsFile, named
from torch import nn
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging

from peft_sgrq import SGRQConfig, calibrate
from peft_sgrq.files.hub import check_source

_METHODS = ("peqa", "sgrq-0.4", "sgrq-0.4:diag", "random-0.4", "lora-16")
_RATES = {"sgrq": 6e-3, "lora": 1e-3}
_OPTIONS = {"train": "train_tasks", "test": "tasks"}
_NOT_SHARED = ("data", "methods", "seeds", "rate", "tasks", "results", "save", "table", "limit")
_NOT_OF_TRAINING = ("questions",)  # of what is shared: an adapter is the same however many are asked of it
_RECORD = "trained_with.json"  # beside an adapter
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of NAME.train.jsonl and NAME.test.jsonl")
    parser.add_argument(
        "model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="directory or Hub name"
    )
    parser.add_argument("--base", default="nf4", help=FORMATS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--tasks", nargs="+", help="to be asked; by default all with a test file")
    parser.add_argument("--train-tasks", nargs="+", help="to be tuned on; by default all with a train file")
    parser.add_argument("--methods", nargs="+", default=list(_METHODS), help="names as compare_methods.py has them")
    parser.add_argument("--rate", nargs="*", default=[], help="KIND=RATE; by default sgrq=6e-3 and lora=1e-3")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--calibration-rows", type=int, default=64, help="training rows")
    parser.add_argument("--questions", type=int, default=500, help="of each task at most; 0 asks all")
    parser.add_argument("--results", type=Path, required=True, help="a JSON file to add to")
    parser.add_argument("--save", type=Path, help="a folder of adapters, to be made, or to be used again")
    parser.add_argument("--table", action="store_true", help="print the table of the results, and stop")
    parser.add_argument("--limit", type=float, default=float("inf"), help="start nothing after so many seconds")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.table:
        print("\n\n".join(map(accuracy_table, json.loads(existing(arguments.results).read_text()))))
        return
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_grad_enabled(True)
    methods = [_checked(parse_method(name)) for name in arguments.methods]
    rates = _RATES | dict(parse_rate("--rate", text, _RATES) for text in arguments.rate)
    for name in ("steps", "batch_size", "calibration_rows"):
        check_count(f"--{name.replace('_', '-')}", getattr(arguments, name))
    if arguments.questions < 0:
        raise ValueError(f"--questions is {arguments.questions}, expected a number of questions, or 0 to ask all.")
    for split in ("train", "test"):
        found = getattr(arguments, _OPTIONS[split]) or tasks_of(arguments.data, split)
        if not found:
            raise ValueError(
                f"{str(arguments.data)!r} has no file NAME.{split}.jsonl, expected one; correct the folder."
            )
        setattr(arguments, _OPTIONS[split], sorted(found))
    check_source(arguments.model, "model")
    study = Study(arguments)
    jobs = [None, *((method, seed, rates[method.kind]) for seed in arguments.seeds for method in methods)]
    for job in jobs:
        study.check(job)
    end = time.perf_counter() + arguments.limit
    for job in jobs:
        if time.perf_counter() > end:
            print("The time is up; run the command again to go on.")
            return
        study.complete(job)
    print("Everything is done.")


def _checked(method: Method) -> Method:
    """A method that is tuned, saved and merged here as its name says."""
    plain = not (method.original or method.tied) and (method.form, method.schedule) == ("relative", "cosine")
    if method.kind not in _RATES or not plain:
        raise ValueError(
            f"The method {method.name!r} is not run here, expected LoRA or SGRQ by a cosine schedule, such as "
            "lora-16, peqa, sgrq-0.4:diag or peqa:zeros; compare_methods.py has the others."
        )
    return method


Job = tuple[Method, int, float]


def _key(job: Job | None) -> dict[str, Any]:
    """What the results know a job by; without one that is the base."""
    method, seed, rate = (None, None, None) if job is None else job
    return {"method": "untrained" if method is None else method.name, "seed": seed, "learning_rate": rate}


class Study:
    """The tasks, the base, and what was found so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        count = arguments.questions or None
        self.train = {name: self._read(name, "train") for name in arguments.train_tasks}
        self.tests = {name: self._read(name, "test", count) for name in arguments.tasks}
        shared = {key: named(value) for key, value in vars(arguments).items() if key not in _NOT_SHARED}
        self.training = {key: value for key, value in shared.items() if key not in _NOT_OF_TRAINING}
        versions = {name: version_of(name) for name in _PACKAGES}
        self.results = ResultsFile(arguments.results, shared, versions, {})

    def _read(self, task: str, split: str, count: int | None = None) -> list[Question]:
        return read_task(self.tokenizer, self.arguments.data / f"{task}.{split}.jsonl", count)

    def check(self, job: Job | None) -> None:
        """Refuses what is there of a job and belongs to other questions, or to a training with other settings."""
        run = self._known(_key(job))
        known = {} if run is None else run["tasks"]
        for name in known.keys() & self.tests.keys():
            asked, there = len(known[name]["sum"]), len(self.tests[name])
            if asked != there:
                raise ValueError(
                    f"{self.arguments.results} has answers to {asked} questions of {name!r}, expected {there}, as its "
                    "file has now; give that a name of its own, or --results another file."
                )
        folder = self._folder(job)
        if folder is None or not folder.exists():
            return
        record = folder / _RECORD
        found = json.loads(record.read_text()) if record.is_file() else {}
        other = {key: found.get(key) for key, value in self.training.items() if found.get(key) != value}
        if other:
            expected = {key: self.training[key] for key in other}
            raise ValueError(
                f"The adapter in {str(folder)!r} was trained with {other} by its {_RECORD}, expected {expected}; give "
                "--save another folder, or the arguments it was trained with."
            )

    def _known(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """What the results have of an adapter."""
        return next((run for run in self.results.setting["runs"] if key.items() <= run.items()), None)

    def _folder(self, job: Job | None) -> Path | None:
        if job is None or self.arguments.save is None:
            return None
        method, seed, rate = job
        return self.arguments.save / f"{method.name.replace(':', '-')}-{rate:g}-seed{seed}"

    def complete(self, job: Job | None) -> None:
        """Asks the tasks that were not asked yet of an adapter; without one, of the base."""
        key = _key(job)
        run = self._known(key)
        missing = [name for name in self.tests if run is None or name not in run["tasks"]]
        if not missing:
            return
        model, found = self._base(), key | {"tasks": {}}
        if job is not None:
            model, trained = self._tuned(model, *job)
            found["trained"] = trained
            model = model.merge_and_unload().eval()
        if run is None:
            run = found
            self.results.setting["runs"].append(run)
        for name in missing:
            run["tasks"][name] = answered(model, self.tests[name])
            self.results.save()
            right = run["tasks"][name]["sum"]
            print(f"{key['method']} {key['seed']} {name}: {right.count('1')} of {len(right)}", flush=True)

    def _base(self) -> Any:
        arguments = self.arguments
        return load_base(arguments.model, arguments.base, getattr(torch, arguments.dtype), [])

    def _tuned(self, model: Any, method: Method, seed: int, rate: float) -> tuple[Any, int]:
        """The base with the adapter of a job, found in the folder or trained, and how many numbers that trains."""
        folder = self._folder((method, seed, rate))
        if folder is not None and folder.exists():
            loaded = PeftModel.from_pretrained(model, folder, is_trainable=True)
            return loaded.eval(), count_trained(loaded, method)
        targets = targets_of(model)
        selection = self._selection(model, method, targets, seed)
        torch.manual_seed(seed)
        tuned = adapt(model, method, targets, selection)
        self._fit(tuned, method, seed, rate)
        if folder is not None:
            self._keep(tuned, folder)
        return tuned, count_trained(tuned, method)

    def _keep(self, tuned: Any, folder: Path) -> None:
        """Saves an adapter, the whole of it or nothing, with what it was trained with."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as scratch:
            written = Path(scratch, folder.name)
            tuned.save_pretrained(written)
            (written / _RECORD).write_text(json.dumps(self.training, indent=1) + "\n")
            written.rename(folder)

    def _selection(self, model: Any, method: Method, targets: list[str], seed: int) -> dict[str, str] | None:
        if not method.selects:
            return None
        rows = self.arguments.calibration_rows
        batches = list(training_batches(self.train, self._end, rows // 8 or 1, min(rows, 8), 1000 + seed))
        config = SGRQConfig(ratio=0.4, target_modules=targets, task_type="CAUSAL_LM")
        return choose(calibrate(model, config, batches, criterion=criterion_of(method), progress=False), method, seed)

    @property
    def _end(self) -> int:
        return self.tokenizer.eos_token_id

    def _fit(self, model: Any, method: Method, seed: int, rate: float) -> None:
        """AdamW, by default without weight decay, cosine schedule, 10 % warm-up, gradients clipped at norm 1."""
        arguments = self.arguments
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(method.beta, 0.999), weight_decay=method.decay)
        schedule = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 10, arguments.steps)
        model.train()
        for batch in training_batches(self.train, self._end, arguments.steps, arguments.batch_size, seed):
            label_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()


if __name__ == "__main__":
    main()
