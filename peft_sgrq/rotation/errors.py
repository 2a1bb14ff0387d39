"""What quantization costs with and without a rotation, layer by layer, in one unit: the relative squared error.

RoSTE (Wei et al. 2025, arXiv 2502.09003) chooses rotations by layer from mean squared errors of weights, activations
and keys, added up, in a model that has all rotations or none. Here each is the error of what the layer computes,
relative to that, and inputs are those of the model before quantization. So the errors of layers do not depend on
each other, and choosing the smaller one layer by layer is the best of all 2^n choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.passes.data import Batch
from peft_sgrq.passes.running import runner
from peft_sgrq.passes.untouched import untouched
from peft_sgrq.rotation.attention import can_hook_attention, hooked_attention
from peft_sgrq.rotation.fusing import has_hadamard, rotation_factory
from peft_sgrq.rotation.online import down_block
from peft_sgrq.rotation.roles import BlockRoles
from peft_sgrq.rotation.rounding import quantized_activation, quantized_weight
from peft_sgrq.rotation.scheme import Scheme


@dataclass(frozen=True)
class RotationError:
    """What a rotation does to a block's errors.

    Attributes:
        block (`str`): The block.
        rotation (`str`): "R2", "R3" or "R4".
        without, rotated (`float`): The squared error relative to what is computed, summed over the products concerned.
    """

    block: str
    rotation: str
    without: float
    rotated: float

    @property
    def helps(self) -> bool:
        """Whether the error is smaller with the rotation; as large is not."""
        return self.rotated < self.without


class _Sums:
    """Squared errors and squares of what they are errors of, over all batches, for the two variants of a term."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, term: str, variant: int, found: torch.Tensor, exact: torch.Tensor) -> None:
        sums = self._sums.setdefault(term, [0.0] * 4)
        sums[2 * variant] += (found.double() - exact.double()).square().sum().item()
        sums[2 * variant + 1] += exact.double().square().sum().item()

    def relative(self, variant: int) -> float:
        pairs = [(sums[2 * variant], sums[2 * variant + 1]) for sums in self._sums.values()]
        return sum(error / square for error, square in pairs if square)


def measure_errors(
    model: nn.Module,
    blocks: Sequence[BlockRoles],
    rotations: Sequence[str],
    scheme: Scheme,
    batches: Sequence[Batch],
    seed: int,
) -> list[RotationError]:
    """The errors with and without each rotation in each block that it can go to.

    Args:
        model (`nn.Module`): The model before quantization, with R1 if it is to have that. It is left as it was.
        blocks (`Sequence[BlockRoles]`): Its blocks.
        rotations (`Sequence[str]`): Of "R2", "R3" and "R4".
        scheme (`Scheme`): The bits.
        batches (`Sequence[Batch]`): The data.
        seed (`int`): That of the rotations.
    """
    sums: dict[tuple[str, str], _Sums] = {}
    with untouched(model), torch.no_grad(), ExitStack() as stack:
        if "R3" in rotations:
            stack.enter_context(hooked_attention(model))
        counted: list[torch.Tensor] = []
        for block in blocks:
            for rotation, watch in (("R2", _watch_values), ("R3", _watch_queries), ("R4", _watch_down)):
                if rotation in rotations and rotation in possible(model, block):
                    sums[block.name, rotation] = _Sums()
                    for handle in watch(model, block, scheme, seed, sums[block.name, rotation], counted):
                        stack.callback(handle.remove)
        run = runner(model)
        for batch in batches:
            counted[:] = [batch.counted]
            run(batch)
    return [RotationError(name, rotation, *map(found.relative, (0, 1))) for (name, rotation), found in sums.items()]


def possible(model: nn.Module, block: BlockRoles) -> dict[str, str]:
    """Which rotations can go into a block, and the layer they act on."""
    found = {}
    heads = block.head_dim is not None and has_hadamard(block.head_dim)
    if heads and block.value is not None and block.output is not None:
        found["R2"] = block.output
    if heads and block.attention is not None and can_hook_attention(model):
        found["R3"] = block.attention
    if block.down is not None and down_block(model.get_submodule(block.down).in_features):  # type: ignore[arg-type]
        found["R4"] = block.down
    return found


