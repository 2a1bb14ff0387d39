"""The reduction of the backward pass, compiled, against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from support.oracle import relative_error

from peft_sgrq.formats import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def exact(product: torch.Tensor, codes: torch.Tensor, size: int) -> torch.Tensor:
    return (product.double() * codes.double()).view(product.shape[0], -1, size).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, 64, 100])
def test_the_compiled_reduction_equals_the_reference(dtype, size):
    reduce = kernels.compiled_reduce("cpu")
    if reduce is None:
        pytest.skip("no C++ compiler here")
    product, codes = (torch.randn(33, 7 * size).to(dtype) for _ in range(2))
    found = reduce(product, codes, size)
    assert found.dtype == torch.float32
    assert relative_error(found, exact(product, codes, size)) < 1e-5


def test_large_reductions_are_compiled_and_small_ones_are_not(monkeypatch):
    calls = []

    def reduce(product, codes, size):
        calls.append(product.shape)
        return kernels.multiply_and_sum(product, codes, size)

    monkeypatch.setattr(kernels, "compiled_reduce", lambda device: reduce)
    small, large = torch.ones(4, 64), torch.ones(1024, 1024)
    assert torch.equal(kernels.group_reduce(small, small, 64), torch.full((4, 1), 64.0))
    assert not calls
    assert torch.equal(kernels.group_reduce(large, large, 64), torch.full((1024, 16), 64.0))
    assert calls == [large.shape]


def test_the_environment_can_say_not_to_compile(monkeypatch):
    monkeypatch.setenv("PEFT_SGRQ_COMPILE", "0")
    kernels.compiled_reduce.cache_clear()
    try:
        assert kernels.compiled_reduce("cpu") is None
    finally:
        kernels.compiled_reduce.cache_clear()


@pytest.mark.slow
def test_without_a_compiler_plain_torch_computes_the_same(tmp_path):
    program = (
        "import torch\n"
        "from peft_sgrq.formats import kernels\n"
        "assert kernels.compiled_reduce('cpu') is None\n"
        "ones = torch.ones(1024, 1024)\n"
        "assert torch.equal(kernels.group_reduce(ones, ones, 64), torch.full((1024, 16), 64.0))\n"
    )
    fresh = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": "/nonexistent/compiler"}
    subprocess.run([sys.executable, "-c", program], check=True, env=fresh)
