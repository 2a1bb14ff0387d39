"""ggml's own C code, which the wheel xllamacpp brings: what our numerics are held against."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from peft_sgrq.formats.gguf.blocks import TYPES, BlockType


@functools.cache
def library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        pytest.skip("xllamacpp is not installed")
    (file,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    found = ctypes.CDLL(str(file))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return found


def quantize(kind: BlockType, weight: np.ndarray) -> np.ndarray:
    """A float32 matrix `[N, K]` quantized by ggml, uint8 `[N, bytes of a row]`."""
    rows, columns = weight.shape
    weight = np.ascontiguousarray(weight, np.float32)
    packed = np.zeros((rows, kind.row_bytes(columns)), np.uint8)
    importance = np.ones(columns, np.float32)  # some types insist on one
    written = library().ggml_quantize_chunk(
        kind.id, weight.ctypes.data, packed.ctypes.data, 0, rows, columns, importance.ctypes.data
    )
    assert written == packed.nbytes
    return packed


def dequantize(kind: BlockType, packed: np.ndarray) -> np.ndarray:
    """A packed matrix as ggml's C code makes it, float32 `[N, K]`."""
    rows = packed.shape[0]
    columns = packed.shape[1] // kind.nbytes * kind.size
    packed, weight = np.ascontiguousarray(packed), np.empty((rows, columns), np.float32)
    function = getattr(library(), f"dequantize_row_{kind.name.lower().replace('_k', '_K')}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(packed.ctypes.data, weight.ctypes.data, weight.size)
    return weight


def random_blocks(kind: BlockType, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random bytes as a matrix: every code, scales of both signs, some zero and some subnormal, none infinite."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows * columns // kind.size, kind.nbytes), dtype=np.uint8)
    for at in (kind.scale_at, kind.offset_at):
        if at is not None:
            halves = (random.standard_normal(len(blocks)) * 10.0 ** random.integers(-7, 1, len(blocks))).astype("<f2")
            halves[random.random(len(blocks)) < 0.05] = 0
            halves[0] = 0
            blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def some_blocks(kind: BlockType, weight: np.ndarray, seed: int = 0) -> np.ndarray:
    """A matrix quantized by ggml; or random codes of about its size in types for which ggml searches for seconds."""
    if not searches(kind):
        return quantize(kind, weight)
    packed = random_blocks(kind, *weight.shape, seed)
    halves = np.random.default_rng(seed).uniform(0.5, 1, weight.size // kind.size) * weight.std() / 16
    packed.reshape(-1, kind.nbytes)[:, :2] = halves.astype("<f2").view(np.uint8).reshape(-1, 2)
    return packed


def searches(kind: BlockType) -> bool:
    """Whether ggml searches grids to quantize to a type, which takes seconds."""
    return kind.name.startswith(("IQ1", "IQ2", "IQ3"))


ALL_TYPES = pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)
