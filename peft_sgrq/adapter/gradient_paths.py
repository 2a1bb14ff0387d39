"""Do layers without an adapter pass the gradient of their input on? Training around one that does not is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from peft_sgrq.formats.compressed_tensors.weight import stays_compressed
from peft_sgrq.formats.dense.weight import DenseWeight
from peft_sgrq.formats.registry import is_quantized, resolve_weight

_TOKENS = 16  # kernels for float8 take no fewer
_WIDTH_NAMES = ("in_features", "infeatures", "input_features")


def lost_gradient(name: str, layer: nn.Module, group_size: int) -> str | None:
    """Why a layer without an adapter would lose the gradient of its input, as a clause; `None` if it passes it on.

    Formats that are tuned say so themselves. Of any other linear layer (a format or a kernel that is refused, a class
    with a forward pass of its own, another library's) a copy is run forwards and backwards on random numbers.
    """
    if stays_compressed(layer):
        return None  # it computes straight-through once the model has an adapter
    if is_quantized(layer):
        try:
            drops = resolve_weight(layer, group_size).drops_input_gradient
        except ValueError:
            return _tried(name, layer)
        return "quantizes its activations" if drops else None
    plain = DenseWeight.matches(layer) and DenseWeight.obstacle(layer) is None
    return None if plain or _width(layer) is None else _tried(name, layer)


def _tried(name: str, layer: nn.Module) -> str | None:
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if not tensors or any(tensor.is_meta for tensor in tensors):
        return None  # nothing to compute with yet
    try:
        passed = _passes(copy.deepcopy(layer), tensors)
    except Exception as error:  # whatever a kernel that is not known raises
        if is_quantized(layer):
            warnings.warn(
                f"Whether layer {name!r} passes the gradient of its input on could not be found out "
                f"({type(error).__name__}: {error}); if it does not, layers before it learn less or nothing."
            )
        return None
    return None if passed else f"loses the gradient of its input (a {type(layer).__name__}, tried on random numbers)"


def _passes(layer: nn.Module, tensors: list[torch.Tensor]) -> bool:
    """Whether the gradient of a layer's input explains how its output changes with the input."""
    floats = [tensor.dtype for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)]
    dtype = min(floats, key=lambda each: each.itemsize) if floats else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    width: Any = _width(layer)
    x, change = (
        torch.randn(_TOKENS, width, generator=generator).to(tensors[0].device, dtype).requires_grad_() for _ in "xv"
    )
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        y = layer.train()(x)
        if not isinstance(y, torch.Tensor):
            return True  # no linear layer, whatever it is
        with torch.no_grad():
            difference = layer(x + change) - y
        if not y.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(y, x, difference, allow_unused=True)
    if gradient is None:
        return False
    # Of a linear layer both are the squared length of its output for the change; rounding adds some noise to them.
    explained, found = (gradient.double() * change.double()).sum(), difference.double().square().sum()
    return bool(explained.abs() > 0.1 * found) or not bool(found > 0)


def _width(layer: nn.Module) -> int | None:
    widths = (getattr(layer, name, None) for name in _WIDTH_NAMES)
    return next((width for width in widths if isinstance(width, int)), None)


def check_gradient_paths(layers: dict[str, nn.Module], adapted: Container[str], group_size: int) -> None:
    """Refuses to train around layers that lose the gradient of their input: those before them would learn nothing.

    Args:
        layers (`dict[str, nn.Module]`): The layers of a model by name, without adapters.
        adapted (`Container[str]`): The names of those that get an adapter.
        group_size (`int`): Columns per scale in a dense layer.

    Raises:
        ValueError: If a layer without an adapter would lose the gradient; the sentence names it.
    """
    for name, layer in layers.items():
        reason = None if name in adapted else lost_gradient(name, layer, group_size)
        if reason is not None:
            raise ValueError(
                f"Layer {name!r} {reason} and is not targeted, so training would lose the gradient there without a "
                "word, expected every such layer to have an adapter, which passes it on; use target_modules=None, or "
                "a `ratio` that makes the adapter small; a layer that cannot have one must be quantized otherwise or "
                "not at all. The model was not changed."
            )
