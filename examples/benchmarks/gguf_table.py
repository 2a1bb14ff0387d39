"""Tunes a GGUF file by every way there is, and asks llama.cpp what comes out of each.

    python examples/benchmarks/gguf_table.py SmolLM2-135M-Instruct.Q4_1.gguf --train train.jsonl --test test.jsonl \\
        --other wikitext.jsonl --out docs/results/gguf-smollm2.json
    python examples/benchmarks/gguf_table.py --original llama-6m --kind Q4_K_M ...

Methods are trained through TRL's SFTTrainer on the same sequences in the same order, at each of the rates given. Rows
are added to the results file when a training is done; what is there already is not done again, so it can be stopped
at any time. Data files hold JSON lines with `text`, or `question` and `answer`. Needs `pip install xllamacpp`, which
holds llama.cpp. `gguf_report.py` makes Markdown of the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import peft_sgrq
from benchmarks.gguf_files import TYPES, convert, with_changes, write_lora
from benchmarks.llama_cpp import Llama
from benchmarks.results_file import machine, replace_text
from peft_sgrq import SGRQConfig
from peft_sgrq.formats.gguf.file import GGUFFile
from peft_sgrq.formats.gguf.sub_block_scales import scales_of

METHODS: dict[str, Any] = {
    "scales": {"ratio": 1.0},
    "zero points": {"ratio": 0, "zero_points": True},
    "both": {"ratio": 1.0, "zero_points": True},
    "lora": None,
}
RANK = 16


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(args.file) if args.file else convert(Path(args.original), Path(scratch, "base.gguf"), args.kind)
        table = Table(base, args, Path(scratch))
        table.add_base()
        # The first rate of each method first: a table that is stopped compares them all.
        for seed, place in itertools.product(args.seeds, range(max(map(len, args.rates.values())))):
            for method in args.methods:
                for rate in args.rates[method][place : place + 1]:
                    table.add(method, rate, seed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a .gguf file")
    parser.add_argument("--original", help="without FILE: a Llama checkpoint to make it from")
    parser.add_argument("--kind", default="Q4_K_M", choices=TYPES, help="how it is quantized then")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--other", required=True, help="other text, that nothing is trained on")
    parser.add_argument("--out", required=True, help="the JSON file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--test-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast, for CPUs that are fast at it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    for method, rates in {"scales": [1e-2, 2e-2], "zero-points": [1e-2, 2e-2], "both": [1e-2, 2e-2]}.items():
        parser.add_argument(f"--{method}-rates", type=float, nargs="+", default=rates)
    parser.add_argument("--lora-rates", type=float, nargs="+", default=[1e-3, 2e-3])
    args = parser.parse_args()
    args.rates = {
        "scales": args.scales_rates,
        "zero points": args.zero_points_rates,
        "both": args.both_rates,
        "lora": args.lora_rates,
    }
    return args


def read_text(path: str) -> str:
    """The texts of a file of JSON lines, one after the other."""
    entries = map(json.loads, Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"))
    return "\n".join(
        entry["text"] if "text" in entry else f"{entry['question']} {entry['answer']}" for entry in entries
    )


class Table:
    """The rows of a results file, and what is needed to make more."""

    def __init__(self, base: Path, args: argparse.Namespace, scratch: Path) -> None:
        self.base, self.args, self.scratch, self.out = base, args, scratch, Path(args.out)
        found = json.loads(self.out.read_text()) if self.out.exists() else {"settings": self.settings(), "rows": []}
        if found["settings"] != self.settings():
            raise ValueError(f"{self.out} has rows of other settings, expected these to go on; choose another file.")
        self.rows: list[dict[str, Any]] = found["rows"]
        _, self.tokenizer = self._load()
        needed = args.steps * args.batch * args.length
        self.train = self._sequences(args.train, needed)
        self.task = self._sequences(args.test, args.test_tokens)
        self.other = self._sequences(args.other, args.test_tokens)

    def settings(self) -> dict[str, Any]:
        """What all rows of the file share."""
        settings = {
            key: value
            for key, value in vars(self.args).items()
            if key not in ("out", "methods", "seeds") and "rates" not in key
        }
        for key in ("file", "original", "train", "test", "other"):
            settings[key] = settings[key] and "/".join(Path(settings[key]).parts[-2:])
        return settings

    def _load(self) -> tuple[Any, Any]:
        model, tokenizer = peft_sgrq.load_gguf(self.base, dtype=torch.float32)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return model, tokenizer

    def _sequences(self, path: str, count: int) -> list[list[int]]:
        ids = self.tokenizer(read_text(path)[: 8 * count], add_special_tokens=False, verbose=False)["input_ids"]
        length = self.args.length
        return [ids[start : start + length] for start in range(0, min(count, len(ids)) - length + 1, length)]

    def add_base(self) -> None:
        """The file as it is."""
        if not self._has("base", 0.0, 0):
            model, _ = self._load()
            self._save([self._row({"method": "base", "rate": 0.0, "seed": 0}, self._torch(model), self.base)])

    def add(self, method: str, rate: float, seed: int) -> None:
        """Trains by a method at a rate, and adds what llama.cpp makes of it."""
        if self._has(method, rate, seed):
            return
        head = {"method": method, "rate": rate, "seed": seed}
        if method == "lora":
            self._add_lora(head)
            return
        model, _ = self._load()
        config = SGRQConfig(task_type="CAUSAL_LM", **METHODS[method])
        model, seconds = self._trained(model, config, rate, seed)
        measured = self._torch(model)
        out = peft_sgrq.save_gguf(model.merge_and_unload(safe_merge=True), self.scratch / "tuned.gguf", overwrite=True)
        self._save([self._row({**head, **seconds}, measured, out)])

    def _add_lora(self, head: dict[str, Any]) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.base.parent, gguf_file=self.base.name, dtype=torch.float32)
        model.hf_quantizer = model.is_quantized = None  # it is dense; Trainer and PEFT ask
        model.quantization_method = None
        del model.config.quantization_config
        layers = [
            name for name, module in model.named_modules() if "layers." in name and hasattr(module, "in_features")
        ]
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=layers)
        model, seconds = self._trained(model, config, head["rate"], head["seed"])
        measured = self._torch(model)
        head = {**head, **seconds}
        factors, changes = {}, {}
        for name, module in model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
                factors[name] = a, b * module.scaling["default"]
                changes[name] = factors[name][1] @ a
        plain, _ = self._load()
        lora = write_lora(self.base, self.scratch / "lora.gguf", plain, factors)
        rows = [self._row({**head, "way": "at run time (--lora)"}, measured, self.base, lora)]
        exported = with_changes(self.base, self.scratch / "f16.gguf", plain, changes, quantized=False)
        rows.append(self._row({**head, "way": "exported to F16"}, None, exported))
        again = with_changes(self.base, self.scratch / "again.gguf", plain, changes, quantized=True)
        rows.append(self._row({**head, "way": "exported, quantized again"}, None, again))
        if self.args.original:
            merged = AutoModelForCausalLM.from_pretrained(self.args.original, dtype=torch.float32)
            for name, change in changes.items():
                merged.get_submodule(name).weight.data += change
            merged.save_pretrained(self.scratch / "merged")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (self.scratch / "merged" / name).write_bytes(Path(self.args.original, name).read_bytes())
            file = convert(self.scratch / "merged", self.scratch / "merged.gguf", self.args.kind)
            rows.append(self._row({**head, "way": "merged into the original, quantized again"}, None, file))
        self._save(rows)

    def _trained(self, model: Any, config: Any, rate: float, seed: int) -> tuple[Any, dict[str, Any]]:
        args = self.args
        torch.manual_seed(seed)
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed)).tolist()
        trainer = SFTTrainer(
            model=get_peft_model(model, config),
            args=SFTConfig(
                output_dir=str(self.scratch / "trainer"),
                max_steps=args.steps,
                per_device_train_batch_size=args.batch,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                max_length=args.length,
                seed=seed,
                report_to="none",
                save_strategy="no",
                logging_steps=args.steps,
                use_cpu=True,
                bf16=self.args.bf16,
                disable_tqdm=True,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_dict({"input_ids": [self.train[index] for index in order]}),
            processing_class=self.tokenizer,
        )
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        return trainer.model.eval(), {"steps": args.steps, "cpu_seconds": round(seconds, 1), "trained": trained}

    @torch.no_grad()
    def _torch(self, model: Any) -> dict[str, float]:
        model.eval()
        found = {}
        for name, sequences in (("task", self.task), ("other", self.other)):
            losses = [float(model(input_ids=ids, labels=ids).loss) for ids in torch.tensor(sequences).split(8)]
            sizes = [len(ids) for ids in torch.tensor(sequences).split(8)]
            found[name] = math.exp(np.average(losses, weights=sizes))
        return found

    def _row(
        self, row: dict[str, Any], measured: dict[str, float] | None, file: Path, lora: Path | None = None
    ) -> dict[str, Any]:
        llama = Llama(file, lora, context=max(256, self.args.length), threads=self.args.threads)
        found = {name: math.exp(llama.loss(ids)) for name, ids in (("task", self.task), ("other", self.other))}
        speed = llama.tokens_per_second(self.task[0][:64])
        llama.close()
        row = {
            **row,
            "torch": measured,
            "llama.cpp": found,
            "tokens_per_second": round(speed, 1),
            "megabytes": round(file.stat().st_size / 1e6, 2),
            "extra_megabytes": None if lora is None else round(lora.stat().st_size / 1e6, 2),
            "code_bytes_changed": code_bytes_changed(self.base, file),
        }
        print(json.dumps(row), flush=True)
        return row

    def _save(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        names = ("torch", "transformers", "peft", "trl", "gguf", "xllamacpp")
        report = {
            "settings": self.settings(),
            "machine": machine(),
            "versions": {name: version(name) for name in names},
            "rows": self.rows,
        }
        replace_text(self.out, json.dumps(report, indent=1) + "\n")

    def _has(self, method: str, rate: float, seed: int) -> bool:
        return any((row["method"], row["rate"], row["seed"]) == (method, rate, seed) for row in self.rows)


def code_bytes_changed(base: Path, other: Path) -> int | None:
    """How many bytes that are no scales differ between two files; `None` if their types do."""
    before, after = GGUFFile(base), GGUFFile(other)
    count = 0
    for name, info in before.tensors.items():
        if after.tensors[name].ggml_type != info.ggml_type:
            return None
        a, b = before.data(name), after.data(name)
        if info.kind is None:
            count += int((a != b).sum())
            continue
        codes = torch.ones(info.kind.nbytes, dtype=torch.bool)
        codes[scales_of(info.kind, a).scale_bytes] = False
        shape = -1, info.kind.nbytes
        count += int((a.view(shape)[:, codes] != b.view(shape)[:, codes]).sum())
    return count


if __name__ == "__main__":
    main()
