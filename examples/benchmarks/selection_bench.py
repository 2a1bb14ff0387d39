"""What `compare_selection.py` runs: a base, its data, selections by several criteria, and the training of one."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_cosine_schedule_with_warmup

from peft_sgrq import SGRQConfig, calibrate
from peft_sgrq.base.workarounds.bnb_cpu_packing import disable_cpu_packing
from peft_sgrq.layer.base_layers import named_base_layers, scaled_weight_of
from peft_sgrq.layer.masks import decode_mask, encode_mask
from peft_sgrq.selection.layerwise.allocate_ratios import allocate_ratios
from peft_sgrq.selection.layerwise.probe import probing
from peft_sgrq.selection.ratio import count_selected, select_top
from peft_sgrq.selection.saliency import Saliency

CONTROLS = ("random", "bottom")


class Bench:
    """The model, the data, and the selections of a setting."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        windows = windows_of(tokenizer, arguments.train, arguments.length, arguments.characters)
        held = len(windows) // 10
        self.train = windows[:-held]
        self.parts = {
            "validation": windows[-held:][: arguments.evaluation_rows],
            "test": windows_of(tokenizer, arguments.test, arguments.length, arguments.characters)[
                : arguments.evaluation_rows
            ],
        }
        self._saliency: dict[tuple[str, int], Saliency] = {}
        self._selections: dict[tuple[str, float, int], dict[str, str]] = {}

    # model

    def load(self) -> Any:
        """The base, untrained, with bitsandbytes' CPU repacking off."""
        arguments = self.arguments
        dtype = getattr(torch, arguments.dtype)
        kwargs: dict[str, Any] = {}
        if arguments.base == "nf4":
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, **kwargs)
        disable_cpu_packing(model)
        if arguments.base == "dense-3bit":
            head = model.get_output_embeddings()
            for layer in model.modules():
                if isinstance(layer, nn.Linear) and layer is not head:
                    layer.weight.data = round_to_grid(layer.weight.data)
        return model.eval()

    def config(self, **fields: Any) -> SGRQConfig:
        return SGRQConfig(ratio=0.4, group_size=self.arguments.group_size, task_type="CAUSAL_LM", **fields)

    @torch.no_grad()
    def evaluate(self, model: Any) -> dict[str, float]:
        """Mean loss by token on the validation and the test windows."""
        model.eval()
        losses = {}
        for part, windows in self.parts.items():
            batches = windows.split(16)
            sums = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches]
            losses[part] = round(sum(sums) / len(windows), 5)
        return losses

    # selections

    def calibration(self, seed: int) -> list[dict[str, torch.Tensor]]:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(1000 + seed))
        rows = self.train[order[: self.arguments.calibration_rows]]
        return [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in rows.split(8)]

    def saliency(self, criterion: str, seed: int) -> Saliency:
        criterion = {"bottom": "obs", "random": "magnitude"}.get(criterion, criterion)
        if (criterion, seed) not in self._saliency:
            self._saliency[criterion, seed] = calibrate(
                self.load(), self.config(), self.calibration(seed), criterion=criterion, progress=False
            )
        return self._saliency[criterion, seed]

    def select(self, method: str, ratio: float, seed: int) -> dict[str, str]:
        """Module name -> mask of the selected groups."""
        key = (method, ratio, seed)
        if key not in self._selections:
            self._selections[key] = self._select(*key)
        return self._selections[key]

    def _select(self, method: str, ratio: float, seed: int) -> dict[str, str]:
        criterion, _, how = method.partition(":")
        saliency = self.saliency(criterion, seed)
        generator = torch.Generator().manual_seed(seed)
        if criterion == "random" and how:
            layers = {
                name: replace(layer, scores=torch.rand(layer.scores.shape, generator=generator))
                for name, layer in saliency.layers.items()
            }
            saliency = replace(saliency, layers=layers)
        counts = {name: count_selected(ratio, layer.selectable) for name, layer in saliency.layers.items()}
        scales = sum(layer.scales_per_group * counts[name] for name, layer in saliency.layers.items())
        if how == "scale":
            counts = {name: layer.selectable for name, layer in saliency.layers.items()}
        elif how == "global":
            return saliency.select("global", budget=scales)
        elif how.startswith("layerwise"):
            found = allocate_ratios(
                self.load(),
                self.config(),
                self.calibration(seed),
                saliency,
                budget=scales,
                method=how.partition("-")[2] or "fisher",  # type: ignore[arg-type]
                progress=False,
            )
            return saliency.select(found.ratios)
        if criterion in CONTROLS:
            return select_control(saliency, criterion, ratio, seed)
        return {
            name: encode_mask(select_top(layer.group_scores(), counts[name]), layer.selectable)
            for name, layer in saliency.layers.items()
        }

    def scale_masks(self, ratio: float, seed: int) -> dict[str, torch.Tensor]:
        """In each layer the scales with the largest mean gradient, as many as whole columns of the ratio have."""
        model = self.load()
        layers = dict(named_base_layers(model))
        scaled_weights = {
            name: scaled_weight_of(name, layers[name], self.arguments.group_size)
            for name in self.saliency("magnitude", seed).layers
        }
        everything = {name: torch.arange(scaled_weight.selectable) for name, scaled_weight in scaled_weights.items()}
        with probing(model, scaled_weights, everything) as probe:
            gradients = [probe.gradients({**batch, "labels": batch["input_ids"]}) for batch in self.calibration(seed)]
        masks = {}
        for name, scaled_weight in scaled_weights.items():
            size = torch.stack([gradient[name] for gradient in gradients]).mean(0).abs()
            count = scaled_weight.delta_shape(count_selected(ratio, scaled_weight.selectable))
            threshold = size.flatten().topk(count[0] * count[1]).values[-1]
            masks[name] = (size >= threshold).float()
        return masks

    def overlaps(self, seed: int) -> list[dict[str, Any]]:
        """Jaccard overlap of the selections of two methods, groups of all layers together."""
        arguments = self.arguments
        methods = [method for method in arguments.methods if not method.endswith(":scale")]
        found = []
        for ratio in arguments.ratios:
            chosen = {method: self._groups(self.select(method, ratio, seed), seed) for method in methods}
            found += [
                {"ratio": ratio, "methods": [one, other], "jaccard": round(jaccard(chosen[one], chosen[other]), 3)}
                for index, one in enumerate(methods)
                for other in methods[index + 1 :]
            ]
            if "obs" in methods:  # the same criterion on other calibration rows
                other_rows = self._groups(self.select("obs", ratio, seed + 100), seed)
                value = round(jaccard(chosen["obs"], other_rows), 3)
                found.append({"ratio": ratio, "methods": ["obs", "obs, other rows"], "jaccard": value})
        return found

    def _groups(self, selection: dict[str, str], seed: int) -> set[tuple[str, int]]:
        layers = self.saliency("magnitude", seed).layers
        return {
            (name, group)
            for name, mask in selection.items()
            for group in decode_mask(mask, layers[name].selectable).tolist()
        }

    # training

    def run(self, method: str, ratio: float, seed: int, learning_rate: float) -> dict[str, Any]:
        """Trains the base with one selection; losses, the number of scales trained, and seconds."""
        arguments = self.arguments
        selection = self.select(method, ratio, seed)
        start = time.perf_counter()
        model = get_peft_model(self.load(), self.config(selection=selection))
        masks = self.scale_masks(ratio, seed) if method.endswith(":scale") else {}
        trained = 0
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = name.removeprefix("base_model.model.").partition(".sgrq_delta")[0]
            mask = masks.get(layer)
            trained += parameter.numel() if mask is None else int(mask.sum())
            if mask is not None:  # Adam leaves a parameter alone whose gradient is always zero
                parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 10, arguments.steps)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        for _ in range(arguments.steps):
            batch = self.train[torch.randint(len(self.train), (arguments.batch_size,), generator=generator)]
            model(input_ids=batch, labels=batch).loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return {**self.evaluate(model), "scales": trained, "seconds": round(time.perf_counter() - start, 1)}


def select_control(saliency: Saliency, control: str, ratio: float, seed: int) -> dict[str, str]:
    """Layer -> mask of as many groups as a ratio stands for: `random` ones, or `bottom`, the least salient."""
    generator = torch.Generator().manual_seed(seed)
    selection = {}
    for name, layer in saliency.layers.items():
        scores = layer.group_scores()
        scores = torch.rand(len(scores), generator=generator) if control == "random" else -scores
        chosen = select_top(scores, count_selected(ratio, layer.selectable))
        selection[name] = encode_mask(chosen, layer.selectable)
    return selection


def windows_of(tokenizer: Any, path: Path, length: int, characters: int) -> torch.Tensor:
    """A text cut into windows: int64 `[windows, length]`; of a .jsonl file the fields of each line, joined."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.split("\n") if line]  # splitlines would split inside of strings
        text = "\n\n".join(row["text"] if "text" in row else f"{row['question']}\n{row['answer']}" for row in rows)
    ids = tokenizer(text[:characters], return_tensors="pt", verbose=False).input_ids[0]
    return ids[: len(ids) // length * length].view(-1, length)


def round_to_grid(weight: torch.Tensor, bits: int = 3, group_size: int = 64) -> torch.Tensor:
    """Rounds a weight `[N, K]` to `2 ** bits` evenly spaced values between the extremes of each group."""
    padded = nn.functional.pad(weight.float(), (0, -weight.shape[1] % group_size))
    groups = padded.view(len(weight), -1, group_size)  # (N, G, g)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    zero = (-low / step).round()
    codes = ((groups / step).round() + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) * step).flatten(1)[:, : weight.shape[1]].to(weight.dtype)


def jaccard(one: set[Any], other: set[Any]) -> float:
    return len(one & other) / len(one | other)
