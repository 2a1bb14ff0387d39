"""bitsandbytes 4-bit: `weight`, `weight.absmax`, `weight.quant_map`, `weight.quant_state.*`, and the nested level."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.tensors import Change, Changes
from peft_sgrq.formats.bnb_4bit.weight import Bnb4bitScales
from peft_sgrq.formats.stored_weight import StoredWeight

_STATE = "weight.quant_state.bitsandbytes__"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


class StoredBnb4bit(Bnb4bitScales, StoredWeight):
    """nf4 and fp4. Nested scales are un-nested, as the merge in memory does it: exactly, into float32."""

    needed = ("weight", "weight.absmax")

    def measure(self, config: SGRQConfig) -> bool:
        keys = [f"{_STATE}{kind}" for kind in ("nf4", "fp4") if self.has(f"{_STATE}{kind}")]
        if not keys:
            return False
        self._state_key = keys[0]
        self.out_features, self.in_features = (int(size) for size in self._state.shape)
        self.group_size = int(self._state.blocksize)
        self.name = f"bnb-{self._state.quant_type}-{self.group_size}"
        return True

    @cached_property
    def _state(self) -> Any:
        from bitsandbytes.functional import QuantState

        names = ["weight.absmax", "weight.quant_map", self._state_key, *_NESTED]
        stats = {name: self.tensor(name) for name in names if self.has(name)}
        return QuantState.from_dict(stats, device=torch.device("cpu"))

    @property
    def stored_codes(self) -> torch.Tensor:
        return self.tensor("weight")

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

    @staticmethod
    def adjust_config(config: dict[str, Any], names: Collection[str]) -> None:
        quantization = config.get("quantization_config") or {}
        nested = any(name.endswith(".weight.nested_absmax") for name in names)
        if not nested and quantization.get("bnb_4bit_use_double_quant"):
            quantization["bnb_4bit_use_double_quant"] = False
