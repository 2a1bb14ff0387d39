"""What calibration must find, in plain float64 torch on the model's own forward pass, and data for it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from peft_sgrq import Saliency, SGRQConfig, calibrate
from peft_sgrq.formats.registry import resolve_weight
from peft_sgrq.formats.scaled_weight import ScaledWeight

TEXTS = [f"The sum of {i} and {i + 3} is {2 * i + 3}. " * (1 + i % 3) for i in range(12)]


def padded_batches(count: int = 3, rows: int = 4, length: int = 24, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Random tokens with padding on the right, of other lengths in each row."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 256, (rows, length), generator=generator)
        lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def layers_of(model: Any) -> dict[str, ScaledWeight]:
    """The scaled weights of all adapted layers of the tiny models, by name, dense ones in groups of 16."""
    return {
        name: resolve_weight(module, 16)
        for name, module in model.named_modules()
        if name.endswith("_proj") or (".h." in name and name.endswith(("c_attn", "c_proj", "c_fc")))
    }


@torch.no_grad()
def inputs_of(model: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Inputs of each layer at the tokens that are no padding, float64 `[N, K]`, from plain forward passes."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers_of(model)}
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        handles = [
            scaled_weight.module.register_forward_pre_hook(
                lambda module, args, name=name, mask=mask: found[name].append(
                    args[0].reshape(-1, args[0].shape[-1])[mask.reshape(-1)].double()
                )
            )
            for name, scaled_weight in layers_of(model).items()
        ]
        model(**batch, use_cache=False)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def reference(
    criterion: str, weight: torch.Tensor, x: torch.Tensor, original: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores of each weight, float64 `[N, K]`, by the formula of a criterion on float64 inputs `[T, K]`."""
    h = 2 / len(x) * x.T @ x
    dead = h.diagonal() == 0
    if criterion in ("obs", "billm"):
        inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(h))).diagonal()
        scores = weight.square() / inverse ** (2 if criterion == "billm" else 1)
    elif criterion == "error":
        scores = (weight - original).square() * h.diagonal()
    else:
        scores = weight.square() * h.diagonal()
    return scores.masked_fill(dead, 0)


def weight_of(scaled_weight: ScaledWeight) -> torch.Tensor:
    return scaled_weight.dequantize(scaled_weight.scales(), torch.float32).double()


def summed(scores: torch.Tensor, scaled_weight: ScaledWeight) -> torch.Tensor:
    return scores.sum(1 if scaled_weight.unit == "row" else 0)


def run(
    model: Any, criterion: Any = "obs", data: Any = None, config: SGRQConfig | None = None, **kwargs: Any
) -> Saliency:
    """The saliency by a criterion on the padded batches, or other data."""
    return run_on(model, padded_batches() if data is None else data, criterion, config, **kwargs)


def run_on(model: Any, data: Any, criterion: Any = "obs", config: SGRQConfig | None = None, **kwargs: Any) -> Saliency:
    """The saliency on some data."""
    config = config or SGRQConfig(group_size=16, task_type="CAUSAL_LM")
    return calibrate(model, config, data, criterion=criterion, progress=False, **kwargs)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All there is to see of a model and of the state around it; tensors as copies, other objects themselves."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            seen[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else value
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    parameters = dict(model.named_parameters())
    return {
        "attributes": seen,
        "tensors": {key: value.clone() for key, value in tensors.items()},
        "gradients": {
            key: value.grad if value.grad is None else value.grad.clone() for key, value in parameters.items()
        },
        "trainable": {key: value.requires_grad for key, value in parameters.items()},
        "config": model.config.to_dict(),
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def check_same(before: Any, after: Any, where: str = "") -> None:
    if isinstance(before, (torch.Tensor, np.ndarray)):
        assert type(before) is type(after) and before.dtype == after.dtype, where
        equal = np.array_equal if isinstance(before, np.ndarray) else torch.equal
        assert before is after or equal(before, after), where
    elif isinstance(before, (dict, tuple, list)):
        assert type(before) is type(after) and len(before) == len(after), where
        keys = before if isinstance(before, dict) else range(len(before))
        assert not isinstance(before, dict) or list(before) == list(after), where
        for key in keys:
            check_same(before[key], after[key], f"{where}.{key}")
    else:
        assert before is after or before == after, where
