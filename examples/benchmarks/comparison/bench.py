"""A setting of `compare_methods.py`: its base, its data and selections, and the run of one method."""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from comparison.bases import load_base, targets_of
from comparison.data import inputs_of, read_chats, read_questions, read_windows
from comparison.evaluation import accuracy, label_loss, mean_loss
from comparison.merging import merge, merge_into_original
from comparison.methods import Method, Unavailable, adapt, count_trained
from comparison.selections import choose, criterion_of
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoTokenizer, get_scheduler

from peft_sgrq import SGRQConfig, calibrate, recover
from peft_sgrq.selection.saliency import Saliency

WARMUP = 0.1
_RECOVERY_ROWS = 128  # windows


class Bench:
    """The base, the data and the selections of a setting; each is made once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        train = self._read(arguments.train, "train")
        held = len(train) // 10
        if held == 0:
            raise ValueError(
                f"The training text has {len(train)} windows of {arguments.length} tokens, expected at least 10, the "
                "last tenth of which is for validation; give a longer one, or lower --length."
            )
        self.train = train[:-held]
        self.parts = {
            "validation": train[-held:][: arguments.evaluation_rows],
            "test": self._read(arguments.test, "test")[: arguments.evaluation_rows],
            "other": self._windows(arguments.other, "test")[: arguments.evaluation_rows],
        }
        self.questions = None
        if arguments.questions is not None:
            self.questions = read_questions(
                self.tokenizer, Path(arguments.questions), arguments.question_count, arguments.context_length
            )
        rows = inputs_of(self.train[: arguments.calibration_rows])["input_ids"]
        self._texts = [self.tokenizer.decode(row) for row in rows]
        known = None if arguments.recover is None else self._windows(arguments.recover, "train")[:_RECOVERY_ROWS]
        self._base = load_base(arguments.model, arguments.base, getattr(torch, arguments.dtype), self._texts)
        self.targets = targets_of(self._base)
        if known is not None:
            self._base = self._recovered(self._base, known)
        self._saliency: dict[tuple[str, int], Saliency] = {}
        self._trained: dict[tuple[Method, int, float], dict[str, torch.Tensor]] = {}

    def _read(self, source: str, split: str) -> torch.Tensor:
        """The text that is tuned on: chats, if it is to be read as such."""
        arguments = self.arguments
        if arguments.chat:
            return read_chats(self.tokenizer, Path(source), arguments.length, arguments.rows)
        return self._windows(source, split)

    def _windows(self, source: str, split: str) -> torch.Tensor:
        arguments = self.arguments
        return read_windows(self.tokenizer, source, split, arguments.length, arguments.characters, arguments.column)

    def _recovered(self, base: Any, rows: torch.Tensor) -> Any:
        """The base with scales that give back what quantization took, merged."""
        batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in rows.split(4)]
        config = SGRQConfig(ratio=1.0, target_modules=self.targets, task_type="CAUSAL_LM")
        found = recover(base, self.load_full_precision(), batches, config, distill_steps=64, progress=False)
        return found.model.merge_and_unload()

    def load(self) -> Any:
        """A copy of the untrained base."""
        return copy.deepcopy(self._base)

    def load_full_precision(self) -> Any:
        """The model as its checkpoint has it (a quantized one in its own format)."""
        return load_base(self.arguments.model, "as-is", getattr(torch, self.arguments.dtype), [])

    # selections

    def select(self, method: Method, seed: int) -> dict[str, str] | None:
        """Layer -> mask of the groups a method selects; `None` if it selects all, or is not SGRQ."""
        if not method.selects:
            return None
        return choose(self._calibrated(criterion_of(method), seed), method, seed)

    def _calibrated(self, criterion: str, seed: int) -> Saliency:
        if (criterion, seed) not in self._saliency:
            order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(1000 + seed))
            rows = self.train[order[: self.arguments.calibration_rows]]
            batches = [inputs_of(batch) for batch in rows.split(8)]
            batches = [
                {"input_ids": batch["input_ids"]}
                | {"attention_mask": batch.get("attention_mask", torch.ones_like(batch["input_ids"]))}
                for batch in batches
            ]
            config = SGRQConfig(ratio=0.4, target_modules=self.targets, task_type="CAUSAL_LM")
            self._saliency[criterion, seed] = calibrate(
                self.load(), config, batches, criterion=criterion, progress=False
            )
        return self._saliency[criterion, seed]

    # runs

    def adapted(self, method: Method, seed: int) -> Any:
        """The base with the untrained adapter of a method."""
        torch.manual_seed(seed)  # of LoRA's A
        return adapt(self.load(), method, self.targets, self.select(method, seed))

    def run(self, method: Method, seed: int, learning_rate: float, best: dict[str, float]) -> dict[str, Any]:
        """Trains and merges one method.

        Args:
            method (`Method`): Which.
            seed (`int`): Of the order of the data, calibration rows, random selections and LoRA's A.
            learning_rate (`float`): Peak of the schedule.
            best (`dict[str, float]`): The lowest validation loss so far by state, "tuned" and "merged". Where a run is
                better, or there is none, the questions are asked as well.

        Returns:
            `dict`: `trained` numbers, `adapter_bytes`, by state losses and the answers (`merged` is `None` where PEFT
            cannot merge), `same_bits` (whether tuned and merged model give the same logits), `seconds`.
        """
        start = time.perf_counter()
        model = self.adapted(method, seed)
        trained = count_trained(model, method)
        size = 4 * trained if method.tied else _adapter_bytes(model)
        self._fit_once(model, method, seed, learning_rate)
        tuned = self.losses(model)
        if _is_better(tuned, best.get("tuned")):
            tuned |= self.answers(model)
        probe = inputs_of(self.parts["validation"][:4].to(model.device))
        logits = _logits(model, probe)
        merged_model, merged, same = self.merged(model, method), None, False
        if merged_model is not None:
            merged_model.eval()
            same = torch.equal(_logits(merged_model, probe), logits)
            merged = dict(tuned) if same else self.losses(merged_model)
            if not same and _is_better(merged, best.get("merged")):
                merged |= self.answers(merged_model)
        return {
            "trained": trained,
            "adapter_bytes": size,
            "tuned": tuned,
            "merged": merged,
            "same_bits": same,
            "seconds": round(time.perf_counter() - start, 1),
        }

    def merged(self, model: Any, method: Method) -> Any | None:
        """The model with its adapter merged; `None` where PEFT cannot."""
        if not method.original:
            return merge(model, method)
        arguments = self.arguments
        if arguments.base == "as-is" or arguments.recover is not None:
            raise Unavailable(f"The base {arguments.base!r}, recovered or as it is, cannot be made of other weights.")
        return merge_into_original(model, arguments.model, self.tokenizer, arguments.base, self._texts)

    def _fit_once(self, model: Any, method: Method, seed: int, learning_rate: float) -> None:
        """Trains an adapter of LoRA, or takes the one trained already: the same training is merged in two ways."""
        key = (replace(method, name="", original=False), seed, learning_rate)
        if key in self._trained:
            set_peft_model_state_dict(model, self._trained[key])
            model.eval()
            return
        self.fit(model, method, seed, learning_rate)
        if method.kind == "lora":
            self._trained[key] = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}

    def fit(self, model: Any, method: Method, seed: int, learning_rate: float) -> None:
        """Trains what requires a gradient: AdamW, 10 % warm-up, gradients clipped at norm 1."""
        arguments = self.arguments
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        betas = (method.beta, 0.999)
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=method.decay)
        name = "constant_with_warmup" if method.schedule == "constant" else method.schedule
        schedule = get_scheduler(name, optimizer, int(WARMUP * arguments.steps), arguments.steps)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        for _ in range(arguments.steps):
            batch = self.train[torch.randint(len(self.train), (arguments.batch_size,), generator=generator)]
            label_loss(model, inputs_of(batch.to(model.device))).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()

    def losses(self, model: Any) -> dict[str, float | None]:
        """Losses on the validation split, the `test` text, and the `other` one, out of domain; `None`: diverged."""
        model.eval()
        return {part: mean_loss(model, windows) for part, windows in self.parts.items()}

    def answers(self, model: Any) -> dict[str, float]:
        """`accuracy` on the questions, if there are any."""
        return {} if self.questions is None else {"accuracy": accuracy(model, self.questions)}


def _is_better(losses: dict[str, float | None], best: float | None) -> bool:
    return best is None or (losses["validation"] is not None and losses["validation"] < best)


def _adapter_bytes(model: Any) -> int:
    tensors = get_peft_model_state_dict(model).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits
