"""GPTQ, AWQ and AutoRound: `qweight`, `qzeros`, `scales` `[groups, N]`, and `g_idx` where GPTQ writes it.

The group of a column is `g_idx[c]` in activation order and `c // g` otherwise; the scales are stored by group either
way, so the map does not matter for rewriting them. Loaders may hold scales in another half-precision dtype than the
file: the adapter's config says which one training rounded to (`scale_dtype`), and that is what is written.
"""

from __future__ import annotations

import torch

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.formats.int32_packed.weight import digest_tensors, format_name
from peft_sgrq.formats.scale_matrix import Geometry
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.formats.stored_weight import PlainScales, StoredWeight


class _PackedLayer(PlainScales):
    scale_name = "scales"
    code_name = "qweight"
    transposed = True

    def fingerprint_tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return digest_tensors(self.tensor("qweight"), self.tensor("scales"))

    def _measure(self, family: str, bits: int, columns: int) -> None:
        groups, rows = self.folder.entry(self.key("scales")).shape
        size = int(self.folder.quantization.get("group_size") or -1)
        if size < 1 or -(-columns // size) != groups:
            size = -(-columns // groups)
        size = min(size, columns)
        self._set_geometry(Geometry(format_name(family, bits, size), SelectableUnit.GROUP, rows, columns, size, 1))


class StoredGPTQ(_PackedLayer):
    """`qweight` int32 `[K * bits / 32, N]`: codes packed along the input. AutoRound's own packing is the same."""

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
        parts = [f"{prefix}.{name}" for name in ("qweight", "scales", "qzeros")]
        if not all(part in folder for part in parts) or _is_awq(folder):
            return None
        layer = cls(folder, prefix)
        layer.set_trained_dtype(config)
        words, rows = folder.entry(parts[0]).shape
        bits = folder.entry(parts[2]).shape[1] * 32 // rows
        indices = f"{prefix}.g_idx"
        columns = folder.entry(indices).shape[0] if indices in folder else words * 32 // bits
        is_autoround = folder.quantization.get("quant_method") == "auto-round"
        layer._measure("autoround" if is_autoround else "gptq", bits, columns)
        return layer


class StoredAWQ(_PackedLayer):
    """`qweight` int32 `[K, N * bits / 32]`: codes packed along the output (the GEMM version)."""

    @classmethod
    def find(cls, folder: CheckpointFolder, prefix: str, config: SGRQConfig) -> StoredWeight | None:
        parts = [f"{prefix}.{name}" for name in ("qweight", "scales")]
        if not all(part in folder for part in parts) or not _is_awq(folder):
            return None
        layer = cls(folder, prefix)
        layer.set_trained_dtype(config)
        columns, words = folder.entry(parts[0]).shape
        groups, rows = folder.entry(parts[1]).shape
        bits = words * 32 // rows
        if not 2 <= bits <= 8 or columns < groups:
            raise ValueError(
                f"its scales have shape {(groups, rows)} beside codes of {(columns, words)}, expected the GEMM "
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
