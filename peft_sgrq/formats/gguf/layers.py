"""Modules whose weights stay packed as a GGUF file has them: linear layers, embeddings and tied output heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peft_sgrq.formats.gguf.block_scales import BlockScales, Factors
from peft_sgrq.formats.gguf.blocks import TYPES, BlockType
from peft_sgrq.formats.gguf.dense_weights import DenseWeight
from peft_sgrq.formats.gguf.product import product, transposed_product
from peft_sgrq.formats.gguf.sub_block_scales import scales_of


class Source(NamedTuple):
    """Where a packed weight comes from.

    Attributes:
        file (`str`): The path of the file.
        tensor (`str`): The name of its tensor.
        rows (`torch.Tensor` or `None`): Which row of the tensor each row of the weight is, int64 `[N]`; `None` if they
            are in the same order.
    """

    file: str
    tensor: str
    rows: torch.Tensor | None = None


class _Packed(nn.Module):
    """A matrix `[N, K]` in blocks.

    Attributes:
        stored_name (`str`): The name of the parameter that holds them.
        ggml_type (`int`): The type of the blocks.
        source (`Source` or `None`): Where the matrix comes from.
    """

    stored_name: ClassVar[str] = "weight"

    def __init__(
        self, rows: int, columns: int, ggml_type: int, source: Source | None, device: torch.device | str | None
    ) -> None:
        super().__init__()
        self.ggml_type = ggml_type
        self.source = source
        shape = rows, self.kind.row_bytes(columns)
        self.packed = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)

    @property
    def kind(self) -> BlockType:
        """The type of the blocks."""
        return TYPES[self.ggml_type]

    @property
    def packed(self) -> nn.Parameter:
        """The blocks, uint8 `[N, bytes of a row]`, frozen."""
        return self._parameters[self.stored_name]  # type: ignore[return-value]

    @packed.setter
    def packed(self, blocks: nn.Parameter) -> None:
        self._parameters[self.stored_name] = blocks

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "packed":  # a property, which modules do not look for when a parameter is set
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def held(self) -> tuple[BlockScales, Factors]:
        """The blocks, and the factors they are stored with."""
        return _as_stored(self.kind, self.packed)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix as numbers, `[N, K]`."""
        return dequantized(self.kind, self.packed, dtype)


class _OfModelsDtype(nn.Module):
    """A module without an input whose dtype it could take.

    Attributes:
        dtype (`torch.dtype`): Of what it makes: that of the model, which a cast changes, as it does a parameter's.
    """

    dtype: torch.dtype

    def follow(self, dtype: torch.dtype) -> None:
        """Takes on a dtype."""
        self.dtype = dtype

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _OfModelsDtype:
        super()._apply(fn, recurse)
        self.follow(fn(torch.empty(0, dtype=self.dtype)).dtype)
        return self


