"""Multiple-choice tasks in one folder: reading, rows to tune on, and answers by log-likelihood."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from comparison.data import existing
from torch import nn

PROMPT = "Question: {}\nAnswer:"
_ROW = "a JSON object of `question`, a text, `choices`, at least two, and `answer`, the index of the right choice"


@dataclass(frozen=True)
class Question:
    """A question as it is asked, tokenized.

    Attributes:
        asked (`list[int]`): Token ids of the prompt.
        choices (`list[list[int]]`): Those of each choice.
        characters (`list[int]`): Length of each choice.
        answer (`int`): Index of the right choice.
    """

    asked: list[int]
    choices: list[list[int]]
    characters: list[int]
    answer: int


def tasks_of(folder: Path, split: str) -> list[str]:
    """The tasks a folder has a split of: `NAME.train.jsonl` and `NAME.test.jsonl`."""
    return sorted(path.name.removesuffix(f".{split}.jsonl") for path in folder.glob(f"*.{split}.jsonl"))


def read_task(tokenizer: Any, path: Path, count: int | None = None) -> list[Question]:
    """The questions of a .jsonl file of `question`, `choices` and `answer`, the index of the right one.

    Args:
        tokenizer: Of the model.
        path (`Path`): The file, in UTF-8.
        count (`int` or `None`): Take so many, always the same ones, drawn from the whole file; `None` takes all.

    Raises:
        ValueError: If there is no such file, no row in it, or a row that is no question with an answer.
    """
    text = existing(path).read_text(encoding="utf-8")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{str(path)!r} has no row, expected some; correct the file, or take it away.")
    if count is not None and count < len(lines):
        lines = random.Random(0).sample(lines, count)
    questions = []
    for number, line in lines:
        try:
            questions.append(_question(tokenizer, json.loads(line)))
        except ValueError as error:
            raise ValueError(
                f"Line {number} of {str(path)!r} is {line[:80]!r}, expected {_ROW}, counted from 0; correct it."
            ) from error
    return questions


def _question(tokenizer: Any, row: Any) -> Question:
    """A row, tokenized; a ValueError if it is no question with an answer."""
    if not isinstance(row, dict) or not {"question", "choices", "answer"} <= set(row):
        raise ValueError
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(a, str) for a in [question, *choices]):
        raise ValueError
    if type(answer) is not int or answer not in range(len(choices)):
        raise ValueError
    tokens = [tokenizer(f" {choice}", add_special_tokens=False).input_ids for choice in choices]
    if not all(tokens):  # the likelihood of nothing is one
        raise ValueError
    asked = tokenizer(PROMPT.format(question), add_special_tokens=False).input_ids
    return Question(asked, tokens, [max(len(choice), 1) for choice in choices], answer)


def training_batch(questions: list[Question], end: int) -> dict[str, torch.Tensor]:
    """Prompts, right answers and an end-of-text token, int64 `[B, T]` each; labels are those of answer and end."""
    found = defaultdict(list)
    for question in questions:
        answer = [*question.choices[question.answer], end]
        found["input_ids"].append(torch.tensor(question.asked + answer))
        found["labels"].append(torch.tensor([-100] * len(question.asked) + answer))
        found["attention_mask"].append(torch.ones(len(question.asked) + len(answer), dtype=torch.int64))
    fill = {"labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill.get(name, 0))
        for name, rows in found.items()
    }


def training_batches(
    tasks: dict[str, list[Question]], end: int, steps: int, batch_size: int, seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of rows each of which is of a random task, however long its file, and there a random one."""
    draw, names = random.Random(seed), sorted(tasks)
    for _ in range(steps):
        yield training_batch([draw.choice(tasks[draw.choice(names)]) for _ in range(batch_size)], end)


@torch.no_grad()
def answered(model: Any, questions: list[Question], batch_size: int = 16) -> dict[str, str]:
    """Which questions a model answers right: it chooses the choice with the highest log-likelihood.

    Each prompt is read once; its choices continue from the same cache.

    Args:
        model: In eval mode.
        questions (`list[Question]`): The questions.
        batch_size (`int`): Questions in a batch.

    Returns:
        `dict[str, str]`: A "1" or a "0" for each question: under `sum` by the log-likelihood of a choice, under
        `character` by that divided by its length in characters.
    """
    right = {name: ["0"] * len(questions) for name in ("sum", "character")}
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].choices), len(questions[i].asked)))
    start = 0
    while start < len(order):
        each = len(questions[order[start]].choices)
        part = [i for i in order[start : start + batch_size] if len(questions[i].choices) == each]
        start += len(part)
        scores = _scores(model, [questions[i] for i in part]).cpu()  # (B, each)
        lengths = torch.tensor([questions[i].characters for i in part])
        for name, chosen in (("sum", scores.argmax(1)), ("character", (scores / lengths).argmax(1))):
            for i, choice in zip(part, chosen.tolist(), strict=True):
                right[name][i] = str(int(choice == questions[i].answer))
    return {name: "".join(marks) for name, marks in right.items()}


def _scores(model: Any, questions: list[Question]) -> torch.Tensor:
    """Log-likelihoods of choices, `[B, choices]`; all questions have as many."""
    device, each = model.device, len(questions[0].choices)
    longest = max(len(question.asked) for question in questions)
    fill = [longest - len(question.asked) for question in questions]
    asked = torch.tensor(
        [[0] * n + question.asked for n, question in zip(fill, questions, strict=True)], device=device
    )
    seen = torch.tensor([[0] * n + [1] * (longest - n) for n in fill], device=device)  # (B, T)
    places = (seen.cumsum(1) - 1).clamp(min=0)
    read = model(input_ids=asked, attention_mask=seen, position_ids=places, use_cache=True, logits_to_keep=1)
    read.past_key_values.batch_repeat_interleave(each)
    flat = [torch.tensor(choice) for question in questions for choice in question.choices]
    ids = nn.utils.rnn.pad_sequence(flat, batch_first=True).to(device)  # (B * each, t)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(choice) for choice in flat], batch_first=True).to(device)
    logits = model(
        input_ids=ids,
        past_key_values=read.past_key_values,
        attention_mask=torch.cat([seen.repeat_interleave(each, 0), mask], 1),
        position_ids=places[:, -1:].repeat_interleave(each, 0) + mask.cumsum(1),
    ).logits.float()
    first = read.logits[:, -1:].float().repeat_interleave(each, 0)
    logits = torch.cat([first, logits[:, :-1]], 1)  # (B * each, t, V), of the token at each place
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # (B * each, t)
    return -(losses * mask).sum(1).view(-1, each)
