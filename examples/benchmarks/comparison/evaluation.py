"""Loss on windows of text, and accuracy on multiple-choice questions by log-likelihood."""

from __future__ import annotations

from typing import Any

import torch
from comparison.data import Questions, inputs_of
from torch import nn


def label_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss a model computes of `labels`, with logits of the labelled tokens alone.

    Over 49,000 words logits take more memory than the rest of a small model, and in chats most tokens have no label.

    Args:
        model (`PreTrainedModel` or `PeftModel`): With an output head of its own.
        inputs (`dict[str, torch.Tensor]`): What it is called with; `labels` int64 `[B, T]`, -100 where there is none.

    Returns:
        `torch.Tensor`: Mean cross-entropy by labelled token in nats, float32.
    """
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    rows, places = (labels[:, 1:] != -100).nonzero(as_tuple=True)  # (n,) each; the place before the label
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, arguments: (arguments[0][rows, places],))
    try:
        logits = model(**inputs, use_cache=False).logits  # (n, V)
    finally:
        handle.remove()
    return nn.functional.cross_entropy(logits.float(), labels[rows, places + 1])


@torch.no_grad()
def mean_loss(model: Any, windows: torch.Tensor, batch_size: int = 8) -> float | None:
    """Mean loss by token in nats, or `None` if it is not finite.

    Args:
        model: In eval mode.
        windows (`torch.Tensor`): Token ids, int64 `[windows, T]`, or chats, `[rows, 3, T]`.
        batch_size (`int`): Windows in a batch.
    """
    total, tokens = 0.0, 0
    for batch in windows.split(batch_size):
        inputs = inputs_of(batch.to(model.device))
        count = int((inputs["labels"][:, 1:] != -100).sum())
        total += float(label_loss(model, inputs)) * count
        tokens += count
    loss = total / tokens
    return round(loss, 5) if torch.isfinite(torch.tensor(loss)) else None


@torch.no_grad()
def accuracy(model: Any, questions: Questions, batch_size: int = 32) -> float:
    """The share of questions whose right choice has the highest log-likelihood by character.

    Each context is read once; its choices continue from the same cache.

    Args:
        model: In eval mode.
        questions (`Questions`): The questions.
        batch_size (`int`): Questions in a batch.
    """
    right = 0
    for start in range(0, len(questions.labels), batch_size):
        part = slice(start, start + batch_size)
        contexts = questions.contexts[part].to(model.device)  # (B, T)
        choices = questions.choices[part]
        each = len(choices[0])
        read = model(input_ids=contexts, use_cache=True)
        read.past_key_values.batch_repeat_interleave(each)
        flat = [choice for group in choices for choice in group]
        ids = nn.utils.rnn.pad_sequence(flat, batch_first=True).to(model.device)  # (B * each, t)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(choice) for choice in flat], batch_first=True)
        seen = torch.ones(len(flat), contexts.shape[1], dtype=mask.dtype)
        logits = model(
            input_ids=ids,
            past_key_values=read.past_key_values,
            attention_mask=torch.cat([seen, mask], 1).to(model.device),
        ).logits.float()
        first = read.logits[:, -1:].float().repeat_interleave(each, 0)
        logits = torch.cat([first, logits[:, :-1]], 1)  # (B * each, t, V), of the token at each place
        scores = -nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        scores = (scores * mask.to(scores.device)).sum(1).view(-1, each).cpu()
        scores = scores / torch.tensor(questions.characters[part])
        right += int((scores.argmax(1) == torch.tensor(questions.labels[part])).sum())
    return round(right / len(questions.labels), 4)
