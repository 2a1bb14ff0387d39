"""Second moments of inputs, and the diagonal of their damped inverse, against plain float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_sgrq.passes import statistics
from peft_sgrq.passes.statistics import InputStatistics

quick = settings(max_examples=60, deadline=None, derandomize=True)


def collect(x: torch.Tensor, full: bool, batch: int = 1000) -> InputStatistics:
    found = InputStatistics(x.shape[1], full)
    for part in x.split(batch):
        found.update(part)
    return found


def hessian(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return 2 / len(x) * x.T @ x


def inverse_diagonal(x: torch.Tensor) -> torch.Tensor:
    h = hessian(x)
    return torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(h))).diagonal()


def correlated(tokens: int, columns: int) -> torch.Tensor:
    """Inputs like those of a language model: correlated, and of very different sizes."""
    mixed = torch.randn(tokens, columns) @ (torch.eye(columns) + torch.randn(columns, columns) / columns**0.5)
    return mixed * torch.logspace(-2, 2, columns)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.dtype == torch.float64
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@quick
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 64), st.integers(0, 2**31))
def test_the_hessian_is_that_of_all_tokens_however_they_come(tokens, columns, batch, seed):
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    found = collect(x, True, batch)
    assert int(found.tokens) == tokens
    close(found.hessian, hessian(x))
    close(found.diagonal, hessian(x).diagonal())
    close(collect(x, False, batch).diagonal, hessian(x).diagonal())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("columns", [24, 256, 600])
def test_products_and_sums_are_made_in_float32(dtype, columns):
    x = torch.randn(700, columns).to(dtype)
    found = collect(x, True, 100)
    close(found.hessian, hessian(x))
    assert torch.equal(found.hessian, found.hessian.T)
    close(collect(x, False, 100).diagonal, hessian(x).diagonal())


def test_sums_keep_their_digits_over_many_batches():
    x = torch.randn(1, 8) + 3
    found = InputStatistics(8, full=False)
    for _ in range(20_000):
        found.update(x)
    close(found.diagonal, 2 * x.double().square()[0], 1e-7)


@pytest.mark.parametrize("tokens", [1, 5, 64, 2000], ids=lambda tokens: f"{tokens}-tokens")
@pytest.mark.parametrize("columns", [1, 64, 300])
def test_the_inverse_diagonal_is_that_of_the_damped_hessian(tokens, columns):
    x = correlated(tokens, columns)
    found = collect(x, True, 128).inverse_diagonal
    expected = inverse_diagonal(x)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)


def test_the_inverse_diagonal_does_not_depend_on_how_many_columns_are_solved_at_a_time(monkeypatch):
    x = correlated(300, 100)
    whole = collect(x, True).inverse_diagonal
    monkeypatch.setattr(statistics, "_COLUMNS", 7)
    torch.testing.assert_close(collect(x, True).inverse_diagonal, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tokens", [1, 20, 500])
def test_dead_columns_are_left_out_of_the_inverse(tokens):
    x = correlated(tokens, 30)
    dead = torch.tensor([0, 7, 29])
    x[:, dead] = 0
    found = collect(x, True)
    assert found.diagonal[dead].eq(0).all() and found.inverse_diagonal[dead].isinf().all()
    rest = torch.ones(30, dtype=torch.bool).index_fill(0, dead, False)
    torch.testing.assert_close(found.inverse_diagonal[rest], inverse_diagonal(x)[rest], rtol=2e-4, atol=0)


def test_without_any_input_all_columns_are_dead():
    for found in (collect(torch.zeros(5, 4), True), InputStatistics(4, full=True)):
        assert found.diagonal.eq(0).all() and found.inverse_diagonal.isinf().all()
