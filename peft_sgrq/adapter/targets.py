"""Which layers of a model an adapter goes to, and whether it can."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from peft.utils.peft_types import TaskType
from torch import nn

from peft_sgrq.adapter.gradient_paths import check_gradient_paths
from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.dense.weight import DenseWeight
from peft_sgrq.formats.registry import is_quantized, is_supported
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.base_layers import base_layer_of, makes_weight, named_base_layers, scaled_weight_of
from peft_sgrq.layer.linear import SGRQLinear

# The heads PEFT trains whole for a task.
TASK_HEADS: dict[str, list[str]] = {
    TaskType.SEQ_CLS: list(SEQ_CLS_HEAD_NAMES),
    TaskType.TOKEN_CLS: ["classifier", "score"],
    TaskType.QUESTION_ANS: ["qa_outputs"],
}


def name_targets(model: nn.Module, config: SGRQConfig) -> SGRQConfig:
    """Has a config name the layers that its `target_modules` of `None` or `"all-linear"` stand for in a model."""
    wanted = config.target_modules
    if wanted is None:
        config.target_modules = supported_layers(model, config)
        return config
    named = _maybe_include_all_linear_layers(config, model)
    if isinstance(wanted, str) and not isinstance(named.target_modules, str):
        named.target_modules |= quantized_layers(model)  # whose classes PEFT does not know
    return named


def find_targets(model: nn.Module, config: SGRQConfig) -> dict[str, ScaledWeight]:
    """The scaled weights of the layers a config targets, by name.

    Args:
        model (`nn.Module`): The model, which may have adapters already.
        config (`SGRQConfig`): A config whose `target_modules` is not `None`.

    Raises:
        ValueError: If a targeted layer cannot be adapted; the sentence names it.
    """
    return {
        name: scaled_weight_of(name, layer, config.group_size)
        for name, layer in named_base_layers(model)
        if name and check_target_module_exists(config, name)
    }


def check_targets(model: nn.Module, scaled_weights: Mapping[str, ScaledWeight], config: SGRQConfig) -> None:
    """Refuses layers whose scales cannot be changed for this adapter alone, or whose training would go wrong.

    Raises:
        ValueError: If one is such; the sentence names it.
    """
    _check_layers_apart(model, scaled_weights)
    _check_group_sizes(model, scaled_weights)
    if not config.inference_mode:
        check_gradient_paths(dict(named_base_layers(model)), scaled_weights, config.group_size)
    _check_zero_points(scaled_weights, config)


def _check_layers_apart(model: nn.Module, scaled_weights: Mapping[str, ScaledWeight]) -> None:
    """Refuses targets whose weight something besides their own forward pass computes with.

    Raises:
        ValueError: If a quantized layer shares its weight with another, or PyTorch computes a block of its own with
            the weights of its layers; the sentence names the layer.
    """
    owners: dict[int, str] = {}  # of parameters, which live as long as the model
    for name, layer in named_base_layers(model):
        if not is_quantized(layer):
            continue
        for parameter in layer.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (other in scaled_weights or name in scaled_weights):
                raise ValueError(
                    f"Layers {other!r} and {name!r} share one quantized weight, so that changing its scales for one "
                    "would change the other, too, expected a weight for each; give one of them a copy, or leave both "
                    "out with `exclude_modules`. The model was not changed."
                )
    if not torch.backends.mha.get_fastpath_enabled():
        return
    for name, module in model.named_modules():
        inside = [f"{name}.{child}".lstrip(".") for child in ("linear1", "linear2")]
        if isinstance(module, nn.TransformerEncoderLayer) and any(child in scaled_weights for child in inside):
            raise ValueError(
                f"Layer {inside[0]!r} belongs to an nn.TransformerEncoderLayer, which in eval mode computes with the "
                "weights of its layers itself and passes an adapter by, expected that fast path to be off; call "
                "`torch.backends.mha.set_fastpath_enabled(False)`, or leave the layers out with `exclude_modules`. "
                "The model was not changed."
            )


def _check_group_sizes(model: nn.Module, scaled_weights: Mapping[str, ScaledWeight]) -> None:
    """Refuses a group size other than that of the adapters a layer has already: adapters add scale by scale."""
    for name, module in model.named_modules():
        if isinstance(module, SGRQLinear) and name in scaled_weights:
            found, expected = scaled_weights[name].group_size, module.scaled_weight.group_size
            if found != expected:
                raise ValueError(
                    f"`group_size` is {found} for layer {name!r}, but the adapters it has already use {expected} and "
                    "adapters add scale by scale; give the new adapter that group size. The model was not changed."
                )


def _check_zero_points(scaled_weights: Mapping[str, ScaledWeight], config: SGRQConfig) -> None:
    """Refuses to move zero points where no layer stores them as floats.

    Raises:
        ValueError: If none does; the sentence says what the layers are.
    """
    weights = scaled_weights.values()
    if not config.zero_points or not weights or any(weight.movable_zero_points for weight in weights):
        return
    if config.base_fingerprint is not None:
        return  # a trained adapter is not on its base, which `check_base` says, and how to load that
    found = ", ".join(sorted({weight.name for weight in weights})[:4])
    raise ValueError(
        f"`zero_points` is True and the targeted layers are {found}, which store no zero points as floats, expected "
        "GGUF's Q4_1, Q5_1, Q2_K, Q4_K or Q5_K, HQQ, quanto's int4 or int2, or torchao's int4; leave `zero_points` "
        "out. The model was not changed."
    )


def _head(model: Any) -> nn.Module | None:
    get_head = getattr(model, "get_output_embeddings", None)
    return base_layer_of(get_head()) if callable(get_head) else None


def quantized_layers(model: nn.Module) -> set[str]:
    """The names of all quantized layers but the output head, whatever their class is."""
    head = _head(model)
    # TRL's trainers multiply by the head's weight themselves and refuse an adapter on it.
    return {name for name, layer in named_base_layers(model) if is_quantized(layer) and layer is not head}


def supported_layers(model: nn.Module, config: SGRQConfig) -> set[str]:
    """The names `target_modules=None` stands for: all quantized layers, or all dense ones; never the output head.

    Raises:
        ValueError: If the model has neither.
    """
    layers, head = dict(named_base_layers(model)), _head(model)
    names = quantized_layers(model)
    if not names:
        names = {name for name, layer in layers.items() if name and is_supported(layer) and layer is not head}
        _warn_of_own_forwards(layers)
        whole = (*TASK_HEADS.get(config.task_type or "", ()), *(config.modules_to_save or ()))
        names = {name for name in names if not any(f".{module}." in f".{name}." for module in whole)}
    if names and config.layers_to_transform is not None:
        # PEFT looks at the index of a block only where a name is matched by its end.
        names = {
            name
            for name in names
            if check_target_module_exists(replace(config, target_modules=[name.rpartition(".")[2]]), name)
        }
    if not names:
        raise ValueError(
            "The model has no layer whose scales could be trained: found neither a quantized layer of a supported "
            f"format nor nn.Linear or Conv1D (layers_to_transform={config.layers_to_transform}), expected one; "
            "quantize it, e.g. with a BitsAndBytesConfig, or name its layers in `target_modules`."
        )
    return names


def _warn_of_own_forwards(layers: Mapping[str, nn.Module]) -> None:
    """Says which linear layers of a dense model are left alone because they do not compute as linear layers do."""
    obstacles = {name: DenseWeight.obstacle(layer) for name, layer in layers.items() if DenseWeight.matches(layer)}
    found = {name: obstacle for name, obstacle in obstacles.items() if obstacle is not None}
    if found:
        name, obstacle = next(iter(found.items()))
        warnings.warn(f"{len(found)} linear layers are left as they are (the first: {name!r}): {obstacle}.")


def warn_of_dense_base(model: nn.Module) -> None:
    """Says that a model has no quantized layer, as one has that was to be quantized and was not."""
    layers = [layer for _, layer in named_base_layers(model)]
    if any(map(is_quantized, layers)) or any(isinstance(module, SGRQLinear) for module in model.modules()):
        return
    found: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    undone = ""
    if found is not None:  # transformers dequantizes fp8 where it cannot compute in it
        undone = (
            " Its checkpoint is, and was dequantized while loading: `peft_sgrq.restore_codes` puts fp8 codes back."
        )
    warnings.warn(
        f"The base is not quantized: found no quantized layer, so scales of its dense weights are tuned, and the "
        f"merged model is as large as the base.{undone} To tune a quantized model, load it with quantization_config="
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), in scripts that take TRL\'s arguments with '
        "--load_in_4bit, or load a checkpoint that is quantized already."
    )


def warn_of_fused_experts(model: nn.Module) -> None:
    """Says which experts of a mixture are left alone because one 3-D parameter holds them all."""
    found = {
        f"{name}.{key}".lstrip("."): tuple(parameter.shape)
        for name, module in model.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "expert" in f"{name}.{key}.{type(module).__name__}".lower()
    }
    if not found:
        return
    name, shape = next(iter(found.items()))
    warnings.warn(
        f"{len(found)} parameters with fused experts are left as they are (the first: {name!r}, shape {shape}): SGRQ "
        "tunes the scales of linear layers, and these are 3-D parameters that no linear layer owns. Other layers are "
        "tuned; experts that are linear layers of their own would be, too."
    )


def _is_packed(module: nn.Module) -> bool:
    """Whether a module is quantized: a layer of a format, an embedding in blocks, or a head that is tied to one."""
    own = list(module.parameters(recurse=False))
    shown = makes_weight(module) and "weight" not in module._parameters
    return (
        is_quantized(module) or any(not p.is_floating_point() for p in own) or (shown and not any(module.children()))
    )


def check_modules_to_save(model: nn.Module, config: SGRQConfig) -> None:
    """Refuses a quantized module in `modules_to_save`, which cannot be trained whole."""
    for wanted in config.modules_to_save or ():
        for name, module in model.named_modules():
            if not name.endswith(wanted):  # as PEFT matches names
                continue
            if any(map(_is_packed, module.modules())):
                raise ValueError(
                    f"`modules_to_save` names {name!r}, which is quantized and cannot be trained whole, expected a "
                    "module in floating point; leave it out (its scales are trained if it is in `target_modules`), or "
                    "keep it from being quantized (`llm_int8_skip_modules` in bitsandbytes)."
                )
