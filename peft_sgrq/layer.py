"""The layer of an SGRQ adapter: a base layer computing with changed scales."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from peft_sgrq.backends import ScaleBackend, resolve_backend
from peft_sgrq.config import SGRQConfig
from peft_sgrq.delta import Delta
from peft_sgrq.functional import effective_scales, scaled_linear
from peft_sgrq.mixed_batch import check_rows, forward_mixed
from peft_sgrq.prepared import Decoder, PreparedScales
from peft_sgrq.saved_inputs import SavedInput


def _quantize_again() -> None:
    # PEFT wants to be told how a torchao layer is quantized again after a merge.
    raise RuntimeError("SGRQ merges into the scales and quantizes nothing again, so PEFT must not do it either.")


class SGRQLinear(nn.Module, BaseTunerLayer):
    """A linear layer whose scales are changed by its active adapters: `S' = S (1 + sum_a delta_a)`.

    Args:
        base_layer (`nn.Module`): The layer, of a format `resolve_backend` knows.
        adapter_name (`str`): Name of the first adapter.
        config (`SGRQConfig`): Its configuration.
        groups (`torch.Tensor`): The groups it selects, int64 `[n]`, ascending.
    """

    adapter_layer_names = ("sgrq_delta",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SGRQConfig, groups: torch.Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        # For PEFT's status and repr only: PEFT's own backends merge by quantizing again.
        self.quantization_backend = resolve_quantization_backend(base_layer, get_apply_tensor_subclass=_quantize_again)
        self._backend = resolve_backend(base_layer, config.group_size)
        self.in_features, self.out_features = self.backend.in_features, self.backend.out_features
        self.sgrq_delta = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._unmerged_scales: tuple[Any, ...] = ()  # in a tuple, lest a parameter in it is registered
        self._prepared = PreparedScales()
        self._decoder: Decoder | None = None
        self._unions: dict[tuple[str, ...], torch.Tensor | None] = {}
        self.update_layer(adapter_name, config=config, groups=groups)

    @property
    def backend(self) -> ScaleBackend:
        """The base layer seen as codes and scales; always that of the module which is `base_layer` now."""
        if self._backend.module is not self.base_layer:
            self._backend = resolve_backend(self.base_layer, self._backend.group_size)
            self._forget()
        return self._backend

    # adapters

    def update_layer(
        self,
        adapter_name: str,
        config: SGRQConfig,
        groups: torch.Tensor,
        inference_mode: bool = False,
    ) -> None:
        """Adds an adapter, or replaces the one of that name.

        Args:
            adapter_name (`str`): Its name.
            config (`SGRQConfig`): Its config; the group size must be that of the layer's other adapters.
            groups (`torch.Tensor`): The groups it selects, int64 `[n]`, ascending.
            inference_mode (`bool`): Whether it starts frozen.
        """
        backend = self.backend
        shape = backend.delta_shape(len(groups))
        dtype = getattr(torch, config.adapter_dtype)
        self.sgrq_delta[adapter_name] = Delta(
            shape, groups, backend.selectable, dtype, zero=config.init_weights is not False, device=backend.device
        )
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self._forget()
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        active = self._present(self.active_adapters)
        if len(active) > 1:
            self._union(active)  # depends on data, so not something torch.compile could trace in the forward pass

    def delete_adapter(self, adapter_name: str) -> None:
        self._forget()
        super().delete_adapter(adapter_name)

    def _present(self, adapter_names: Sequence[str]) -> tuple[str, ...]:
        # In one fixed order: the sum of deltas then has the same bits when merging as in the forward pass.
        return tuple(name for name in self.sgrq_delta if name in adapter_names)

    def _delta(self, name: str) -> Delta:
        return self.sgrq_delta[name]  # type: ignore[return-value]

    def combined_delta(self, adapter_names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sum of the deltas of some adapters, differentiable.

        Args:
            adapter_names (`tuple[str, ...]`): Adapters this layer has, at least one.

        Returns:
            The deltas, float32, shaped as `effective_scales` takes them, and the groups they belong to, the union of
            the adapters' selections (`None` for all).
        """
        deltas = [self._delta(name) for name in adapter_names]
        if len(deltas) == 1:
            return deltas[0].values(), deltas[0].selected()
        backend, dim = self.backend, self.backend.selected_dim
        total = torch.zeros(backend.delta_shape(backend.selectable), device=backend.device)  # all groups
        for delta in deltas:
            total = total.index_add(dim, delta.groups, delta.values())
        groups = self._union(adapter_names)
        return (total, None) if groups is None else (total.index_select(dim, groups), groups)

    def _union(self, adapter_names: tuple[str, ...]) -> torch.Tensor | None:
        """Indices of the groups that any of the adapters selects, int64, ascending; `None` for all of them."""
        if adapter_names not in self._unions:
            groups = torch.cat([self._delta(name).groups for name in adapter_names]).unique()
            self._unions[adapter_names] = None if len(groups) == self.backend.selectable else groups
        return self._unions[adapter_names]

    def _forget(self) -> None:
        self._forget_prepared()
        self._unions.clear()

    def _forget_prepared(self) -> None:
        self._prepared.clear()
        self._decoder = None

    # forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        decoder = self._decoder
        if decoder is not None:
            if not kwargs and self._is_decoding(x) and decoder.is_current(*self._decoding_state()):
                return decoder.run(x)
            self._decoder = None
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            check_rows(adapter_names, len(x), self.merged_adapters)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return forward_mixed(adapter_names, x, self._present, self._adapted)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(x, self._present(self.active_adapters), plain=True)

    def _adapted(self, x: torch.Tensor, names: tuple[str, ...], plain: bool = False) -> torch.Tensor:
        if not names:
            return self.base_layer(x)
        # The base layer's own forward is not called, so its accelerate hook (offloading, device maps) is.
        hook = getattr(self.base_layer, "_hf_hook", None)
        if hook is not None:
            (x, *_), _ = hook.pre_forward(self.base_layer, x)
        if not torch.compiler.is_compiling():
            for name in names:
                self._delta(name).restore_precision()
        backend = self.backend
        x_cast = backend.cast_input(x)
        if self._needs_grad(x_cast, names):
            self._forget_prepared()
            y = scaled_linear(x_cast, *self.combined_delta(names), backend, SavedInput.of(x))
        else:
            with torch.no_grad():
                prepared = self._prepared_scales(names, x_cast)
                y = backend.linear(x_cast, prepared)
            if plain and hook is None and self._is_decoding(x):  # not for some rows of a mixed batch
                self._decoder = Decoder.of(backend.bind(prepared), *self._decoding_state())
        y = backend.cast_output(y, x)
        bias = backend.bias
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            y = y + (bias - bias.detach()).to(y.dtype)  # zero: the kernel has added the bias, this is its gradient
        return y if hook is None else hook.post_forward(self.base_layer, y)

    def _is_decoding(self, x: torch.Tensor) -> bool:
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return x.dim() > 1 and x.shape[-2] == 1

    def _decoding_state(self) -> tuple[tuple[object, ...], list[torch.Tensor]]:
        """All that decides what a forward pass computes, as `Decoder` compares it."""
        module = self.base_layer
        active = self._active_adapter if isinstance(self._active_adapter, str) else tuple(self._active_adapter)
        state = (module, active, self._disable_adapters, len(self.merged_adapters), hasattr(module, "_hf_hook"))
        weights = [self._delta(name).weight for name in self.sgrq_delta]
        return state, [*weights, *self._backend.sources()]

    def _needs_grad(self, x: torch.Tensor, names: tuple[str, ...]) -> bool:
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(self._delta(name).weight.requires_grad for name in names)

    def _prepared_scales(self, names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        def prepare() -> torch.Tensor:
            return self.backend.prepare(effective_scales(self.backend, *self.combined_delta(names)))

        if self.training or torch.compiler.is_compiling():
            return prepare()
        sources = [self._delta(name).weight for name in names] + self.backend.sources()
        # A sequence makes them anew, its further tokens reuse them: a change through `.data` goes unseen only between
        # two inputs of one token each, with no training step and no `train()` or `eval()` between them.
        decoding = x.dim() > 1 and x.shape[-2] == 1
        return self._prepared.get(names, sources, prepare, reuse=decoding)

    # merging and combining

    @torch.no_grad()
    def add_weighted(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds `sum_a weight_a delta_a` to the deltas of an adapter that selects all their groups."""
        target = self._delta(adapter_name)
        for name, weight in zip(adapters, weights, strict=True):
            if name in self.sgrq_delta:
                positions = torch.searchsorted(target.groups, self._delta(name).groups)
                values = self._delta(name).values() * weight
                target.weight.index_add_(self.backend.selected_dim, positions, values)
        self._forget_prepared()

    def check_finite(self, adapter_names: list[str] | None = None) -> None:
        """Raises a ValueError if merging the adapters (`None`: the active ones) would write NaN or infinite scales."""
        names = self._present(self.active_adapters if adapter_names is None else adapter_names)
        for checked in dict.fromkeys(
            [*((name,) for name in names), *([names] if names else [])]
        ):  # each, and their sum
            with self.original_scales():
                scales = effective_scales(self.backend, *self.combined_delta(checked))
            if not torch.isfinite(scales).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {', '.join(checked)} seems to be broken: its "
                    "deltas give NaN or infinite scales, expected finite ones; load an earlier checkpoint of it. "
                    "Nothing was merged."
                )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the scales of the active (or the named) adapters into the base layer.

        Codes and unselected scales stay as they are, nothing is quantized again, and the merged layer gives the bits
        of the unmerged one. The original scale tensors are kept for `unmerge`.

        Args:
            safe_merge (`bool`): Check for NaN and infinite scales first.
            adapter_names (`list[str]` or `None`): Adapters to merge; the active ones if not given.

        Raises:
            ValueError: With `safe_merge`, if an adapter is broken; nothing is changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.sgrq_delta]
        if not names:
            return
        for name in names:
            self._delta(name).restore_precision()
        if safe_merge:
            self.check_finite(names)
        merged = [*self.merged_adapters, *names]
        before = [self.backend.restore_scales(stored) for stored in self._unmerged_scales]
        try:
            scales = effective_scales(self.backend, *self.combined_delta(self._present(merged)))
            self._unmerged_scales = (self.backend.write_scales(scales),)
        except Exception:
            for stored in before:
                self.backend.restore_scales(stored)
            raise
        self.merged_adapters = merged
        self._forget_prepared()

    def unmerge(self) -> None:
        """Puts the original scale tensors back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self.backend.restore_scales(*self._unmerged_scales)
        self._unmerged_scales = ()
        self.merged_adapters = []

    @contextmanager
    def original_scales(self) -> Iterator[None]:
        """While this is open the base layer has its original scales, merged or not."""
        if not self.merged:
            yield
            return
        merged = self.backend.restore_scales(*self._unmerged_scales)
        try:
            yield
        finally:
            self.backend.restore_scales(merged)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The change an adapter makes to the weight of the base, float32 `[out_features, in_features]`."""
        backend = self.backend
        with self.original_scales():
            scales = effective_scales(backend, *self.combined_delta((adapter,)))
            changed = backend.dequantize(scales, torch.float32)
            return changed - backend.dequantize(backend.scales(), torch.float32)

    # module

    def train(self, mode: bool = True) -> SGRQLinear:
        self._forget_prepared()
        for name in self.sgrq_delta:
            self._delta(name).restore_precision()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_decoder": None}  # what is bound to this layer's tensors is not a copy's

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> SGRQLinear:
        self._forget()
        self._unmerged_scales = tuple(self.backend.convert_stored(stored, fn) for stored in self._unmerged_scales)
        return super()._apply(fn, recurse)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own also casts to the dtype the base computes in; deltas stay float32.
        if adapter_name in self.sgrq_delta:
            delta = self._delta(adapter_name)
            if not delta.weight.is_meta:
                delta.to(device or self.backend.device)

    def scale_layer(self, scale: float) -> None:
        if scale != 1:
            warnings.warn("Scaling operation for SGRQ not supported! Automatically set scale to 1.")

    def unscale_layer(self, scale: float | None = None) -> None:
        if scale is not None and scale != 1:
            warnings.warn("Unscaling operation for SGRQ not supported! Keeping scale at 1.")

    def extra_repr(self) -> str:
        text = f"{self.backend.name}, rows x groups={'x'.join(map(str, self.backend.scales_shape))}"
        quantization = quantization_extra_repr(self)
        return f"{text}, {quantization}" if quantization else text

    def __repr__(self) -> str:
        return "sgrq." + super().__repr__()
