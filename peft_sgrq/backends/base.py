"""What a weight format must offer to have its scales tuned."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

_SAMPLES = 4096


class ScaleBackend(ABC):
    """One linear layer seen as codes and scales: `W[o, c] = C[o, c] * S[r(o), k(c)]`.

    The backend owns the scales; nothing else keeps a copy of them. It holds the wrapped module and reads its tensors
    anew each time, so the module may be moved, copied or loaded into underneath it. No method but `write_scales` and
    `restore_scales` changes its weight.

    Attributes:
        module (`nn.Module`): The wrapped layer.
        name (`str`): The format, as it stands in fingerprints, e.g. `"bnb-nf4-64"`.
        granularity (`"group"` or `"row"`): Whether a scale serves a group of columns of one row, or one whole row.
            In a group format columns are selected by group; in a row format rows are selected.
        in_features, out_features (`int`): Shape of the weight, `[out_features, in_features]` = `[N, K]`.
        group_size (`int`): Columns per scale, `g`. The last group of a dense layer may hold fewer.
        storage_dtype (`torch.dtype`): The dtype the format stores its scales in (a dense layer: its weight).
    """

    granularity: ClassVar[Literal["group", "row"]] = "group"

    name: str
    in_features: int
    out_features: int
    group_size: int

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @staticmethod
    @abstractmethod
    def matches(module: nn.Module) -> bool:
        """Whether a module is a layer of this format. Imports nothing: a library not imported has no layers."""

    # geometry

    @property
    def selected_dim(self) -> int:
        """The dimension of `S` along which scales are selected: 1 (groups of columns) or 0 (rows)."""
        return 0 if self.granularity == "row" else 1

    @property
    def scales_shape(self) -> tuple[int, int]:
        """Shape `(rows, groups)` of the scale matrix `S`."""
        return self.out_features, -(-self.in_features // self.group_size)

    @property
    def selectable(self) -> int:
        """How many groups (rows in a row format) there are to select from."""
        return self.scales_shape[self.selected_dim]

    def delta_shape(self, selected: int) -> tuple[int, int]:
        """Shape of the deltas when `selected` groups or rows are tuned."""
        rows, groups = self.scales_shape
        return (selected, groups) if self.granularity == "row" else (rows, selected)

    @property
    def consecutive(self) -> bool:
        """Whether group `k` is the columns from `k * group_size` on; GPTQ's activation order assigns them freely."""
        return True

    def select_columns(self, x: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
        """Columns of the selected groups, `[..., K]` -> `[T, n * group_size]`; a partial group is padded by zeros."""
        x = x.reshape(-1, x.shape[-1])  # (T, K)
        return gather_groups(x, groups, self.scales_shape[1], self.group_size)

    # numbers

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.module.weight.device  # type: ignore[return-value]

    @property
    @abstractmethod
    def storage_dtype(self) -> torch.dtype:
        """The dtype the format stores its scales in; for a dense layer, the dtype of its weight."""

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the layer, `[out_features]`, or `None`."""
        return self.module.bias  # type: ignore[return-value]

    @abstractmethod
    def scales(self) -> torch.Tensor:
        """The scales `S`, float32 `[rows, groups]`. Not to be written to."""

    @abstractmethod
    def sources(self) -> list[torch.Tensor]:
        """The stored tensors that prepared scales are made of, so that a change of them can be seen."""

    @abstractmethod
    def codes(self, groups: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Unit-scale values `C` at the columns of the selected groups, `[N, n * group_size]`."""

    @abstractmethod
    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight `C * S` for given `scales` (float32 `[rows, groups]`), `[N, K]`."""

    def prepare(self, scales: torch.Tensor) -> torch.Tensor:
        """Makes of float32 scales `[rows, groups]` what the kernel of `linear` takes; inference does it once."""
        return scales

    @abstractmethod
    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """The layer's forward pass by the format's own kernel with other scales; no autograd.

        Args:
            x (`torch.Tensor`): `[..., K]`, as `cast_input` returns it.
            prepared (`torch.Tensor`): What `prepare` made of the scales.
        """

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        """The cast the format's forward pass begins with."""
        return x

    def cast_output(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The cast the format's forward pass ends with; `x` is the input before `cast_input`."""
        return y

    def round_to_storage(self, scales: torch.Tensor) -> torch.Tensor:
        """Rounds float32 scales to the grid of the storage dtype; the identity where they are stored in float32."""
        return scales if self.storage_dtype == torch.float32 else scales.to(self.storage_dtype).float()

    # state

    @abstractmethod
    def write_scales(self, scales: torch.Tensor) -> Any:
        """Replaces the stored scales, and nothing else.

        Args:
            scales (`torch.Tensor`): float32 `[rows, groups]`, as `effective_scales` returns them.

        Returns:
            What `restore_scales` needs to put the replaced tensors back: the same tensors, not equal ones.
        """

    @abstractmethod
    def restore_scales(self, stored: Any) -> Any:
        """Puts back what `write_scales` returned, and returns what that replaced, in the same form."""

    @abstractmethod
    def convert_stored(self, stored: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """Applies to what `write_scales` returned what `nn.Module.to` and the like do by `fn` to the layer itself."""

    @abstractmethod
    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored codes and the stored scales, in any shape, as they identify the base."""

    def fingerprint(self) -> str:
        """A cheap digest of the layer, `format:codes:scales`, from samples of the stored bytes."""
        codes, scales = self.fingerprint_tensors()
        return f"{self.name}:{_digest(codes, self.out_features, self.in_features)}:{_digest(scales)}"

    @abstractmethod
    def quantization(self) -> dict[str, Any] | None:
        """How a base of this format is loaded: `quant_method` and other fields of its config; `None` if dense."""


def gather_groups(values: torch.Tensor, groups: torch.Tensor | None, count: int, size: int) -> torch.Tensor:
    """Columns of the selected groups of a matrix, `[M, K]` -> `[M, n * size]`; the last group padded by zeros."""
    missing = count * size - values.shape[1]
    if missing:
        values = F.pad(values, (0, missing))
    if groups is None:
        return values
    return values.view(-1, count, size).index_select(1, groups).flatten(1)


def _digest(tensor: torch.Tensor, *shape: int) -> str:
    raw = tensor.detach().reshape(-1)
    raw = raw.contiguous().view(torch.uint8)
    step = max(1, raw.numel() // _SAMPLES) | 1  # odd, so that no column or byte position is favoured
    sample = raw[::step][:_SAMPLES].cpu().numpy().tobytes()
    return hashlib.blake2b(sample + repr((raw.numel(), *shape)).encode(), digest_size=4).hexdigest()
