"""The layer of an SGRQ adapter: a base layer computing with changed scales."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from peft_sgrq.formats.own_forward import call_as, forward_obstacle, has_hooks
from peft_sgrq.formats.scaled_weight import ScaledWeight
from peft_sgrq.layer.adapters import AdaptedLayer
from peft_sgrq.layer.functional import scaled_linear
from peft_sgrq.layer.inference import Decoder, is_one_token
from peft_sgrq.layer.mixed_batch import BASE_ADAPTER, check_rows
from peft_sgrq.layer.saved_inputs import SavedInput


class SGRQLinear(AdaptedLayer):
    """A linear layer whose scales are changed by its active adapters: `S' = S (1 + sum_a delta_a)`.

    Args:
        base_layer (`nn.Module`): The layer, of a format `resolve_weight` knows.
        adapter_name (`str`): Name of the first adapter.
        config (`SGRQConfig`): Its configuration.
        units (`torch.Tensor`): The units it selects, groups of columns or rows, int64 `[n]`, ascending.
        scaled_weight (`ScaledWeight` or `None`): The base layer as codes and scales, if it is known already.
    """

    # forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._first_gradients is not None and not torch.compiler.is_compiling():
            self._ran_in[0] = self._first_gradients.read_weights.number
        decoder = self._decoder
        if decoder is not None:
            if not (args or kwargs) and is_one_token(self, x) and decoder.is_current(*self._decoding_state()):
                return decoder.run(x)
            self._decoder = None
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            check_rows(adapter_names, len(x), self.merged_adapters)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base_output(x, *args, **kwargs)
        _refuse_extra(self.base_layer, args, kwargs)
        if adapter_names is not None:
            return self._mixed(adapter_names, x)
        if self.merged:
            return self._base_output(x)
        return self._adapted(x, self._present(self.active_adapters), plain=True)

    def _base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the base layer computes itself."""
        self.scaled_weight.check_input(x)
        bias = None if torch.compiler.is_compiling() else self.scaled_weight.bias
        kept = None if bias is None or bias.requires_grad else bias.data
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if bias is not None and kept is not None and bias.dtype != kept.dtype:
            bias.data = kept  # bitsandbytes casts the bias to the dtype of the input, for good
        return y

    def _mixed(self, names: list[str], x: torch.Tensor) -> torch.Tensor:
        """The output with another adapter for each row, `[B, ..., N]`; those of one adapter are computed together."""
        result: torch.Tensor | None = None
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            y = self._adapted(x[rows], () if name == BASE_ADAPTER else self._present([name]))
            result = y.new_empty(len(names), *y.shape[1:]) if result is None else result
            result[rows] = y
        return self._base_output(x) if result is None else result  # an empty batch

    def _adapted(self, x: torch.Tensor, names: tuple[str, ...], plain: bool = False) -> torch.Tensor:
        if not names:
            return self._base_output(x)
        base, scaled_weight = self.base_layer, self.scaled_weight
        if "forward" in base.__dict__ or not torch.compiler.is_compiling():
            self._check_forward(base, scaled_weight)
        decodes = plain and not has_hooks(base) and "_hf_hook" not in base.__dict__

        def compute(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            _refuse_extra(base, args, kwargs)
            return self._compute(x, names, scaled_weight, decodes)

        return call_as(base, compute, x)

    def _check_forward(self, base: nn.Module, scaled_weight: ScaledWeight) -> None:
        """Raises a RuntimeError if the base layer has had another forward pass since the adapter was added."""
        known, forward = self._known_forward
        obstacle = None
        if type(base) is not known:
            obstacle = scaled_weight.obstacle(base)
        elif known.forward is not forward:
            obstacle = (
                f"the forward pass of {known.__qualname__} was replaced after the adapter was added, expected the one "
                "it had; replace it before, which is looked at, or use hooks"
            )
        elif "forward" in base.__dict__:
            obstacle = forward_obstacle(base, scaled_weight.known_class(base))
        if obstacle is not None:
            raise RuntimeError(f"A layer with an adapter cannot compute as its base does: {obstacle}.")

    def _compute(
        self, x: torch.Tensor, names: tuple[str, ...], scaled_weight: ScaledWeight, decodes: bool
    ) -> torch.Tensor:
        """The forward pass with some adapters, at least one, in place of the base layer's own."""
        if not torch.compiler.is_compiling():
            self._base_codes.check(scaled_weight)
            for name in names:
                self._accept(name)
        x_cast = scaled_weight.cast_input(x)
        recorded = self._needs_grad(x_cast, names)
        if recorded and scaled_weight.is_trained:
            self.forget()
            y = scaled_weight.linear(x_cast, scaled_weight.prepare(self.effective_scales(names)))
            return scaled_weight.cast_output(y, x)
        if recorded:
            self.forget()
            moves = self.combined_zero_points(names)
            y = scaled_linear(x_cast, *self.combined_delta(names), scaled_weight, SavedInput(x), moves)
        else:
            with torch.no_grad():
                prepared = scaled_weight.prepare(self.effective_scales(names))
                y = scaled_weight.linear(x_cast, prepared)
            if decodes and is_one_token(self, x):  # not for some rows of a mixed batch
                state, sources = self._decoding_state()
                if not any(source.is_inference() for source in sources):  # such count no versions
                    self._decoder = Decoder(scaled_weight.bind(prepared), state, sources)
        if self.training and not torch.compiler.is_compiling() and x.numel():
            self._expect_gradients(names, y.grad_fn)
        y = scaled_weight.cast_output(y, x)
        bias = scaled_weight.bias
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            y = y + (bias - bias.detach()).to(y.dtype)  # zero: the kernel has added the bias, this is its gradient
        return y

    def _expect_gradients(self, names: tuple[str, ...], node: Any) -> None:
        if self._first_gradients is None:
            return
        for name in names:
            for what, trained in zip((name, f"{name} (zero points)"), self._trained(name), strict=False):
                if not trained.has_had_gradient and trained.weight.requires_grad:
                    self._first_gradients.expect(self._name, what, trained, node)
        self._first_gradients.note(node)

    def _decoding_state(self) -> tuple[tuple[object, ...], list[torch.Tensor]]:
        """All that decides what a forward pass computes, as `Decoder` compares it."""
        module = self.base_layer
        active = self._active_adapter if isinstance(self._active_adapter, str) else tuple(self._active_adapter)
        replaced = (module.__dict__.get("forward"), module.__dict__.get("_hf_hook"), has_hooks(module))
        state = (module, active, self._disable_adapters, len(self.merged_adapters), replaced)
        weights = [weight for name in self.sgrq_delta for weight in self._weights(name)]
        return state, [*weights, *self._scaled_weight.sources()]

    def _needs_grad(self, x: torch.Tensor, names: tuple[str, ...]) -> bool:
        if not torch.is_grad_enabled():
            return False
        if x.requires_grad or self.scaled_weight.is_trained:
            return True
        return any(weight.requires_grad for name in names for weight in self._weights(name))

    # merging and combining

    @torch.no_grad()
    def add_weighted(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Adds `sum_a weight_a delta_a` to the deltas of an adapter that selects all their groups."""
        target = self.delta(adapter_name)
        for name, weight in zip(adapters, weights, strict=True):
            if name in self.sgrq_delta:
                positions = torch.searchsorted(target.units, self.delta(name).units)
                values = self.delta(name).values() * weight
                target.weight.index_add_(self.scaled_weight.unit.dim, positions, values)
            if name in self.sgrq_zero_points:
                moves = self._zero_points(name).values() * weight
                self._zero_points(adapter_name).weight.add_(moves)
        self.forget()

    def check_base(self) -> None:
        """Raises a ValueError if nothing can be merged into the base layer, which was changed since it was adapted."""
        obstacle = self.scaled_weight.obstacle(self.base_layer)
        if obstacle is not None:
            raise ValueError(
                f"The adapter cannot be merged into layer {self._name!r}: {obstacle}. Nothing was merged."
            )

    def check_finite(self, adapter_names: list[str] | None = None) -> None:
        """Raises a ValueError if merging the adapters (`None`: the active ones) would write NaN or infinite scales."""
        names = self._present(self.active_adapters if adapter_names is None else adapter_names)
        for checked in dict.fromkeys([*((name,) for name in names), names] if names else ()):  # each, and their sum
            with self.original_scales():
                scales = self.effective_scales(checked)
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
            self._accept(name)
        if safe_merge:
            self.check_finite(names)
        merged = [*self.merged_adapters, *names]
        before = [self.scaled_weight.restore_scales(stored) for stored in self._unmerged_scales]
        try:
            scales = self.effective_scales(self._present(merged))
            self._unmerged_scales = (self.scaled_weight.write_scales(scales),)
        except Exception:
            for stored in before:
                self.scaled_weight.restore_scales(stored)
            raise
        self.merged_adapters = merged
        self.forget()

    def unmerge(self) -> None:
        """Puts the original scale tensors back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self.scaled_weight.restore_scales(*self._unmerged_scales)
        self._unmerged_scales = ()
        self.merged_adapters = []

    @contextmanager
    def original_scales(self) -> Iterator[None]:
        """While this is open the base layer has its original scales, merged or not."""
        if not self.merged:
            yield
            return
        merged = self.scaled_weight.restore_scales(*self._unmerged_scales)
        try:
            yield
        finally:
            self.scaled_weight.restore_scales(merged)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The change an adapter makes to the weight of the base, float32 `[out_features, in_features]`."""
        scaled_weight = self.scaled_weight
        with self.original_scales():
            scales = self.effective_scales((adapter,))
            changed = scaled_weight.dequantize(scales, torch.float32)
            return changed - scaled_weight.dequantize(scaled_weight.scales(), torch.float32)


def _refuse_extra(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises a TypeError if there is more than the input, as the base layer itself would: none takes more."""
    if args or kwargs:
        found = [f"{len(args)} positional"] * bool(args) + [f"{name!r}" for name in kwargs]
        raise TypeError(
            f"{type(module).__name__} was given more arguments than its input ({', '.join(found)}), expected none: "
            "linear layers take no others; pass them to the module that uses them."
        )
