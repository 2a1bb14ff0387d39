"""Second moments of the inputs of linear layers over calibration tokens, added up batch by batch.

`H = 2/N sum_t x_t x_t^T` is the Hessian of `|W x - W' x|^2`, averaged over N tokens, in a row of `W'` (Hassibi and
Stork 1993; Frantar et al. 2023, arXiv 2210.17323).
"""

from __future__ import annotations

from functools import cached_property

import torch

DAMPING = 0.01  # of the mean diagonal, as in GPTQ: H is singular with fewer tokens than columns
_PANEL = 256  # columns of H that one product fills, from the diagonal on
_COLUMNS = 1024  # of the inverse Cholesky factor at a time


class InputStatistics:
    """Second moments of the inputs of one layer, or of several with the same input.

    Args:
        features (`int`): Columns of the layer's weight, `K`.
        full (`bool`): Keep the whole `H`, for criteria that need its inverse; otherwise its diagonal only.
        device (`torch.device`): Where to keep it.

    Attributes:
        total (`torch.Tensor`): `sum_t x_t x_t^T`, float32 `[K, K]`, of which what is left of the diagonal does not
            count and in part is missing; or its diagonal, float64 `[K]`.
        tokens (`torch.Tensor`): How many tokens are in it, float64 scalar on the same device, so that it can be summed
            over processes like `total`.
    """

    def __init__(self, features: int, full: bool, device: torch.device | str = "cpu") -> None:
        shape, dtype = ((features, features), torch.float32) if full else ((features,), torch.float64)
        self.total = torch.zeros(shape, dtype=dtype, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Adds tokens, `[T, K]` of any floating dtype; products and sums are made in float32."""
        self.tokens += x.shape[0]
        if self.total.dim() == 1:
            self.total += x.float().square_().sum(0) if x.dtype != torch.float32 else x.square().sum(0)
            return
        half = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
        x = x if half else x.float()
        for start in range(0, x.shape[1], _PANEL):
            left, right = x[:, start : start + _PANEL].t(), x[:, start:]
            panel = self.total[start : start + _PANEL, start:]
            if half:  # products of these are exact in float32
                panel += torch.mm(left, right, out_dtype=torch.float32)
            else:
                panel.addmm_(left, right)

    @cached_property
    def diagonal(self) -> torch.Tensor:
        """`H_jj`, float64 `[K]`; zero where the input always was (a dead column)."""
        total = self.total if self.total.dim() == 1 else self.total.diagonal()
        return total.double() * (2 / self.tokens.clamp(min=1))

    @property
    def hessian(self) -> torch.Tensor:
        """`H`, not damped, float64 `[K, K]`; a new tensor each time."""
        hessian = self.total.double().mul_(2 / self.tokens.clamp(min=1))
        for start in range(0, len(hessian), _PANEL):
            end = start + _PANEL
            block = hessian[start:end, start:end]
            block.copy_(block.triu() + block.triu(1).t())  # some CPUs round the two sides of a product otherwise
            hessian[end:, start:end] = hessian[start:end, end:].t()
        return hessian

    @cached_property
    def inverse_diagonal(self) -> torch.Tensor:
        """`[(H + damping I)^-1]_jj`, float64 `[K]`; infinite for dead columns, which nothing can be learnt about.

        The damping is 1 % of the mean diagonal. With `H = L L^T` it is the sum of squares of a column of `L^-1`.
        """
        dead = self.diagonal == 0
        if dead.all():
            return torch.full_like(self.diagonal, torch.inf)
        factor = self.hessian
        factor.diagonal().add_(DAMPING * self.diagonal.mean())
        torch.linalg.cholesky(factor, out=factor)  # (K, K)
        inverse = torch.empty_like(self.diagonal)
        for start in range(0, len(inverse), _COLUMNS):
            width = min(_COLUMNS, len(inverse) - start)
            # L^-1 is zero above its diagonal.
            unit = torch.eye(len(inverse) - start, width, dtype=factor.dtype, device=factor.device)
            columns = torch.linalg.solve_triangular(factor[start:, start:], unit, upper=False)  # (K - start, width)
            inverse[start : start + width] = columns.square_().sum(0)
        return inverse.masked_fill_(dead, torch.inf)

    def copy(self) -> InputStatistics:
        """The same numbers, for a layer that does not share them any more."""
        copied = InputStatistics(0, full=False)
        copied.total, copied.tokens = self.total.clone(), self.tokens.clone()
        return copied
