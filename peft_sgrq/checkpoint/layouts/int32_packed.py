"""GPTQ, AWQ and AutoRound: `qweight`, `qzeros`, `scales` `[K / g, N]`, and `g_idx` where GPTQ writes it.

The group of a column is `g_idx[c]` with act-order and `c // g` otherwise; the scales are stored by group either way,
so the map does not matter for rewriting them. Loaders hold scales as float16, whatever the file says, so float16 is
what they are rounded to in training and what is written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from peft_sgrq.backends.scales import Geometry
from peft_sgrq.checkpoint.folder import Change, Changes, CheckpointFolder
from peft_sgrq.checkpoint.layouts.base import PlainScales, StoredLayer


class _PackedLayer(PlainScales):
    scale_name = "scales"
    code_name = "qweight"
    transposed = True

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.float16

    def scales(self) -> torch.Tensor:
        return self.tensor("scales").to(torch.float16).float().t()

    def changes(self, scales: Callable[[], torch.Tensor]) -> Changes:
        shape = self.folder.entry(self.key("scales")).shape
        return {self.key("scales"): Change(torch.float16, shape, lambda: scales().to(torch.float16).t())}

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensor("qweight"), self.tensor("scales").to(torch.float16)

    def _measure(self, kind: str, bits: int, columns: int) -> None:
        groups, rows = self.folder.entry(self.key("scales")).shape
        size = int(self.folder.quantization.get("group_size") or -1)
        if size < 1 or -(-columns // size) != groups:
            size = -(-columns // groups)
        self._set_geometry(Geometry(f"{kind}-int{bits}-{size}", "group", rows, columns, size, 1))


class GptqLayer(_PackedLayer):
    """`qweight` int32 `[K * bits / 32, N]`: codes packed along the inputs. AutoRound's own packing is the same."""

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, group_size: int) -> StoredLayer | None:
        parts = [f"{prefix}.{name}" for name in ("qweight", "scales", "qzeros")]
        if not all(part in folder for part in parts) or _is_awq(folder):
            return None
        layer = cls(folder, prefix)
        packed, rows = folder.entry(parts[0]).shape
        bits = folder.entry(parts[2]).shape[1] * 32 // rows
        indices = f"{prefix}.g_idx"
        columns = folder.entry(indices).shape[0] if indices in folder else packed * 32 // bits
        layer._measure("gptq", bits, columns)
        return layer


class AwqLayer(_PackedLayer):
    """`qweight` int32 `[K, N * bits / 32]`: codes packed along the outputs (the GEMM version)."""

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, group_size: int) -> StoredLayer | None:
        parts = [f"{prefix}.{name}" for name in ("qweight", "scales")]
        if not all(part in folder for part in parts) or not _is_awq(folder):
            return None
        layer = cls(folder, prefix)
        columns, packed = folder.entry(parts[0]).shape
        groups, rows = folder.entry(parts[1]).shape
        bits = packed * 32 // rows
        if bits < 2 or columns < groups:
            raise ValueError(
                f"its scales have shape {(groups, rows)} beside codes of {(columns, packed)}, expected the GEMM "
                "version of AWQ, [in_features / group_size, out_features]; merge in memory instead"
            )
        layer._measure("awq", bits, columns)
        return layer


def _is_awq(folder: CheckpointFolder) -> bool:
    quantization = folder.quantization
    if quantization.get("quant_method") == "awq":
        return True
    packing = str(quantization.get("packing_format") or quantization.get("backend") or "")
    return quantization.get("quant_method") == "auto-round" and "awq" in packing
