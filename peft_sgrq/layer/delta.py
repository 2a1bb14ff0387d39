"""The relative scale changes of one adapter on one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_sgrq.layer.functional import round_straight_through
from peft_sgrq.layer.masks import pack_mask, unpack_mask

_RANDOM_STD = 0.1  # of init_weights=False: large enough for a test to see, small enough to keep every scale's sign


class Delta(nn.Module):
    """A trainable float32 matrix of relative scale changes, with the groups they belong to.

    A module of its own so that parameter names read `sgrq_delta.<adapter>.weight`: TRL finds the parameters of an
    adapter by the dots around its name.

    Attributes:
        weight (`nn.Parameter`): The deltas, float32, `[rows, n]` in a group format, `[n, 1]` in a row format.
        selection (`torch.Tensor`): Bit mask of the selected groups, uint8 `[ceil(selectable / 8)]`. It is saved beside
            the deltas: PEFT replaces an adapter in place without reading the new config, and deltas must not end up
            on the groups of the old one.
        groups (`torch.Tensor`): Indices of the selected groups, int64 `[n]`; not saved.
    """

    weight: nn.Parameter
    selection: torch.Tensor
    groups: torch.Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        groups: torch.Tensor,
        selectable: int,
        dtype: torch.dtype,
        zero: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        weight = torch.zeros(shape, dtype=torch.float32, device=device)
        if not zero:
            weight.normal_(std=_RANDOM_STD)
        self.weight = nn.Parameter(weight)
        # On a meta base there is nothing to place the indices beside; the CPU keeps their values.
        place = torch.device("cpu") if device.type == "meta" else device
        self.register_buffer("selection", pack_mask(groups, selectable).to(place))
        self.register_buffer("groups", groups.to(place), persistent=False)
        self.selectable = selectable
        self.dtype = dtype
        self._exact: torch.Tensor | None = None
        self._remember()

    def selected(self) -> torch.Tensor | None:
        """Indices of the selected groups, or `None` if all are: then there is nothing to gather."""
        return None if self.groups.shape[0] == self.selectable else self.groups

    def values(self) -> torch.Tensor:
        """The deltas as the forward pass uses them: float32, on the grid of the adapter dtype."""
        return round_straight_through(self.weight.float(), self.dtype)

    # TRL casts the trainable parameters of an adapter on a 4-bit or 8-bit base to bfloat16 when a trainer is made
    # (https://github.com/huggingface/trl/issues/7268 has why that freezes small updates), by `param.data = ...`. The
    # float32 values are still in the storage the parameter had before; no memory is spent on remembering it.
    # tests/test_trl.py::test_trl_still_casts_adapters_to_bfloat16 fails once this is not needed any more.

    def _remember(self) -> None:
        self._exact = self.weight.detach() if self.weight.dtype == torch.float32 else None

    def restore_precision(self) -> None:
        """Makes the deltas float32 again after a cast, with the bits they had before it if nothing changed since."""
        if self.weight.dtype == torch.float32:
            if self._exact is None or self._exact.data_ptr() != self.weight.data_ptr():
                self._accept()
            return
        exact, cast = self._exact, self.weight.detach()
        unchanged = (
            exact is not None
            and exact.shape == cast.shape
            and exact.device == cast.device
            and not cast.is_meta
            and torch.equal(exact.to(cast.dtype), cast)
        )
        self.weight.data = exact if unchanged and exact is not None else cast.float()
        self._accept()

    def _accept(self) -> None:
        # transformers loads adapters by putting new tensors into the module, past load_state_dict.
        if not self.weight.is_meta:
            errors = self.find_errors({"weight": self.weight, "selection": self.selection}, "")
            if errors:
                raise ValueError(f"The adapter cannot be used: {' '.join(errors)}")
            self.groups = unpack_mask(self.selection).to(self.groups.device)
        self._remember()

    def _apply(self, fn: Any, recurse: bool = True) -> Delta:
        result = super()._apply(fn, recurse)
        if self.weight.dtype == torch.float32:
            self._remember()
        return result

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.restore_precision()
        super()._save_to_state_dict(destination, prefix, keep_vars)

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
        if not self.weight.is_meta:
            self.restore_precision()
        errors = self.find_errors(state_dict, prefix)
        if errors:
            error_msgs.extend(errors)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._exact = None
        if not self.weight.is_meta:
            self.restore_precision()

    def find_errors(self, state_dict: Mapping[str, torch.Tensor], prefix: str) -> list[str]:
        """Why the tensors `prefix + "weight"` and `prefix + "selection"` cannot be loaded; empty if they can.

        Args:
            state_dict (`Mapping[str, torch.Tensor]`): What is to be loaded; either tensor may be missing.
            prefix (`str`): What their names begin with.
        """
        weight, selection = state_dict.get(prefix + "weight"), state_dict.get(prefix + "selection")
        errors = []
        if weight is not None and tuple(weight.shape) != tuple(self.weight.shape):
            errors.append(
                f"{prefix}weight has shape {tuple(weight.shape)}, expected {tuple(self.weight.shape)}: the file was "
                "saved with another selection than the adapter it is loaded into; load it under a new adapter name."
            )
        elif weight is not None and not weight.is_meta and not bool(torch.isfinite(weight).all()):
            errors.append(
                f"{prefix}weight holds NaN or infinite deltas, expected finite numbers: the training that wrote the "
                "file diverged; load an earlier checkpoint."
            )
        if selection is not None and (
            selection.shape != (-(-self.selectable // 8),)
            or selection.dtype != torch.uint8
            or len(unpack_mask(selection)) != len(self.groups)
        ):
            errors.append(
                f"{prefix}selection selects other than {len(self.groups)} of {self.selectable} groups, which the "
                "adapter it is loaded into does; load the file under a new adapter name."
            )
        return errors