def _rotated(module: nn.Module, name: str, seed: int, head_dim: int | None, place: str, x: torch.Tensor) -> Any:
    """`x` rotated as it would be at a place of a module."""
    factory = rotation_factory(name, seed, [([], place, place == "weight_input")], head_dim)
    if x.dtype == torch.float64:
        factory.scheme.precision = torch.float64
    return factory.create_transform(module, factory.scheme.apply[0])(x)


def _product_watcher(
    layer: Any, scheme: Scheme, name: str, seed: int, head_dim: int, sums: _Sums, counted: list[torch.Tensor]
) -> Callable[..., None]:
    """A hook for a layer that adds the errors of its product, with and without a rotation of its input."""
    plain = layer.weight.detach()
    weights = [plain, _rotated(layer, name, seed, head_dim, "weight_input", plain)]
    args = scheme.weight_args(scheme.weights, scheme.by_row(plain.shape[1]))
    rounded = [quantized_weight(weight, args) for weight in weights]
    rounding = scheme.activation_args()

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x = inputs[0]
        chosen = counted[0].to(x.device)
        exact = F.linear(x, plain)[chosen]
        for variant, values in enumerate((x, _rotated(layer, name, seed, head_dim, "input", x))):
            found = F.linear(quantized_activation(values, rounding), rounded[variant])[chosen]
            sums.add("product", variant, found, exact)

    return hook


def _watch_values(
    model: nn.Module, block: BlockRoles, scheme: Scheme, seed: int, sums: _Sums, counted: list[torch.Tensor]
) -> list[Any]:
    layer, values = model.get_submodule(str(block.output)), model.get_submodule(str(block.value))
    head_dim = int(block.head_dim or 0)
    cache = scheme.cache_args(head_dim)

    def of_values(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        chosen = counted[0].to(output.device)
        rotated = _rotated(layer, "R2", seed, head_dim, "input", output)
        for variant, value in enumerate((output, rotated)):
            sums.add("values", variant, quantized_activation(value, cache)[chosen], value[chosen])

    hook = _product_watcher(layer, scheme, "R2", seed, head_dim, sums, counted)
    handles = [layer.register_forward_hook(hook)]
    return handles if cache is None else [*handles, values.register_forward_hook(of_values)]


def _watch_down(
    model: nn.Module, block: BlockRoles, scheme: Scheme, seed: int, sums: _Sums, counted: list[torch.Tensor]
) -> list[Any]:
    layer: Any = model.get_submodule(str(block.down))
    size = down_block(layer.in_features)
    hook = _product_watcher(layer, scheme, "R4", seed, int(size or 0), sums, counted)
    return [layer.register_forward_hook(hook)]


def _watch_queries(
    model: nn.Module, block: BlockRoles, scheme: Scheme, seed: int, sums: _Sums, counted: list[torch.Tensor]
) -> list[Any]:
    from compressed_tensors.modeling import register_key_hook, register_query_hook

    attention, head_dim = model.get_submodule(str(block.attention)), int(block.head_dim or 0)
    cache = scheme.cache_args(head_dim)
    keys: list[torch.Tensor] = []

    def of_keys(module: nn.Module, key: torch.Tensor) -> None:
        keys[:] = [key]

    def of_queries(module: nn.Module, query: torch.Tensor) -> None:
        key, mask = keys.pop(), counted[0].to(query.device)
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        chosen = (seen & mask[:, None, :] & mask[:, :, None]).unsqueeze(1)  # (B, 1, T, T)
        exact = _scores(query, key).masked_fill(~chosen, 0)
        for variant in (0, 1):
            q, k = (_rotated(attention, "R3", seed, head_dim, "q_attn", x) if variant else x for x in (query, key))
            found = _scores(q, quantized_activation(k, cache)).masked_fill(~chosen, 0)
            sums.add("scores", variant, found, exact)

    return [register_key_hook(attention, of_keys), register_query_hook(attention, of_queries)]


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)  # (B, H, T, T)
