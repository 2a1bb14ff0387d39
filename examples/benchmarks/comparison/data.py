"""Texts as windows of tokens, chats as rows of them, and multiple-choice questions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from selection_bench import windows_of

from peft_sgrq.files.hub import check_source

FILES = (".txt", ".md", ".jsonl")  # what a file is called; other sources that do not exist here are on the Hub


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions whose contexts are equally long: the end of each is kept.

    Attributes:
        contexts (`torch.Tensor`): Token ids, int64 `[n, T]`.
        choices (`list[list[torch.Tensor]]`): By question its choices' token ids, int64 `[t]`.
        characters (`list[list[int]]`): Lengths of the choices in characters.
        labels (`list[int]`): Index of the right choice.
    """

    contexts: torch.Tensor
    choices: list[list[torch.Tensor]]
    characters: list[list[int]]
    labels: list[int]


def read_windows(tokenizer: Any, source: str, split: str, length: int, characters: int, column: str) -> torch.Tensor:
    """A text as windows, int64 `[windows, length]`.

    Args:
        tokenizer: Of the model.
        source (`str`): A file as `windows_of` reads it, or the Hub name of a dataset, `name` or `name:config`.
        split (`str`): Of the dataset.
        length (`int`): Tokens in a window.
        characters (`int`): How much of it to read.
        column (`str`): The dataset's columns to join, separated by commas; "text" where it has none of them.
    """
    if Path(source).exists() or Path(source).suffix in FILES:
        windows = windows_of(tokenizer, existing(Path(source)), length, characters)
        if len(windows) == 0:
            raise ValueError(f"{source} has less than {length} tokens, expected a longer text; or lower --length.")
        return windows
    from datasets import load_dataset

    name, _, config = source.partition(":")
    check_source(name, "text", kind="dataset")
    text = ""
    for row in load_dataset(name, config or None, split=split):
        columns = [key for key in column.split(",") if key in row] or ["text"]
        text += "\n".join(str(row[key]) for key in columns) + "\n\n"
        if len(text) >= characters:
            break
    ids = tokenizer(text[:characters], return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)


def read_chats(tokenizer: Any, path: Path, length: int, count: int) -> torch.Tensor:
    """Questions and answers as chats: token ids, labels and mask, int64 `[rows, 3, length]`.

    Labels are those of the answers alone, so that a loss is one of answers; elsewhere they are -100. Chats are filled
    up on the right; those longer than `length` are left out.

    Args:
        tokenizer: Of the model, with a chat template.
        path (`Path`): A .jsonl file of `question` and `answer`.
        length (`int`): Tokens in a row.
        count (`int`): Lines to read at most.

    Raises:
        ValueError: If there is no template, or no chat that short.
    """
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template, expected one; leave out --chat, or take a chat model.")
    rows = []
    for line in existing(path).read_text(encoding="utf-8").split("\n")[:count]:
        if not line:
            continue
        found = json.loads(line)
        chat = [
            {"role": "user", "content": found["question"]},
            {"role": "assistant", "content": found["answer"]},
        ]
        asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        if ids[: len(asked)] != asked:
            raise ValueError(
                "The chat template writes a question with its answer otherwise than alone, expected the same "
                "beginning; take another tokenizer, or leave out --chat."
            )
        if len(ids) <= length:
            labels = [-100] * len(asked) + ids[len(asked) :]
            fill = length - len(ids)
            rows.append([ids + [0] * fill, labels + [-100] * fill, [1] * len(ids) + [0] * fill])
    if not rows:
        raise ValueError(f"{path} has no chat of at most {length} tokens, expected some; raise --length.")
    return torch.tensor(rows)


def inputs_of(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model is called with: windows `[B, T]` are their own labels; chats `[B, 3, T]` lose shared padding.

    Args:
        rows (`torch.Tensor`): As [`read_windows`] or [`read_chats`] has them.
    """
    if rows.dim() == 2:
        return {"input_ids": rows, "labels": rows}
    ids, labels, mask = rows[..., : int(rows[:, 2].sum(1).max())].unbind(1)  # each (B, t)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def read_questions(tokenizer: Any, path: Path, count: int, length: int) -> Questions:
    """Questions from a .jsonl file of `context`, `choices` and `label`; those with shorter contexts are left out.

    Args:
        tokenizer: Of the model.
        path (`Path`): The file.
        count (`int`): Questions at most.
        length (`int`): Tokens kept of each context.

    Raises:
        ValueError: If no context is that long.
    """
    contexts, choices, characters, labels = [], [], [], []
    for line in existing(path).read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        ids = _ids(tokenizer, row["context"])
        if len(ids) < length or len(labels) == count:
            continue
        contexts.append(ids[-length:])
        choices.append([_ids(tokenizer, " " + choice) for choice in row["choices"]])
        characters.append([len(choice) for choice in row["choices"]])
        labels.append(row["label"])
    if not labels:
        raise ValueError(f"{path} has no context of {length} tokens, expected some; lower --context-length.")
    return Questions(torch.stack(contexts), choices, characters, labels)


def existing(path: Path) -> Path:
    """The path, if there is a file."""
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}, expected a text or a .jsonl file; correct the path.")
    return path


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
