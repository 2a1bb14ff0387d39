"""The adapters of a layer: deltas by name, sums of them, and what PEFT and torch do to a layer that has them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from peft_sgrq.config import SGRQConfig
from peft_sgrq.formats.registry import resolve_weight
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.base_codes import BaseCodes
from peft_sgrq.layer.delta import Delta
from peft_sgrq.layer.first_gradients import FirstGradients
from peft_sgrq.layer.functional import effective_scales
from peft_sgrq.layer.inference import Decoder


def _quantize_again() -> None:
    # PEFT wants to be told how a torchao layer is quantized again after a merge.
    raise RuntimeError("SGRQ merges into the scales and quantizes nothing again, so PEFT must not do it either.")


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A base layer with the deltas of its adapters; how it computes, and what it is made of, says `SGRQLinear`."""

    adapter_layer_names = ("sgrq_delta", "sgrq_zero_points")
    other_param_names = ()

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: SGRQConfig,
        units: torch.Tensor,
        scaled_weight: ScaledWeight | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        # For PEFT's status and repr only: PEFT's own backends merge by quantizing again.
        self.quantization_backend = resolve_quantization_backend(base_layer, get_apply_tensor_subclass=_quantize_again)
        self._scaled_weight = scaled_weight or resolve_weight(base_layer, config.group_size)
        self.in_features, self.out_features = self.scaled_weight.in_features, self.scaled_weight.out_features
        self.sgrq_delta = nn.ModuleDict()
        self.sgrq_zero_points = nn.ModuleDict()  # of adapters that move zero points, all of them
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._unmerged_scales: tuple[Any, ...] = ()  # in a tuple, lest a parameter in it is registered
        self._decoder: Decoder | None = None
        self._unions: dict[tuple[str, ...], torch.Tensor | None] = {}
        self._known_forward = (type(base_layer), type(base_layer).forward)  # what computes in the merged layer
        self._base_codes = BaseCodes(self._scaled_weight)
        self._name = ""
        self._first_gradients: FirstGradients | None = None
        self._ran_in = [0]  # the number of the model's forward pass in which it ran last
        self.update_layer(adapter_name, config=config, units=units)

    @property
    def scaled_weight(self) -> ScaledWeight:
        """The base layer seen as codes and scales."""
        return self._scaled_weight

    def watch_gradients(self, name: str, first_gradients: FirstGradients) -> None:
        """Has the first gradients of the deltas checked, under the layer's name in its model."""
        self._name, self._first_gradients = name, first_gradients

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the base layer, which models look at for its dtype; whoever computes with it is noticed."""
        if self._first_gradients is not None and not torch.compiler.is_compiling():
            self._first_gradients.read_weights.note(self._name, self)
        return super().weight

    def is_passed_by(self, number: int) -> bool:
        """Whether the layer, which computes otherwise than its base, did not run in a forward pass of the model."""
        adapted = not (self._disable_adapters or self.merged) and bool(self._present(self.active_adapters))
        return adapted and self._ran_in[0] != number

    def has_never_run(self) -> bool:
        """Whether deltas are trained here and the layer has not run in any forward pass of the model."""
        trained = (weight for name in self._present(self.active_adapters) for weight in self._weights(name))
        return self._ran_in[0] == 0 and any(weight.requires_grad for weight in trained)

    def __setattr__(self, name: str, value: Any) -> None:
        # Another module put in place of the base layer is the one that computes from then on.
        if name == "base_layer" and "_scaled_weight" in self.__dict__:
            self.__dict__["_scaled_weight"] = resolve_weight(value, self._scaled_weight.group_size)
            self.__dict__["_known_forward"] = (type(value), type(value).forward)
            self.__dict__["_base_codes"] = BaseCodes(self._scaled_weight)
            self._forget_all()
        super().__setattr__(name, value)

    # adapters

    def update_layer(
        self,
        adapter_name: str,
        config: SGRQConfig,
        units: torch.Tensor,
    ) -> None:
        """Adds an adapter, or replaces the one of that name.

        Args:
            adapter_name (`str`): Its name.
            config (`SGRQConfig`): Its config; the group size must be that of the layer's other adapters.
            units (`torch.Tensor`): The units it selects, int64 `[n]`, ascending.
        """
        scaled_weight = self.scaled_weight
        shape = scaled_weight.delta_shape(len(units))
        dtype = getattr(torch, config.adapter_dtype)
        count, device = scaled_weight.selectable, scaled_weight.device
        zero = config.init_weights is not False
        self.sgrq_delta[adapter_name] = Delta(shape, units, count, dtype, zero, device)
        if config.zero_points and scaled_weight.movable_zero_points:
            everything = torch.arange(count)
            self.sgrq_zero_points[adapter_name] = Delta(
                scaled_weight.scales_shape, everything, count, dtype, zero, device
            )
        self.set_adapter(self.active_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self._forget_all()
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        active = self._present(self.active_adapters)
        if len(active) > 1:
            self._union(active)  # depends on data, so not something torch.compile could trace in the forward pass

    def delete_adapter(self, adapter_name: str) -> None:
        self._forget_all()
        super().delete_adapter(adapter_name)

    def _present(self, adapter_names: Sequence[str]) -> tuple[str, ...]:
        # In one fixed order: the sum of deltas then has the same bits when merging as in the forward pass.
        return tuple(name for name in self.sgrq_delta if name in adapter_names)

    def delta(self, name: str) -> Delta:
        """The deltas of an adapter."""
        return self.sgrq_delta[name]  # type: ignore[return-value]

    def _zero_points(self, name: str) -> Delta:
        return self.sgrq_zero_points[name]  # type: ignore[return-value]

    def _trained(self, name: str) -> list[Delta]:
        """What an adapter trains here: deltas of scales, and of zero points if it moves them."""
        return [self.delta(name), *([self._zero_points(name)] if name in self.sgrq_zero_points else [])]

    def _weights(self, name: str) -> list[torch.Tensor]:
        return [trained.weight for trained in self._trained(name)]

    def _accept(self, name: str) -> None:
        for trained in self._trained(name):
            trained.accept()

    def combined_zero_points(self, adapter_names: tuple[str, ...]) -> torch.Tensor | None:
        """The sum of the moves of zero points of some adapters, float32 `[rows, groups]`; `None` if none moves any."""
        moves = [self._zero_points(name).values() for name in adapter_names if name in self.sgrq_zero_points]
        return sum(moves[1:], moves[0]) if moves else None

    def effective_scales(self, adapter_names: tuple[str, ...]) -> torch.Tensor:
        """The scales the layer computes with, as `functional.effective_scales` makes them, for some adapters."""
        moves = self.combined_zero_points(adapter_names)
        return effective_scales(self.scaled_weight, *self.combined_delta(adapter_names), zero_points=moves)

    def combined_delta(self, adapter_names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sum of the deltas of some adapters, differentiable.

        Args:
            adapter_names (`tuple[str, ...]`): Adapters this layer has, at least one.

        Returns:
            The deltas, float32, shaped as `effective_scales` takes them, and the units they belong to, the union of
            the adapters' selections (`None` for all).
        """
        deltas = [self.delta(name) for name in adapter_names]
        if len(deltas) == 1:
            return deltas[0].values(), deltas[0].selected()
        scaled_weight, dim = self.scaled_weight, self.scaled_weight.unit.dim
        total = torch.zeros(
            scaled_weight.delta_shape(scaled_weight.selectable), device=scaled_weight.device
        )  # all units
        for delta in deltas:
            total = total.index_add(dim, delta.units, delta.values())
        units = self._union(adapter_names)
        return (total, None) if units is None else (total.index_select(dim, units), units)

    def _union(self, adapter_names: tuple[str, ...]) -> torch.Tensor | None:
        """Indices of the units that any of the adapters selects, int64, ascending; `None` for all of them."""
        if adapter_names not in self._unions:
            units = torch.cat([self.delta(name).units for name in adapter_names]).unique()
            self._unions[adapter_names] = None if len(units) == self.scaled_weight.selectable else units
        return self._unions[adapter_names]

    def _forget_all(self) -> None:
        self.forget()
        self._unions.clear()

    def forget(self) -> None:
        """Has the next forward pass look everything up again."""
        self._decoder = None

    # module

    def train(self, mode: bool = True) -> AdaptedLayer:
        self.forget()
        for name in self.sgrq_delta:
            self._accept(name)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # What is bound to this layer's tensors is not a copy's, and not every function can be pickled.
        return {**super().__getstate__(), "_decoder": None, "_known_forward": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known_forward = (type(self.base_layer), type(self.base_layer).forward)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_all()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedLayer:
        self._forget_all()
        self._unmerged_scales = tuple(
            self.scaled_weight.convert_stored(stored, fn) for stored in self._unmerged_scales
        )
        return super()._apply(fn, recurse)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the dtype the base computes in; deltas stay float32.
        if adapter_name in self.sgrq_delta:
            for trained in self._trained(adapter_name):
                if not trained.weight.is_meta:
                    trained.to(device or self.scaled_weight.device)

    def scale_layer(self, scale: float) -> None:
        if scale != 1:
            warnings.warn("Scaling operation for SGRQ not supported! Automatically set scale to 1.")

    def unscale_layer(self, scale: float | None = None) -> None:
        if scale is not None and scale != 1:
            warnings.warn("Unscaling operation for SGRQ not supported! Keeping scale at 1.")

    def extra_repr(self) -> str:
        text = f"{self.scaled_weight.name}, rows x groups={'x'.join(map(str, self.scaled_weight.scales_shape))}"
        quantization = quantization_extra_repr(self)
        return f"{text}, {quantization}" if quantization else text

    def __repr__(self) -> str:
        return "sgrq." + super().__repr__()
