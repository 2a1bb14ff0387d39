"""GPTQ, AWQ and AutoRound: `qweight`, `qzeros`, `scales` `[groups, N]`, and `g_idx` where GPTQ writes it.

The group of a column is `g_idx[c]` in activation order and `c // g` otherwise; the scales are stored by group either
way, so the map does not matter for rewriting them. Loaders may hold scales in another half-precision dtype than the
file: the adapter's config says which one training rounded to (`scale_dtype`), and that is what is written.
"""

from __future__ import annotations

from typing import ClassVar

from peft_sgrq.config import SGRQConfig
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.formats.int32_packed.weight import DIGEST_DTYPE, format_name
from peft_sgrq.formats.scale_matrix import Geometry
from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.formats.stored_weight import PlainScales


class _PackedLayer(PlainScales):
    scale_name = "scales"
    code_name = "qweight"
    transposed = True
    needed: ClassVar[tuple[str, ...]] = ("qweight", "scales")
    digest_dtype = DIGEST_DTYPE

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.folder.entry(self.key(name)).shape

    def _set(self, config: SGRQConfig, family: str, bits: int, columns: int) -> bool:
        self.set_trained_dtype(config)
        groups, rows = self._shape("scales")
        size = int(self.folder.quantization.get("group_size") or -1)
        if size < 1 or -(-columns // size) != groups:
            size = -(-columns // groups)
        size = min(size, columns)
        self._set_geometry(Geometry(format_name(family, bits, size), SelectableUnit.GROUP, rows, columns, size, 1))
        return True


class StoredGPTQ(_PackedLayer):
    """`qweight` int32 `[K * bits / 32, N]`: codes packed along the input. AutoRound's own packing is the same."""

    needed = ("qweight", "scales", "qzeros")

    def measure(self, config: SGRQConfig) -> bool:
        if _is_awq(self.folder):
            return False
        words, rows = self._shape("qweight")
        bits = self._shape("qzeros")[1] * 32 // rows
        columns = self._shape("g_idx")[0] if self.has("g_idx") else words * 32 // bits
        is_autoround = self.folder.quantization.get("quant_method") == "auto-round"
        return self._set(config, "autoround" if is_autoround else "gptq", bits, columns)


class StoredAWQ(_PackedLayer):
    """`qweight` int32 `[K, N * bits / 32]`: codes packed along the output (the GEMM version)."""

    def measure(self, config: SGRQConfig) -> bool:
        if not _is_awq(self.folder):
            return False
        columns, words = self._shape("qweight")
        groups, rows = self._shape("scales")
        bits = words * 32 // rows
        if not 2 <= bits <= 8 or columns < groups:
            raise ValueError(
                f"its scales have shape {(groups, rows)} beside codes of {(columns, words)}, expected the GEMM "
                "version of AWQ, [in_features / group_size, out_features]; merge in memory instead"
            )
        return self._set(config, "awq", bits, columns)


def _is_awq(folder: CheckpointFolder) -> bool:
    quantization = folder.quantization
    if quantization.get("quant_method") == "awq":
        return True
    packing = str(quantization.get("packing_format") or quantization.get("backend") or "")
    return quantization.get("quant_method") == "auto-round" and "awq" in packing
