"""A small dense model, its layers and rows of tokens, for tests of ratios by layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from peft_sgrq import SGRQConfig
from peft_sgrq.adapter.targets import find_targets, supported_layers
from peft_sgrq.passes.data import Batch
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.layerwise.probe import split_rows
from peft_sgrq.selection.saliency import Saliency

GROUP = 16
QUICK: dict[str, Any] = {"ratios": (0.1, 0.5), "progress": False}


def scaled_weights_of(model: Any, config: SGRQConfig) -> dict[str, Any]:
    return find_targets(model, replace(config, target_modules=supported_layers(model, config)))


def saliency_of(model: Any, config: SGRQConfig) -> Saliency:
    """By magnitude."""
    layers = {}
    for name, scaled_weight in scaled_weights_of(model, config).items():
        squares = scaled_weight.dequantize(scaled_weight.scales(), torch.float32).square()
        layers[name] = LayerSaliency.of(scaled_weight, squares.sum(1 if scaled_weight.unit == "row" else 0))
    return Saliency(layers, "magnitude")


def everything(scaled_weights: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: torch.arange(scaled_weight.selectable) for name, scaled_weight in scaled_weights.items()}


def text(rows: int = 6, length: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 256, (2, length), generator=generator)} for _ in range(rows // 2)]


def rows_of(data: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return split_rows([Batch.of(batch) for batch in data])


def state_of(model: Any) -> dict[str, Any]:
    tensors = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    modules = [
        (name, type(module), module.training, sorted(module.__dict__)) for name, module in model.named_modules()
    ]
    hooks = [[*module._forward_hooks.values(), *module._forward_pre_hooks.values()] for module in model.modules()]
    parameters = [(id(p), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return {
        "tensors": tensors,
        "modules": modules,
        "forward": [module.forward for module in model.modules()],
        "hooks": hooks,
        "parameters": parameters,
        "random": torch.get_rng_state(),
        "use_cache": model.config.use_cache,
    }


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key in ("modules", "forward", "hooks", "use_cache"):
        assert found[key] == expected[key], key
    assert found["tensors"].keys() == expected["tensors"].keys()
    for key, value in expected["tensors"].items():
        assert torch.equal(found["tensors"][key], value), key
    for (one, trainable, grad), (other, was_trainable, was_grad) in zip(
        found["parameters"], expected["parameters"], strict=True
    ):
        assert one == other and trainable == was_trainable
        assert (grad is None) == (was_grad is None) and (grad is None or torch.equal(grad, was_grad))
    assert torch.equal(found["random"], expected["random"])