def dequantized(kind: BlockType, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A packed matrix as numbers, `[N, K]`."""
    held, factors = _as_stored(kind, packed)
    return held.weight(factors, dtype)


def _as_stored(kind: BlockType, packed: torch.Tensor) -> tuple[BlockScales, Factors]:
    held = BlockScales(kind, packed.detach())
    return held, held.factors(held.scales(), held.offsets())


class _PackedProduct(torch.autograd.Function):
    """`x W^T + b` that keeps no dequantized weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _Packed, bias: torch.Tensor | None) -> torch.Tensor:
        # The tensor and not the layer, whose own is on the meta device by then where accelerate offloads it.
        ctx.kind, ctx.packed = layer.kind, layer.packed
        return product(x, *layer.held(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        dy = grads[0]
        dx = transposed_product(dy, *_as_stored(ctx.kind, ctx.packed)) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db


def _product(x: torch.Tensor, layer: _Packed, bias: torch.Tensor | None, dense: DenseWeight) -> torch.Tensor:
    if layer.packed.is_meta and not x.is_meta:
        raise ValueError(
            f"{layer} has no values on the meta device, expected them beside the input; if accelerate offloads it and "
            "the output head is tied to it, load the model with a device_map that keeps it on a device."
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if dense.kept and not torch.is_grad_enabled():
        weight = dense.get([layer.packed], x.dtype, lambda: layer.dequantize(x.dtype))
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return _PackedProduct.apply(x, layer, None if bias is None else bias.to(x.dtype))


class GGUFLinear(_Packed):
    """A linear layer whose weight stays packed.

    Args:
        in_features, out_features (`int`): The shape of the weight, `[out_features, in_features]`.
        ggml_type (`int`): The type of its blocks.
        bias (`nn.Parameter` or `None`): The bias.
        sub_blocks (`bool`): Whether the sub-blocks of K-quants have scales of their own to train.
        source (`Source` or `None`): Where the weight comes from.
        device (`torch.device`, `str` or `None`): Where the empty weight is made.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ggml_type: int,
        *,
        bias: nn.Parameter | None = None,
        sub_blocks: bool = True,
        source: Source | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(out_features, in_features, ggml_type, source, device)
        self.in_features, self.out_features = in_features, out_features
        self.sub_blocks = sub_blocks
        self.bias = bias
        self.dense = DenseWeight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self, self.bias, self.dense)

    def scales(self) -> BlockScales:
        """The scales of the weight, as they are trained."""
        return scales_of(self.kind, self.packed.detach(), self.sub_blocks)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.kind.name}"


class GGUFHead(_OfModelsDtype, GGUFLinear):
    """An output head whose weight stays packed. Trainers multiply by `weight` themselves, so that is made of it.

    Args:
        dtype (`torch.dtype`): Of `weight`; the other arguments are those of `GGUFLinear`.
    """

    stored_name: ClassVar[str] = "blocks"

    def __init__(self, *args: Any, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.follow(dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The weight dequantized, `[N, K]`, anew each time."""
        return self.dequantize(self.dtype)


class GGUFTiedHead(nn.Module):
    """An output head whose weight is that of the packed input embedding: its scales are not its own, and not tuned.

    Args:
        embedding (`GGUFEmbedding`): The input embedding.
        bias (`nn.Parameter` or `None`): The bias.
    """

    def __init__(self, embedding: GGUFEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self._embedding = (embedding,)  # in a tuple, lest it is registered
        self.bias = bias
        self.dense = DenseWeight()

    @property
    def weight(self) -> torch.Tensor:
        """The weight dequantized, `[N, K]`, anew each time."""
        return self._embedding[0].dequantize(self._embedding[0].dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":  # it is tied already; transformers ties by setting it
            super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self._embedding[0], self.bias, self.dense)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._embedding[0].kind.name}"


class GGUFEmbedding(_OfModelsDtype, _Packed):
    """An embedding that unpacks the rows it is asked for.

    Args:
        num_embeddings, embedding_dim (`int`): The shape of the weight.
        ggml_type (`int`): The type of its blocks.
        dtype (`torch.dtype`): Of what it returns.
        padding_idx (`int` or `None`): As in `nn.Embedding`, for those who look at it.
        embed_scale (`float` or `None`): What the rows are multiplied by, as Gemma's are.
        source (`Source` or `None`): Where the weight comes from.
        device (`torch.device`, `str` or `None`): Where the empty weight is made.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        ggml_type: int,
        *,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        embed_scale: float | None = None,
        source: Source | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, ggml_type, source, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self._scale = embed_scale
        self.follow(dtype)

    def follow(self, dtype: torch.dtype) -> None:
        super().follow(dtype)
        # Rounded as a tensor of the model's dtype is, which it stands for.
        self.embed_scale = None if self._scale is None else _rounded(self._scale, dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.packed.detach().index_select(0, ids.reshape(-1))
        found = dequantized(self.kind, rows, self.dtype).view(*ids.shape, self.embedding_dim)
        return found if self.embed_scale is None else found * self.embed_scale

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.kind.name}"


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=torch.float32, device="cpu").to(dtype).item()
