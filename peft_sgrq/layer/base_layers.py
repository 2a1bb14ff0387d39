"""The layers of a model as they are without adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from peft_sgrq.formats.registry import is_quantized, resolve_weight
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.linear import SGRQLinear


def named_base_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a model as they are without adapters: an adapted layer stands for its base layer."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (name + ".",)
        yield name, base_layer_of(module)


def places_of_shared(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """Where the layers of a model are that have several places, and those with an adapter: the parents, and names."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and (isinstance(child, SGRQLinear) or not child._modules):
                found.setdefault(child, []).append((parent, name))
    return {child: places for child, places in found.items() if len(places) > 1 or isinstance(child, SGRQLinear)}


def base_layer_of(module: nn.Module) -> nn.Module:
    """The base layer of a layer adapted by SGRQ; any other module itself."""
    return module.get_base_layer() if isinstance(module, SGRQLinear) else module


@contextmanager
def original_scales(model: nn.Module) -> Iterator[None]:
    """While this is open all layers of a model have the scales they have without any adapter merged."""
    with ExitStack() as stack:
        for module in list(model.modules()):
            if isinstance(module, SGRQLinear):
                stack.enter_context(module.original_scales())
        yield


def scaled_weight_of(name: str, layer: nn.Module, group_size: int) -> ScaledWeight:
    """The scaled weight of a layer; a ValueError that names the layer if there is none."""
    try:
        scaled_weight = resolve_weight(layer, group_size)
        if scaled_weight.device.type == "meta" and getattr(layer, "_hf_hook", None) is not None:
            raise ValueError(
                "it is offloaded by accelerate, and its scales are needed outside of its forward pass, too; load the "
                "model with a device_map that keeps the layers to adapt on a device"
            )
    except ValueError as error:
        raise ValueError(f"Layer {name!r} cannot be adapted: {error}. The model was not changed.") from None
    return scaled_weight


def makes_weight(module: nn.Module | None) -> bool:
    """Whether the `weight` of a module is made of other tensors each time it is asked for, as a packed head's is."""
    return isinstance(getattr(type(module), "weight", None), property)


def refuse_adapters(model: nn.Module, what: str) -> None:
    """Raises an error if what is given is no model, or has an adapter; `what` is asked for, as in "calibrate"."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"The model is a {type(model).__name__}, expected one in memory; load it, as by "
            "`AutoModelForCausalLM.from_pretrained`."
        )
    adapted = isinstance(getattr(model, "base_model", None), BaseTuner) or isinstance(model, BaseTuner)
    if adapted or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"The model has an adapter, expected the base model alone; {what} before `get_peft_model`, or take the "
            "adapter off with `model.unload()`."
        )


def refuse_unless_dense(model: nn.Module, what: str) -> None:
    """Raises a ValueError unless a model is dense, without adapters, and all in memory; `what` is asked for."""
    refuse_adapters(model, what)
    found = next((name for name, module in model.named_modules() if is_quantized(module)), None)
    if found is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"The model is quantized already ({found or 'its config says so'}), expected a dense one; {what} the "
            "original."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "The model has weights on the meta device, expected all in memory; load it without offloading."
        )
    kinds = {
        "divided over devices": lambda one: hasattr(one, "device_mesh"),
        "made in inference mode": torch.Tensor.is_inference,
    }
    for kind, has in kinds.items():
        found = next((name for name, parameter in model.named_parameters() if has(parameter)), None)
        if found is not None:
            raise ValueError(f"{found} is {kind}, expected a plain tensor; load the model anew, on one device.")
    found = next((name for name, module in model.named_modules() if is_parametrized(module)), None)
    if found is not None:
        raise ValueError(
            f"{found} has a parametrization, expected weights that are stored; take it off with "
            "`torch.nn.utils.parametrize.remove_parametrizations`."
        )
