"""Questions answered by generating, and the texts around them: what `compare_metamathqa.py` trains and asks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

_ANSWER = re.compile(r"(?:answer is:?|####)\s*([^\n]*)")


class Task:
    """The texts of a config: training texts as prompt and answer, questions, and text of another kind.

    Attributes:
        config (`dict`): As `configs/metamathqa.json`.
        tokenizer: With a padding token.
        texts (`list[str]`): What is trained on.
        questions (`dict[str, list[tuple[str, str]]]`): Of "validation" and "test", prompts and answers.
        other (`list[str]`): Texts to see what was forgotten.
    """

    def __init__(self, config: dict[str, Any], tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.texts = [prompt + answer for prompt, answer in self._pairs("train")]
        self.questions = {part: self._pairs(part) for part in ("validation", "test")}
        self.other = [row[config["other"]["columns"][0]] for row in read_rows(config["other"])]

    def _pairs(self, part: str) -> list[tuple[str, str]]:
        settings = self.config[part]
        question, answer = settings["columns"]
        rows = [(row[question], row[answer]) for row in read_rows(settings)]
        limit = settings.get("characters", float("inf"))
        return [(self.config["prompt"].format(question=q), a) for q, a in rows if len(f"{q} {a}") <= limit]

    def batches(self, steps: int, size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """So many batches of padded texts with labels, in an order of that seed; a batch has texts of like length."""
        generator = torch.Generator().manual_seed(seed)
        made = 0
        while made < steps:
            order = torch.randperm(len(self.texts), generator=generator).tolist()
            for start in range(0, len(order), 20 * size):  # sorted within twenty batches, to pad less
                near = sorted(order[start : start + 20 * size], key=lambda index: len(self.texts[index]))
                for first in range(0, len(near), size):
                    if made == steps:
                        return
                    made += 1
                    yield self._batch([self.texts[index] for index in near[first : first + size]])

    def _batch(self, texts: list[str]) -> dict[str, torch.Tensor]:
        end, longest = self.tokenizer.eos_token_id, self.config["max_length"]
        rows = [torch.tensor([*self.tokenizer(text).input_ids, end][:longest]) for text in texts]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
            "labels": pad(rows, batch_first=True, padding_value=-100),
        }


def read_rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, or of a dataset on the Hub (`name` or `name:config`), at most `rows` of them."""
    count = settings.get("rows")
    if Path(settings["dataset"]).suffix == ".jsonl":
        lines = Path(settings["dataset"]).read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line][:count]
    from datasets import load_dataset

    name, _, config = settings["dataset"].partition(":")
    found = load_dataset(name, config or None, split=settings["split"], streaming=count is not None)
    return list(found.take(count)) if count is not None else list(found)


@torch.no_grad()
def generated_accuracy(model: Any, task: Task, part: str) -> float:
    """The share of questions whose greedily generated answer is the right number.

    Args:
        model: In eval mode.
        task (`Task`): The questions, and how long answers may be.
        part (`str`): "validation" or "test".
    """
    config, tokenizer, pairs = task.config, task.tokenizer, task.questions[part]
    right = 0
    for start in range(0, len(pairs), config["batch_size_eval"]):
        prompts, answers = zip(*pairs[start : start + config["batch_size_eval"]], strict=True)
        batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left").to(model.device)
        length = batch["input_ids"].shape[1]
        longest = max(1, min(config["max_new_tokens"], config["max_total"] - length))
        outputs = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(outputs[:, length:], skip_special_tokens=True)
        right += sum(is_same(text, answer) for text, answer in zip(texts, answers, strict=True))
    return right / len(pairs)


@torch.no_grad()
def text_loss(model: Any, task: Task) -> float:
    """Mean loss by token on the other text, in nats."""
    total, count = 0.0, 0
    for text in task.other:
        ids = task.tokenizer(
            text, return_tensors="pt", truncation=True, max_length=task.config["max_length"]
        ).input_ids
        ids = ids.to(model.device)
        if ids.shape[1] > 1:
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def parse_answer(text: str) -> str | None:
    """What follows the last "answer is" (MetaMathQA) or "####" (GSM8K) on its line, without $, % and commas.

    Args:
        text (`str`): An answer with its reasoning.

    Returns:
        `str` or `None`: The answer, or `None` if none is given.
    """
    found = _ANSWER.findall(text)
    return found[-1].strip(" .!?$%").replace(",", "") if found else None


def is_same(text: str, expected: str) -> bool:
    """Whether two answers give the same number; where they give none, the same text."""
    one, other = parse_answer(text), parse_answer(expected)
    if one is None or other is None:
        return False
    try:
        return Fraction(one.replace(" ", "")) == Fraction(other.replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return one == other
