"""Layers that are not quantized: `weight` in floating point, `[N, K]`, or `[K, N]` in models of Conv1D layers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.tensors import Change, Changes
from peft_sgrq.formats.dense.weight import apply_scales, digest_tensors
from peft_sgrq.formats.stored_weight import StoredWeight

_FLOAT = ("F64", "F32", "F16", "BF16")
# The model types of transformers whose linear layers are Conv1D.
_LINEAR = ("lm_head", "wte", "tokens_embed")  # their output head, and the embeddings it may be tied to
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


class StoredDense(StoredWeight):
    """The case `S = 1`: the whole weight is written, its selected columns scaled and rounded to its dtype."""

    needed = ("weight",)

    def measure(self, config: SGRQConfig) -> bool:
        dtype, shape, *_ = self.folder.entry(self.key("weight"))
        if dtype not in _FLOAT or len(shape) != 2:
            return False
        of_conv1d = self.folder.config.get("model_type") in _CONV1D_MODELS
        self.transposed = of_conv1d and not self.prefix.endswith(_LINEAR)
        self.out_features, self.in_features = reversed(shape) if self.transposed else shape
        self.group_size = min(config.group_size, self.in_features)
        self.name = f"dense-{self.group_size}"
        return True

    @property
    def storage_dtype(self) -> torch.dtype:
        return self.tensor("weight").dtype

    def round_to_storage(self, scales: torch.Tensor) -> torch.Tensor:
        return scales  # the weight is what is stored; it is rounded when it is made

    def scales(self) -> torch.Tensor:
        return torch.ones(self.scales_shape)

    def changes(self, scales: Callable[[], torch.Tensor]) -> Changes:
        weight = self.tensor("weight")

        def make() -> torch.Tensor:
            scaled = apply_scales(weight.t() if self.transposed else weight, scales(), self.group_size)
            return scaled.t() if self.transposed else scaled

        return {self.key("weight"): Change(weight.dtype, tuple(weight.shape), make)}

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return digest_tensors(self.tensor("weight"))
