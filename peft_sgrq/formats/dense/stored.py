"""Layers that are not quantized: `weight` in floating point, `[N, K]`, or `[K, N]` in models of Conv1D layers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.files.tensors import Change, Changes
from peft_sgrq.formats.dense.weight import apply_scales, digest_tensors
from peft_sgrq.formats.stored_weight import StoredWeight

_FLOAT = ("F64", "F32", "F16", "BF16")
# The model types of transformers whose linear layers are Conv1D.
_LINEAR = ("lm_head", "wte", "tokens_embed")  # their output head, and the embeddings it may be tied to
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")


class StoredDense(StoredWeight):
    """The case `S = 1`: the whole weight is written, its selected columns scaled and rounded to its dtype."""

    def __init__(self, folder: CheckpointFolder, prefix: str, group_size: int) -> None:
        super().__init__(folder, prefix)
        self.transposed = folder.config.get("model_type") in _CONV1D_MODELS and not prefix.endswith(_LINEAR)
        shape = folder.entry(self.key("weight")).shape
        self.out_features, self.in_features = shape[::-1] if self.transposed else shape
        self.group_size = min(group_size, self.in_features)
        self.name = f"dense-{self.group_size}"

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
        name = f"{prefix}.weight"
        if name not in folder:
            return None
        entry = folder.entry(name)
        return cls(folder, prefix, config.group_size) if entry.dtype in _FLOAT and len(entry.shape) == 2 else None

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
