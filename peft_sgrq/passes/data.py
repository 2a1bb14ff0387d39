"""Calibration data in its several forms, as batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from numbers import Integral
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from peft_sgrq.passes.processes import gather, process_count, process_index

IGNORED = -100  # the label transformers' losses skip
_COLUMNS = ("input_ids", "text", "messages")


@dataclass
class Batch:
    """What a forward pass takes, and which of its tokens count.

    Attributes:
        inputs (`dict[str, torch.Tensor]`): `input_ids` int64 `[B, T]` and what else the data has.
        counted (`torch.Tensor`): Tokens that are no padding, bool `[B, T]`.
        decoder_counted (`torch.Tensor` or `None`): Those of a decoder with inputs of its own, bool `[B, T']`.
    """

    inputs: dict[str, torch.Tensor]
    counted: torch.Tensor
    decoder_counted: torch.Tensor | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Batch:
        """A batch of a DataLoader or a tokenizer; a 2D `attention_mask` says what is padding."""
        tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        ids, mask = tensors["input_ids"], tensors.get("attention_mask")
        whole = mask is None or mask.shape != ids.shape
        counted = torch.ones_like(ids, dtype=torch.bool) if mask is None or whole else mask.bool()
        return cls(tensors, counted, _decoder_tokens(tensors))

    def first(self) -> Batch:
        """The first sequence alone."""
        rows = len(self.counted)
        inputs = {key: value[:1] if value.shape[:1] == (rows,) else value for key, value in self.inputs.items()}
        decoder = self.decoder_counted
        return Batch(inputs, self.counted[:1], None if decoder is None else decoder[:1])


def _decoder_tokens(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    if "decoder_attention_mask" in tensors:
        return tensors["decoder_attention_mask"].bool()
    if "decoder_input_ids" in tensors:
        return torch.ones_like(tensors["decoder_input_ids"], dtype=torch.bool)
    labels = tensors.get("labels")  # an encoder-decoder shifts them to be its decoder's inputs
    return None if labels is None or labels.dim() != 2 else labels != IGNORED


def load_batches(
    data: Any,
    tokenizer: Any = None,
    column: str | None = None,
    samples: int | None = 128,
    max_length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Batch]:
    """Batches of calibration data, of which each process gets a part.

    Args:
        data: A `DataLoader` or another iterable of batches (mappings with `input_ids` `[B, T]`, or tensors of that),
            of which each process gives its own; or the same on all processes: texts, tokenized examples, or a
            `datasets.Dataset`.
        tokenizer: The tokenizer for texts; its settings and state are not changed.
        column (`str` or `None`): Column of a dataset with texts, chats (lists of messages) or token ids; `None` takes
            the first it has of `input_ids`, `text` and `messages`.
        samples (`int` or `None`): The most sequences, chosen at random by `seed`; from a DataLoader and from streamed
            data the first ones. `None` takes all.
        max_length (`int`): The most tokens of a sequence.
        batch_size (`int`): Sequences in a batch, where the data is not in batches already.
        seed (`int`): Seed for choosing samples.

    Raises:
        ValueError: If there is no data, or no token but padding, on all processes together; if the column is missing,
            or a count is none.
        TypeError: If the data has another form, or texts come without a tokenizer.
    """
    for name, count in (("samples", samples), ("max_length", max_length), ("batch_size", batch_size)):
        if count is None and name == "samples":
            continue
        if not isinstance(count, Integral) or count < 1:  # NumPy's are such, too
            raise ValueError(f"`{name}` is {count!r}, expected a whole number of at least 1; correct it.")
    items = _read(data, column, tokenizer)
    first = next(items, None)
    if first is None:
        batches: list[Batch] = []
    elif _is_batch(first):
        batches = _take_batches(first, items, samples)
    else:
        sized = hasattr(data, "__len__")
        rest = items if samples is None or sized else islice(items, samples - 1)
        examples = _choose([first, *rest], samples, seed)
        batches = _collate(_tokenize(examples, tokenizer, max_length), batch_size)
    _check_not_empty(batches)
    return batches


def _read(data: Any, column: str | None, tokenizer: Any) -> Iterator[Any]:
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise TypeError(
            f"`data` is a {type(data).__name__}, expected a DataLoader, a list of texts with a tokenizer, or a "
            "datasets.Dataset; put a single text into a list."
        )
    names = getattr(data, "column_names", None)
    if isinstance(names, Mapping) or isinstance(data, Mapping):
        raise TypeError(
            f"`data` is a {type(data).__name__} of {sorted(names or data)}, expected one split of it; choose one, as "
            'in dataset["train"].'
        )
    if names is None and not hasattr(data, "features"):
        return iter(data)
    if names is None:  # streamed data that has not said what it holds
        names = sorted(next(iter(data), {}))
    usable = _COLUMNS[1:] if tokenizer is not None and "text" in names else _COLUMNS
    wanted = column or next((name for name in usable if name in names), None)
    if wanted not in names:
        raise ValueError(
            f"The dataset has no column {wanted or ' or '.join(_COLUMNS)!r}, found the columns {sorted(names)}; name "
            "the one that holds texts, chats or token ids with `column`."
        )
    if wanted == "input_ids":
        return iter(data)
    return (row[wanted] for row in data)


def _is_batch(item: Any) -> bool:
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], torch.Tensor):
        return item[0].dim() == 2
    ids = item.get("input_ids") if isinstance(item, Mapping) else item
    return isinstance(ids, torch.Tensor) and ids.dim() == 2


def _take_batches(first: Any, rest: Iterator[Any], samples: int | None) -> list[Batch]:
    batches: list[Batch] = []
    count = 0
    for item in chain([first], rest):
        batches.append(_as_batch(item))
        count += len(batches[-1].counted)
        if samples is not None and count >= samples:
            break
    return batches


def _as_batch(item: Any) -> Batch:
    if isinstance(item, (list, tuple)) and len(item) == 1:  # of a TensorDataset
        item = item[0]
    if isinstance(item, torch.Tensor):
        item = {"input_ids": item}
    if not isinstance(item, Mapping) or not isinstance(item.get("input_ids"), torch.Tensor):
        found = sorted(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
        raise TypeError(
            f"A batch of the data is {found}, expected a mapping with a tensor `input_ids`; tokenize it first."
        )
    return Batch.of(item)


def _choose(examples: Sequence[Any], samples: int | None, seed: int) -> list[Any]:
    if samples is None or len(examples) <= samples:
        return list(examples)
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), samples))]


def _tokenize(examples: list[Any], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    tokenized = []
    for example in examples:
        if isinstance(example, Mapping) and "input_ids" in example:
            row = {key: list(example[key]) for key in ("input_ids", "attention_mask", "labels") if key in example}
        elif tokenizer is None:
            raise TypeError(
                f"The data holds {type(example).__name__}s and there is no tokenizer, expected texts with a tokenizer "
                "or tokenized examples with `input_ids`; give `tokenizer=`."
            )
        elif isinstance(example, str):
            row = {"input_ids": tokenizer(example, truncation=True, max_length=max_length)["input_ids"]}
        elif isinstance(example, Sequence) and all(isinstance(message, Mapping) for message in example):
            text = tokenizer.apply_chat_template(example, tokenize=False)
            ids = tokenizer(text, truncation=True, max_length=max_length, add_special_tokens=False)["input_ids"]
            row = {"input_ids": ids}
        else:
            raise TypeError(
                f"The data holds a {type(example).__name__}, expected texts, chats (lists of messages), or mappings "
                "with `input_ids`; convert it first."
            )
        row = {key: [int(value) for value in values[:max_length]] for key, values in row.items()}
        if row["input_ids"]:
            tokenized.append(row)
    # Long ones first: little padding, and what needs too much memory does so at once. They go round the processes.
    tokenized.sort(key=lambda row: len(row["input_ids"]), reverse=True)
    return tokenized[process_index() :: process_count()]


def _collate(rows: list[dict[str, list[int]]], batch_size: int) -> list[Batch]:
    batches = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        for row in part:
            row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        keys = [key for key in part[0] if all(key in row for row in part)]
        inputs = {
            key: pad_sequence(
                [torch.tensor(row[key]) for row in part],
                batch_first=True,
                padding_value=IGNORED if key == "labels" else 0,
            )
            for key in keys
        }
        batches.append(Batch.of(inputs))
    return batches


def _check_not_empty(batches: list[Batch]) -> None:
    """Raises on all processes or on none."""
    sequences = sum(gather(sum(len(batch.counted) for batch in batches)))
    tokens = sum(gather(sum(int(batch.counted.sum()) for batch in batches)))
    if not sequences:
        raise ValueError("The calibration data is empty, expected at least one text or batch; check where it is read.")
    if not tokens:
        raise ValueError(
            f"The calibration data has no token that counts: found {sequences} sequences that are all padding, "
            "expected an `attention_mask` with ones; check how it is tokenized."
        )
