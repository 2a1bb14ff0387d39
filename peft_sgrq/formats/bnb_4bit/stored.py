"""bitsandbytes 4-bit: `weight`, `weight.absmax`, `weight.quant_map`, `weight.quant_state.*`, and the nested level."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.files.tensors import Change, Changes
from peft_sgrq.formats.bnb_4bit.weight import absmax_of, digest_tensors
from peft_sgrq.formats.stored_weight import StoredWeight

_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


class StoredBnb4bit(StoredWeight):
    """nf4 and fp4. Nested scales are un-nested, as the merge in memory does it: exactly, into float32."""

    def __init__(self, folder: CheckpointFolder, prefix: str, kind: str) -> None:
        super().__init__(folder, prefix)
        self._state_key = f"{_STATE}{kind}"
        self.out_features, self.in_features = (int(size) for size in self._state.shape)
        self.group_size = int(self._state.blocksize)
        self.name = f"bnb-{kind}-{self.group_size}"

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
        for kind in ("nf4", "fp4"):
            if f"{prefix}.{_STATE}{kind}" in folder:
                return cls(folder, prefix, kind)
        return None

    @cached_property
    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        names = ["weight.absmax", "weight.quant_map", self._state_key, *_NESTED]
        stats = {name: self.tensor(name) for name in names if self.key(name) in self.folder}
        return QuantState.from_dict(stats, device=torch.device("cpu"))

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def is_nested(self) -> bool | None:
        return bool(self._state.nested)

    def scales(self) -> torch.Tensor:
        return absmax_of(self._state).view(self.scales_shape)

    def changes(self, scales: Callable[[], torch.Tensor]) -> Changes:
        count = self.scales_shape[0] * self.scales_shape[1]
        changes: Changes = {
            self.key("weight.absmax"): Change(torch.float32, (count,), lambda: scales().reshape(-1)),
        }
        if self._state.nested:
            changes |= dict.fromkeys(map(self.key, _NESTED))
            packed = self._unnested_state()
            changes[self.key(self._state_key)] = Change(packed.dtype, tuple(packed.shape), lambda: packed)
        return changes

    def _unnested_state(self) -> torch.Tensor:
        from bitsandbytes.functional import QuantState

        state = self._state
        plain = QuantState(
            absmax=torch.empty(0),
            shape=state.shape,
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        return plain.as_dict(packed=True)[f"quant_state.bitsandbytes__{state.quant_type}"]

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return digest_tensors(self.tensor("weight"), self._state)

    @staticmethod
    def adjust_config(config: dict[str, Any], names: Collection[str]) -> None:
        quantization = config.get("quantization_config") or {}
        nested = any(name.endswith(".weight.nested_absmax") for name in names)
        if not nested and quantization.get("bnb_4bit_use_double_quant"):
            quantization["bnb_4bit_use_double_quant"] = False
