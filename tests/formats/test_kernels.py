"""The reductions of the backward pass: compiled, and as Triton kernels in Triton's interpreter, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from types import ModuleType

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import relative_error
from support.single_layers import linear_4bit

from peft_sgrq.formats import kernels
from peft_sgrq.formats.bnb_4bit.weight import Bnb4bitWeight
from peft_sgrq.formats.kernels import cpu
from peft_sgrq.formats.kernels.plain import multiply_and_sum

quick = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
sizes = st.integers(1, 9)


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The module of the Triton kernels; conftest.py has them run in the interpreter, so on the CPU."""
    pytest.importorskip("triton")
    from peft_sgrq.formats.kernels import gpu

    return gpu


def exact(product: torch.Tensor, codes: torch.Tensor, size: int) -> torch.Tensor:
    return (product.double() * codes.double()).view(product.shape[0], -1, size).sum(-1)


@quick
@given(rows=sizes, selected=sizes, size=st.sampled_from([1, 3, 32, 64, 100, 128]), dtype=st.sampled_from(DTYPES))
def test_the_reduction_kernel_equals_the_reference(gpu, rows, selected, size, dtype):
    torch.manual_seed(0)
    product, codes = (torch.randn(rows, selected * size).to(dtype) for _ in range(2))
    found = gpu.group_reduce(product, codes, size)
    assert found.dtype == torch.float32
    assert relative_error(found, exact(product, codes, size)) < 1e-5


@pytest.mark.slow
@quick
@given(
    rows=st.integers(1, 70),
    chosen=st.sets(st.integers(0, 4), min_size=1),
    all_groups=st.booleans(),
    size=st.sampled_from([32, 64, 128, 256, 4096]),
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from(DTYPES),
)
def test_the_4bit_kernel_decodes_as_bitsandbytes_does(gpu, rows, chosen, all_groups, size, kind, dtype):
    rows = min(rows, 3) if size == 4096 else rows
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (rows, 5, size // 2), dtype=torch.uint8)
    groups = None if all_groups else torch.tensor(sorted(chosen))
    taken = packed if groups is None else packed[:, groups]
    product = torch.randn(rows, taken.shape[1] * size).to(dtype)
    ones = torch.ones(rows * taken.shape[1])
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles for large blocks
        codes = torch.ops.bitsandbytes.dequantize_4bit.default(
            taken.reshape(-1, 1), ones, size, kind, product.shape, torch.float32
        )
    table = bnb.functional.get_4bit_type(kind, device="cpu")
    found = gpu.group_reduce_4bit(product, packed, groups, table)
    assert relative_error(found, exact(product, codes, size)) < 1e-5


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_4bit_layer_gives_the_kernel_what_it_needs(gpu, monkeypatch, nested):
    # As on a GPU: the layer takes the kernel that decodes; the interpreter runs it on the CPU.
    scaled_weight = Bnb4bitWeight(linear_4bit(24, 320, nested=nested))
    groups, rows = torch.tensor([0, 3]), slice(5, 19)
    product = torch.randn(14, 128)
    expected = scaled_weight.reduce(product, groups, rows)
    monkeypatch.setattr("peft_sgrq.formats.bnb_4bit.weight.decodes_4bit", lambda product: True)
    monkeypatch.setattr(kernels, "_gpu", lambda: gpu)
    calls = []
    monkeypatch.setattr(
        gpu, "group_reduce_4bit", lambda *args, call=gpu.group_reduce_4bit: calls.append(1) or call(*args)
    )
    found = scaled_weight.reduce(product, groups, rows)
    assert calls and relative_error(found, expected.double()) < 1e-5


def test_an_empty_reduction_is_empty(gpu):
    assert gpu.group_reduce(torch.randn(0, 64), torch.randn(0, 64), 32).shape == (0, 2)
    packed = torch.zeros(0, 3, 32, dtype=torch.uint8)
    assert gpu.group_reduce_4bit(torch.randn(0, 192), packed, None, torch.zeros(16)).shape == (0, 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, 64, 100])
def test_the_compiled_reduction_equals_the_reference(dtype, size):
    if cpu.compiled_reduce() is None:
        pytest.skip("no C++ compiler here")
    product, codes = (torch.randn(33, 7 * size).to(dtype) for _ in range(2))
    found = cpu.group_reduce(product, codes, size)
    assert found.dtype == torch.float32
    assert relative_error(found, exact(product, codes, size)) < 1e-5


def test_large_reductions_are_compiled_and_small_ones_are_not(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "group_reduce", lambda *args: calls.append(args[0].shape) or multiply_and_sum(*args))
    small, large = torch.ones(4, 64), torch.ones(1024, 1024)
    assert torch.equal(kernels.group_reduce(small, small, 64), torch.full((4, 1), 64.0))
    assert not calls
    assert torch.equal(kernels.group_reduce(large, large, 64), torch.full((1024, 16), 64.0))
    assert calls == [large.shape]


def test_the_environment_can_say_not_to_compile(monkeypatch):
    monkeypatch.setenv("PEFT_SGRQ_COMPILE", "0")
    cpu.compiled_reduce.cache_clear()
    try:
        assert cpu.compiled_reduce() is None
    finally:
        cpu.compiled_reduce.cache_clear()


@pytest.mark.slow
def test_without_a_compiler_plain_torch_computes_the_same(tmp_path):
    program = (
        "import torch\n"
        "from peft_sgrq.formats.kernels import cpu\n"
        "assert cpu.compiled_reduce() is None\n"
        "ones = torch.ones(3, 128)\n"
        "assert torch.equal(cpu.group_reduce(ones, ones, 64), torch.full((3, 2), 64.0))\n"
    )
    fresh = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "/nonexistent/compiler"}
    subprocess.run([sys.executable, "-c", program], check=True, env=fresh)
