"""The relative scale changes of one adapter on one layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_sgrq.formats.partitioned import is_partitioned
from peft_sgrq.layer.functional import round_straight_through
from peft_sgrq.layer.masks import mask_of, pack_mask, read_mask

_RANDOM_STD = 0.1  # of init_weights=False: large enough for a test to see, small enough to keep every scale's sign


class DeltaParameter(nn.Parameter):
    """A parameter that stays float32, whatever it is cast to.

    TRL casts the trainable parameters of an adapter on a 4-bit or 8-bit base to bfloat16 when a trainer is made
    (https://github.com/huggingface/trl/issues/7268 has why that freezes small updates), by `param.data = ...`. To undo
    that later would be too late: a storage of another dtype takes the gradient accumulator of a parameter away, and
    with it what an engine has hooked there. DistributedDataParallel then averages nothing, without a word. So the cast
    does not happen. tests/plugin/test_trl.py::test_trl_still_casts_adapters_to_bfloat16 fails once TRL leaves it out.

    Args:
        data (`torch.Tensor`): The values, of any floating dtype.
        requires_grad (`bool`): Whether they are trained.
    """

    times_handed_out = 0  # its `.data`

    def __new__(cls, data: torch.Tensor, requires_grad: bool = True) -> DeltaParameter:
        return super().__new__(cls, data.detach().float(), requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "times_handed_out"}

    @property
    def data(self) -> torch.Tensor:
        # What is written through it shows in no version counter.
        self.__dict__["times_handed_out"] = self.times_handed_out + 1
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value.dtype != torch.float32:
            kept = self.detach()
            same = value.shape == kept.shape and not value.is_meta and not kept.is_meta
            if same and torch.equal(kept.to(value.device, value.dtype), value):  # these values cast, so their bits
                if value.device == kept.device:
                    return
                value = kept.to(value.device)
            else:
                value = value.float()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


class Delta(nn.Module):
    """A trainable float32 matrix of relative scale changes, with the units they belong to.

    A module of its own so that parameter names read `sgrq_delta.<adapter>.weight`: TRL finds the parameters of an
    adapter by the dots around its name.

    The units are no buffer: averages of models (EMA, SWA) take in buffers, and a mean of indices means nothing. In a
    state dict they are a mask of zeros and ones, float32 `[selectable]`, which is itself when it is averaged; it is
    there because deltas must not end up on the units of another selection. An adapter file has it packed to bits.

    Attributes:
        weight (`nn.Parameter`): The deltas, float32, `[rows, n]` in a group format, `[n, 1]` in a row format.
        units (`torch.Tensor`): Indices of the selected units, int64 `[n]`, beside the deltas; on the CPU while these
            are on the meta device.
    """

    weight: nn.Parameter
    units: torch.Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        units: torch.Tensor,
        selectable: int,
        dtype: torch.dtype,
        zero: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)  # an engine that shards the weight shows another
        self.selectable = selectable
        self.dtype = dtype
        self._sharded = False
        self._is_checked = True
        self.has_had_gradient = False  # since it was made; `FirstGradients` watches it until then
        weight = torch.zeros(shape, dtype=torch.float32, device=device)
        if not zero:
            weight.normal_(std=_RANDOM_STD)
        self.weight = DeltaParameter(weight)
        self.units = units
        self.accept()

    @property
    def groups(self) -> torch.Tensor:
        """The `units`, for readers of an adapter's files, whose masks are of groups."""
        return self.units

    @property
    def selection(self) -> torch.Tensor:
        """Bit mask of the selected units, uint8 `[ceil(selectable / 8)]`, as an adapter file holds it."""
        return pack_mask(self.units, self.selectable).to(self.units.device)

    def selected(self) -> torch.Tensor | None:
        """Indices of the selected units, or `None` if all are: then there is nothing to gather."""
        return None if self.units.shape[0] == self.selectable else self.units

    def values(self) -> torch.Tensor:
        """The deltas as the forward pass uses them: float32, on the grid of the adapter dtype."""
        return round_straight_through(self.weight.float(), self.dtype)

    # What others do to the module.

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers and PEFT (with `low_cpu_mem_usage`) load adapters by putting new tensors into the module. FSDP2
        # puts in its shards first, and then at every forward pass a parameter of its own, which must stay that one.
        if name == "selection":
            self._raise_on({"selection": value.detach()})
            self._select(value.detach())
            return
        if name == "weight":
            if isinstance(value, DTensor):
                self._sharded = True
            elif not self._sharded:
                if type(value) is nn.Parameter:
                    wrapped = DeltaParameter(value, value.requires_grad)
                    wrapped.__dict__.update(value.__dict__)
                    value = wrapped
                self._is_checked = False
        super().__setattr__(name, value)

    def _select(self, mask: torch.Tensor) -> None:
        self.units = read_mask(mask, self.selectable).to(self.units.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_class()  # pickles know no other than torch's

    def _keep_class(self) -> None:
        if type(self.weight) is nn.Parameter and not self._sharded:
            self.weight = self.weight

    def accept(self) -> None:
        """Checks what others have put into the module, once, and has the indices beside the deltas.

        Raises:
            ValueError: If the deltas cannot be used.
        """
        if self.weight.is_meta:
            return
        if self.units.device != self.weight.device:
            self.units = self.units.to(self.weight.device)
        if self.weight.dtype not in (torch.float32, self.dtype):
            warnings.warn(
                f"The engine computes with deltas rounded to {self.weight.dtype}, while the adapter is saved in "
                f"{self.dtype}, expected the same: what is saved differs from what is trained in the last bits; load "
                "the base in bfloat16 and train without mixed precision (`bf16=False`, `mixed_precision: no`), or set "
                '`adapter_dtype="bfloat16"`.'
            )
        if not self._is_checked:
            self._raise_on({"weight": self.weight})
            self._is_checked = True

    def _raise_on(self, tensors: dict[str, torch.Tensor]) -> None:
        errors = self.find_errors(tensors, "")
        if errors:
            raise ValueError(f"The adapter cannot be used: {' '.join(errors)}")

    def _apply(self, fn: Any, recurse: bool = True) -> Delta:
        # Moved, but never cast: neither by `half()` nor by `type(dtype)`, which casts integers, too.
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        result = super()._apply(move, recurse)
        self._keep_class()  # torch puts a new parameter in where it cannot change the old one
        self.accept()
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # torch's functions for the states of sharded models know parameters and buffers and nothing else. A model in
        # shards is in training, and the file gets the selection from the module.
        if not self._sharded:
            destination[prefix + "selection"] = mask_of(self.units, self.selectable)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        errors = self.find_errors(state_dict, prefix)
        if errors:
            error_msgs.extend(errors)
            return
        key = prefix + "selection"
        own = {name: value for name, value in state_dict.items() if name.startswith(prefix) and name != key}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in state_dict:
            self._select(state_dict[key])
        elif strict and not self._sharded:
            missing_keys.append(key)
        self._is_checked = True
        self.accept()

    def find_errors(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> list[str]:
        """Why the tensors `prefix + "weight"` and `prefix + "selection"` cannot be loaded; empty if they can.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): What is to be loaded; either tensor may be missing.
            prefix (`str`): What their names begin with.
        """
        weight, mask = state_dict.get(prefix + "weight"), state_dict.get(prefix + "selection")
        errors = []
        elsewhere = weight is not None and weight.numel() == 0 and is_partitioned(self.weight)  # the engine has them
        if weight is not None and not elsewhere and tuple(weight.shape) != self.shape:
            errors.append(
                f"{prefix}weight has shape {tuple(weight.shape)}, expected {self.shape}: the file was "
                "saved with another selection than the adapter it is loaded into; load it under a new adapter name."
            )
        elif weight is not None and not (weight.is_floating_point() and weight.itemsize > 1):
            errors.append(
                f"{prefix}weight is {weight.dtype}, expected float32, bfloat16 or float16: no `save_pretrained` wrote "
                "this file; save the adapter again."
            )
        elif weight is not None and not weight.is_meta and not _is_finite(weight):
            errors.append(
                f"{prefix}weight holds NaN or infinite deltas, expected finite numbers: the training that wrote the "
                "file diverged; load an earlier checkpoint."
            )
        if mask is not None and not self._fits(mask):
            errors.append(
                f"{prefix}selection selects other than {len(self.units)} of {self.selectable} groups, which the "
                "adapter it is loaded into does; load the file under a new adapter name."
            )
        return errors

    def _fits(self, mask: torch.Tensor) -> bool:
        try:
            return len(read_mask(mask, self.selectable)) == len(self.units)
        except ValueError:
            return False


def _is_finite(weight: torch.Tensor) -> bool:
    values = weight.detach()
    return bool(torch.isfinite(values.to_local() if isinstance(values, DTensor) else values).all())
