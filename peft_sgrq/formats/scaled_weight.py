"""What a weight format must offer to have its scales tuned."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from peft_sgrq.formats.kernels import group_reduce
from peft_sgrq.formats.own_forward import forward_obstacle
from peft_sgrq.formats.scale_arithmetic import gather_groups, inverse_or_zero
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.formats.stored_scales import StoredScales


class WeightAndCodes(NamedTuple):
    """Some columns of a weight, of whole groups, from which the codes follow: `C = W' / S' - shift`.

    Attributes:
        weight (`torch.Tensor`): `W'`, `[N, k]`.
        inverse (`torch.Tensor`): `1 / S'`, float32 `[N, groups]`; zero where a scale is.
        shift (`torch.Tensor` or `None`): float32 `[N, m]`, one number for each of the equal parts of a row.
    """

    weight: torch.Tensor
    inverse: torch.Tensor
    shift: torch.Tensor | None


class ScaledWeight(StoredScales):
    """One linear layer seen as codes and scales: `W[o, c] = C[o, c] * S[r(o), k(c)]`.

    No method but `write_scales`, `restore_scales` and `split` changes its weight.

    Attributes:
        layer_class (`tuple[str, str]`): Where the class of its layers is and its name, if it has but one.
        quantized (`bool`): Whether the format is one of quantized weights.
        in_parts (`bool`): Whether rows of the codes and columns of the weight can be made without making all of them.
        codes_follow (`bool`): Whether there is `weight_and_codes`, so that a backward pass dequantizes once.
        smallest_served (`int`): The smallest group size that a server takes.
        saved_by (`str` or `None`): What saves a model of this format, where `save_pretrained` does not.
        splittable (`bool`): Whether `split` can give the layer smaller groups.
    """

    layer_class: ClassVar[tuple[str, str]]
    quantized: ClassVar[bool] = True
    in_parts: ClassVar[bool] = False
    codes_follow: ClassVar[bool] = False
    saved_by: str | None = None
    smallest_served: int = 1
    splittable: bool = False

    @classmethod
    def of(cls, module: nn.Module, group_size: int) -> ScaledWeight:
        """The scaled weight of a layer that `matches`; `group_size` is that of layers which have none of their own."""
        return cls(module)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether a module is a layer of this format. Imports nothing: a library not imported has no layers."""
        home, name = cls.layer_class
        return home in sys.modules and isinstance(module, getattr(sys.modules[home], name))

    @classmethod
    def known_class(cls, module: nn.Module) -> type[nn.Module]:
        """The class whose forward pass `linear` stands for, of a module that matches."""
        home, name = cls.layer_class
        return getattr(sys.modules[home], name)

    @classmethod
    def is_trainable(cls, module: nn.Module) -> bool:
        """Whether a layer of this format runs on a kernel that scales can be trained through."""
        return True

    def select_columns(self, x: torch.Tensor, units: torch.Tensor | None) -> torch.Tensor:
        """Columns of the selected groups, `[..., K]` -> `[T, n * group_size]`; a partial group is padded by zeros."""
        x = x.reshape(-1, x.shape[-1])  # (T, K)
        return gather_groups(x, units, self.scales_shape[1], self.group_size)

    def select_codes(self, codes: torch.Tensor, units: torch.Tensor | None) -> torch.Tensor:
        """The codes of the selected units: columns of groups, `[N, n * g]`, or rows, `[n, K]`."""
        if self.unit is SelectableUnit.ROW:
            return codes if units is None else codes.index_select(0, units)
        return gather_groups(codes, units, self.scales_shape[1], self.group_size)

    def sum_by_scale(self, elements: torch.Tensor) -> torch.Tensor:
        """Values of each weight, `[N, K]`, summed over the weights that each scale multiplies, `[rows, groups]`."""
        if self.unit is SelectableUnit.ROW:
            return elements.sum(1, keepdim=True)
        return self.reduce_rows(self.sum_groups(elements))

    def sum_groups(self, elements: torch.Tensor) -> torch.Tensor:
        """Values of each weight, `[M, K]`, summed over the columns of each group, `[M, groups]`."""
        return self.select_columns(elements, None).view(elements.shape[0], -1, self.group_size).sum(2)

    def spread_to_lines(self, values: torch.Tensor) -> torch.Tensor:
        """Shares out a value of each unit, `[selectable]`, to its lines in equal parts."""
        if self.unit is SelectableUnit.ROW:
            return values
        groups = self.group_of_columns().to(values.device)
        return (values / groups.bincount(minlength=len(values)))[groups]

    def group_of_columns(self) -> torch.Tensor:
        """The group of each column, int64 `[K]`."""
        columns = torch.arange(1, self.in_features + 1, dtype=torch.float64, device=self.device)
        slots = self.select_columns(columns.unsqueeze(0), None).flatten().long()  # column + 1, or 0 for padding
        filled = slots.nonzero().flatten()
        groups = torch.empty(self.in_features, dtype=torch.int64, device=self.device)
        groups[slots[filled] - 1] = filled // self.group_size
        return groups

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Sums the input over the columns of each group, `[..., K]` -> float32 `[T, groups]`."""
        columns = self.select_columns(self.computed_input(x), None)  # (T, G * g)
        if columns.device.type == "cpu" and columns.dtype != torch.float32:
            # A product sums in float32, too, and needs no copy in float32; its users round it to this dtype anyway.
            ones = columns.new_ones(self.group_size, 1)
            return (columns.reshape(-1, self.group_size) @ ones).view(len(columns), -1)
        return columns.unflatten(1, (-1, self.group_size)).sum(-1, dtype=torch.float32)

    def reduce_rows(self, sums: torch.Tensor) -> torch.Tensor:
        """Adds up the rows that share a scale, `[N, n]` -> `[rows, n]`; the sums themselves where none do.

        The map `r(o)` of the format, as far as gradients need it.
        """
        if self.rows_per_scale == 1:
            return sums
        rows = self.scales_shape[0]
        padded = F.pad(sums, (0, 0, 0, rows * self.rows_per_scale - sums.shape[0]))
        return padded.view(rows, self.rows_per_scale, -1).sum(1)

    def computed_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input the product is made with: a format that quantizes activations rounds it, others leave it alone."""
        return x

    def read_once(self) -> ScaledWeight:
        """The same for a few uses, between which nothing writes to it: it may keep what it reads, and is dropped."""
        return self

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Why a layer of this format does not compute as its class does, as a clause; `None` if it does."""
        return forward_obstacle(module, cls.known_class(module))

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the layer, `[out_features]`, or `None`."""
        return self.module.bias  # type: ignore[return-value]

    # A format has one of each of these two pairs: the parts, where it decodes no others, or the whole.

    def codes(self, units: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Unit-scale values `C` at the columns of the selected groups, `[N, n * group_size]`."""
        return self.codes_of_rows(units, dtype, slice(0, self.out_features))

    def dequantize(self, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight `C * S` for given `scales` (float32 `[rows, groups]`), `[N, K]`."""
        return self.dequantize_columns(scales, dtype, slice(0, self.in_features))

    def codes_of_rows(self, units: torch.Tensor | None, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        """Some rows of what `codes` returns."""
        return self.codes(units, dtype)[rows]

    def dequantize_columns(self, scales: torch.Tensor, dtype: torch.dtype, columns: slice) -> torch.Tensor:
        """Some columns of what `dequantize` returns, of whole groups."""
        return self.dequantize(scales, dtype)[:, columns]

    @property
    def columns_at_once(self) -> int:
        """How many columns are decoded together: parts of a weight are multiples of it."""
        return self.unit.columns(self.group_size)

    def columns_in_effect(
        self, scales: torch.Tensor, prepared: torch.Tensor | None, dtype: torch.dtype, columns: slice
    ) -> torch.Tensor:
        """What `dequantize_columns` returns, by what `prepare` made of the scales if that was kept."""
        return self.dequantize_columns(scales, dtype, columns)

    def weight_and_codes(
        self, scales: torch.Tensor, prepared: torch.Tensor | None, dtype: torch.dtype, columns: slice
    ) -> WeightAndCodes:
        """What `columns_in_effect` returns, and how codes follow from it; only where `codes_follow` says so."""
        own = scales[:, columns.start // self.group_size : columns.stop // self.group_size]
        return WeightAndCodes(self.columns_in_effect(scales, prepared, dtype, columns), inverse_or_zero(own), None)

    def reduce(self, product: torch.Tensor, units: torch.Tensor | None, rows: slice) -> torch.Tensor:
        """Sums `product * C` over the columns of each scale: from a gradient of weights to one of scales.

        Args:
            product (`torch.Tensor`): `dy^T x` at `rows` and at the columns of the selected groups,
                `[N, n * group_size]`.
            units (`torch.Tensor` or `None`): The selected groups, int64 `[n]`; `None` for all.
            rows (`slice`): Which rows of the weight these are, both ends given.

        Returns:
            `torch.Tensor`: float32 `[N, n]`.
        """
        return group_reduce(product, self.codes_of_rows(units, product.dtype, rows), self.group_size)

    @property
    def keeps_prepared(self) -> bool:
        """Whether what `prepare` made is kept for the backward pass, where making it anew would take long."""
        return False

    def prepared_scales(self, prepared: torch.Tensor) -> torch.Tensor:
        """The scales `[rows, groups]` in what `prepare` made; only where `keeps_prepared` says so."""
        raise ValueError(f"The format {self.name} keeps no prepared scales, expected one that does; check that first.")

    @property
    def rounds_input(self) -> bool:
        """Whether `cast_input` does more than change the dtype, so that layers with one input compute with several."""
        return False

    @property
    def drops_input_gradient(self) -> bool:
        """Whether the module's own forward pass, without an adapter, loses the gradient of its input."""
        return False

    @property
    def is_trained(self) -> bool:
        """Whether the weight itself is trained beside its scales; `prepare` and `linear` are differentiable then."""
        return False

    def check_input(self, x: torch.Tensor) -> None:
        """Raises a ValueError if the module's own forward pass would make nothing but noise of an input."""

    @property
    def writes_to_input(self) -> bool:
        """Whether the kernel of `linear` writes to its input, even if it puts back what was there."""
        return False

    @abstractmethod
    def linear(self, x: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """The layer's forward pass by the format's own kernel with other scales; no autograd.

        Args:
            x (`torch.Tensor`): `[..., K]`, as `cast_input` returns it.
            prepared (`torch.Tensor`): What `prepare` made of the scales.
        """

    def bind(self, prepared: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The whole forward pass, casts included, as one function of the input; decoding calls it for each token.

        Args:
            prepared (`torch.Tensor`): What `prepare` made of the scales.
        """
        return lambda x: self.cast_output(self.linear(self.cast_input(x), prepared), x)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        """The cast the format's forward pass begins with."""
        return x

    def cast_output(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The cast the format's forward pass ends with; `x` is the input before `cast_input`."""
        return y

    def split_obstacle(self, group_size: int) -> str | None:
        """Why a splittable layer cannot have groups of a size that divides its own, as a clause; `None` if it can."""
        return None

    def split(self, group_size: int) -> None:
        """Gives the layer smaller groups, each with the scales and zero points of the one it is a part of.

        The codes stay. Afterwards this scaled weight is out of date, and the layer is to be resolved anew.

        Args:
            group_size (`int`): Columns per scale, a divisor of what it has that `split_obstacle` has nothing against.
        """
        raise ValueError(f"The format {self.name} cannot be split, expected a `splittable` one; check that first.")

    @abstractmethod
    def quantization(self) -> dict[str, Any] | None:
        """How a base of this format is loaded: `quant_method` and other fields of its config; `None` if dense."""
