"""What the modules of a model are to its residual stream: who reads it, who writes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormRoles:
    """A norm of the residual stream.

    Attributes:
        name (`str`): The module.
        offset (`int`): 0 if it multiplies by its weight, 1 if by one plus that (Gemma).
        readers (`tuple[str, ...]`): The linear layers that take what it returns.
    """

    name: str
    offset: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class BlockRoles:
    """A transformer block.

    Attributes:
        name (`str`): The module.
        norms (`tuple[NormRoles, ...]`): Those of the residual stream.
        writers (`tuple[str, ...]`): The linear layers whose outputs are added to the stream.
        attention (`str` or `None`): The attention module.
        head_dim (`int` or `None`): Its.
        value, output (`str` or `None`): The linear layers around what attention mixes, where R2 goes; `None` if the
            value is no layer of its own.
        down (`str` or `None`): The linear layer that ends the MLP, where R4 goes.
    """

    name: str
    norms: tuple[NormRoles, ...]
    writers: tuple[str, ...]
    attention: str | None
    head_dim: int | None
    value: str | None
    output: str | None
    down: str | None


@dataclass(frozen=True)
class Roles:
    """What the modules of a model are to its residual stream of `hidden` numbers."""

    hidden: int
    embedding: str
    head: str
    final_norm: NormRoles
    blocks: tuple[BlockRoles, ...]

    @property
    def norms(self) -> list[NormRoles]:
        """All norms of the stream."""
        return [*(norm for block in self.blocks for norm in block.norms), self.final_norm]
