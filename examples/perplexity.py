"""Perplexity of a saved model on a text file, with plain transformers: peft_sgrq is neither imported nor needed.

python examples/perplexity.py MODEL TEXT
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, length: int, limit: int) -> torch.Tensor:
    """Cuts a text into windows of `length` tokens, at most `limit` of them: int64 `[windows, length]`."""
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    count = min(limit, len(ids) // length)
    if not count:
        raise ValueError(f"The text has {len(ids)} tokens, expected at least {length}; give a longer text.")
    return ids[: count * length].view(count, length)


@torch.no_grad()
def perplexity(model: nn.Module, windows: torch.Tensor, batch_size: int = 8) -> float:
    """exp of the mean negative log-likelihood of all but the first token of each window."""
    model.eval()
    total, count = 0.0, 0
    for batch in windows.split(batch_size):
        batch = batch.to(next(model.parameters()).device)
        logits = model(input_ids=batch).logits[:, :-1].float()  # (B, T - 1, V)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total, count = total + loss.item(), count + batch[:, 1:].numel()
    return math.exp(total / count)


@torch.no_grad()
def logits_of(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Logits of the first windows in float32, to compare models bit for bit."""
    model.eval()
    batch = windows[:4].to(next(model.parameters()).device)
    return model(input_ids=batch).logits.float().cpu()


def keep_stored_layout(model: nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit layers on CPUs with AVX512-BF16, which rounds their scales."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load(model: str, **kwargs: Any) -> PreTrainedModel:
    """A model on the GPU if there is one; `kwargs` as `from_pretrained` takes them."""
    device_map = "auto" if torch.cuda.is_available() else None
    return AutoModelForCausalLM.from_pretrained(model, device_map=device_map, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a saved model, or its name on the Hub")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--limit", type=int, default=1000, help="windows at most")
    parser.add_argument("--logits", type=Path, help="save the logits of the first windows here")
    parser.add_argument("--repack", action="store_true", help="let bitsandbytes repack the layers for this CPU")
    arguments = parser.parse_args()
    if arguments.logits and (arguments.logits.is_dir() or not arguments.logits.parent.is_dir()):
        parser.error(f"--logits is {str(arguments.logits)!r}, expected a file in a folder that is there")
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = tokenize(tokenizer, arguments.text.read_text(encoding="utf-8"), arguments.length, arguments.limit)
    model = load(arguments.model)
    if not arguments.repack:
        keep_stored_layout(model)
    if arguments.logits:
        torch.save(logits_of(model, windows), arguments.logits)
    print(json.dumps({"perplexity": perplexity(model, windows), "windows": len(windows)}))


if __name__ == "__main__":
    main()
