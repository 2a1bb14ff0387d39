"""Trains the small language model in `demo_model` on text that every machine with this project's environment has.

    python examples/benchmarks/train_demo_model.py --minutes 65 --threads 1

The corpus, the tokenizer and the model are made from scratch; see `demo_text`. Weights are bf16 with fp32 master
weights, the hidden matrices are trained with Muon and everything else with AdamW. The schedule follows the clock, so
the run ends on time on any machine, and the model is saved every few minutes. One CPU core is enough.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.append(str(EXAMPLES))

from demo_text import in_stable_order, pretraining_documents, task_documents  # noqa: E402

BOS, EOS = "<s>", "</s>"
PROMPTS = ("The function returns", "This module provides", "Raises a ValueError if")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=65.0, help="duration of training, without evaluation")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=EXAMPLES / "demo_model", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order of the data")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW learning rate, for embeddings and norms")
    parser.add_argument("--muon-lr", type=float, default=2e-2, help="Muon learning rate, 0 for AdamW throughout")
    parser.add_argument("--save-minutes", type=float, default=4.0, help="time between checkpoints")
    return parser.parse_args()


def train_tokenizer(documents: list[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer that decodes to exactly what it encoded."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size, min_frequency=2, special_tokens=[BOS, EOS], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def pack(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Joins documents to one row of tokens, each between its bos and eos token."""
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([i for row in rows for i in (tokenizer.bos_token_id, *row, tokenizer.eos_token_id)])


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Builds the untrained model, about 5.8 million parameters, every input dimension a multiple of 64."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def batches(tokens: torch.Tensor, size: int, length: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yields batches of windows without end, in a new order and with a new offset in every epoch."""
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        windows = tokens[offset : offset + (len(tokens) - offset) // length * length].view(-1, length)
        order = torch.randperm(len(windows), generator=generator)
        yield from (windows[part] for part in order.split(size) if len(part) == size)


def backward(model: LlamaForCausalLM, ids: torch.Tensor, chunk: int = 256) -> float:
    """Accumulates the gradients of the next-token loss and returns it; logits exist for one chunk at a time."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    for part, labels in zip(leaf.split(chunk), ids[:, 1:].flatten().split(chunk), strict=True):
        loss = cross_entropy(model.lm_head(part).float(), labels, reduction="sum") / len(leaf)
        loss.backward()
        total += loss.item()
    hidden.backward(leaf.grad)
    return total


class MasterWeights:
    """Optimizes fp32 copies of a model's bf16 weights: Muon for the hidden matrices, AdamW for the rest.

    Args:
        model (`LlamaForCausalLM`): The model, whose weights [`step`] overwrites.
        lr (`float`): Peak learning rate of AdamW.
        muon_lr (`float`): Peak learning rate of Muon; with 0, AdamW trains all weights.
    """

    def __init__(self, model: LlamaForCausalLM, lr: float, muon_lr: float):
        self.pairs = [(p, p.detach().float().requires_grad_()) for p in model.parameters()]
        hidden = {id(p) for p in model.model.layers.parameters() if p.ndim == 2 and muon_lr > 0}
        muon = [master for p, master in self.pairs if id(p) in hidden]
        rest = [master for p, master in self.pairs if id(p) not in hidden]
        groups = [
            {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0},
        ]
        self.optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
        if muon:
            self.optimizers.append(torch.optim.Muon(muon, lr=muon_lr, weight_decay=0.05, momentum=0.95))
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def step(self, scale: float) -> None:
        """Updates the weights at `scale` times the peak learning rates and clears the gradients."""
        for weight, master in self.pairs:
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_([master for _, master in self.pairs], 1.0)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            optimizer.step()
        with torch.no_grad():
            for weight, master in self.pairs:
                weight.copy_(master)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes each file beside its place and renames it, so a reader or an interruption never meets half a file."""
    beside = out.with_name(out.name + ".partial")
    for item in (model, tokenizer):
        item.save_pretrained(beside)
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(beside.iterdir()):
        os.replace(file, out / file.name)
    beside.rmdir()


def schedule(progress: float, warmup: float = 0.02) -> float:
    """Returns the learning rate's factor: linear warm-up, then a cosine down to 2 percent."""
    if progress < warmup:
        return progress / warmup + 1e-3
    return 0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))) / 2


@torch.inference_mode()
def evaluate(model: LlamaForCausalLM, tokens: torch.Tensor, characters: int, length: int = 512) -> dict[str, float]:
    """Measures perplexity per token and bits per character in windows that do not overlap."""
    total = count = 0
    for window in tokens.split(length):
        if len(window) > 1:
            logits = model(input_ids=window[None, :-1]).logits[0].float()
            total += cross_entropy(logits, window[1:], reduction="sum").item()
            count += len(window) - 1
    nll = total / count
    return {"perplexity": math.exp(nll), "bits_per_character": nll * len(tokens) / characters / math.log(2)}


def main() -> None:
    """Trains, saves and evaluates the model."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    documents = in_stable_order(pretraining_documents())
    held_out, documents = documents[: len(documents) // 100], documents[len(documents) // 100 :]
    tokenizer = train_tokenizer(documents)
    tokens = pack(tokenizer, documents)
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters, {len(tokens):,} tokens", flush=True)

    model = make_model(tokenizer)
    model.set_attn_implementation("eager")  # in short windows on a CPU faster than the fused kernel
    optimizer = MasterWeights(model, args.lr, args.muon_lr)
    data = batches(tokens, args.batch, args.length + 1, torch.Generator().manual_seed(args.seed))
    start = saved = time.monotonic()
    average = None
    steps = 0
    with tqdm(total=100, unit="%", mininterval=10, bar_format="{l_bar}{bar}| {elapsed}{postfix}") as bar:
        while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
            loss = backward(model, next(data))
            optimizer.step(schedule(progress))
            average = loss if average is None else 0.98 * average + 0.02 * loss
            steps += 1
            bar.set_postfix(step=steps, loss=f"{average:.3f}", refresh=False)
            bar.update(100 * progress - bar.n)
            if time.monotonic() - saved > 60 * args.save_minutes:
                save(model, tokenizer, args.out)
                saved = time.monotonic()
    save(model, tokenizer, args.out)

    result = {"steps": steps, "tokens": steps * args.batch * args.length, "seconds": round(time.monotonic() - start)}
    model.eval()
    for name, texts in (("pre-training held out", held_out), ("task held out", task_documents()[1])):
        result[name] = evaluate(model, pack(tokenizer, texts), sum(map(len, texts)))
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        for name, options in (("greedy", {}), ("sampled", {"do_sample": True, "top_p": 0.9, "temperature": 0.8})):
            ids = model.generate(**inputs, max_new_tokens=80, **options)
            print(f"--- {name}\n{tokenizer.decode(ids[0])}", flush=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
