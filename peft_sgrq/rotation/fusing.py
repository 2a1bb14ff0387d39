"""What is fused into the weights of a model: the weights of its norms, and rotations, by compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from peft_sgrq.passes.untouched import configs_of
from peft_sgrq.rotation.roles import BlockRoles, NormRoles, Roles
from peft_sgrq.rotation.scheme import ROTATIONS

Applied = tuple[Sequence[str], str, bool]  # names of modules, location, whether inverse


@torch.no_grad()
def untie(model: Any, roles: Roles) -> int:
    """Gives the output head a weight of its own if it has that of the embedding; how many weights that adds."""
    embedding, head = model.get_submodule(roles.embedding), model.get_submodule(roles.head)
    added = 0
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        added = head.weight.numel()
    for config in configs_of(model):
        config.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is not None:
        weight = f"{roles.head}.weight"
        model.all_tied_weights_keys = {key: source for key, source in tied.items() if key != weight}
    return added


@torch.no_grad()
def fuse_norms(model: nn.Module, norms: Iterable[NormRoles]) -> None:
    """Multiplies the columns of what reads a norm by its weight, in float64, and leaves the norm a plain one."""
    for norm in norms:
        weight: Any = model.get_submodule(norm.name).weight
        factors = norm.offset + weight.double()
        for reader in norm.readers:
            columns: Any = model.get_submodule(reader).weight
            columns.copy_((columns.double() * factors).to(columns.dtype))
        weight.fill_(1 - norm.offset)


def rotation_factory(name: str, seed: int, applied: Iterable[Applied], head_dim: int | None = None) -> Any:
    """compressed-tensors' factory of one random Hadamard rotation, the same at all places it is applied to.

    Args:
        name (`str`): What its parts are called on the modules; begins with one of `ROTATIONS`.
        seed (`int`): Of the random signs, which differ by rotation where two have one size.
        applied (`Iterable`): Names of modules, where in them (a `TransformLocation`), and whether inverse.
        head_dim (`int` or `None`): The size of the blocks of a block-diagonal rotation.
    """
    from compressed_tensors.transform import TransformArgs, TransformFactory, TransformScheme

    apply = [TransformArgs(targets=list(names), location=place, inverse=back) for names, place, back in applied]
    scheme = TransformScheme(type="random-hadamard", head_dim=head_dim, apply=apply)
    return TransformFactory.from_scheme(scheme, name=name, seed=seed + ROTATIONS.index(name[:2]))


def has_hadamard(size: int) -> bool:
    """Whether compressed-tensors knows a Hadamard matrix of a size."""
    from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

    try:
        random_hadamard_matrix(size, torch.float32, torch.device("cpu"), torch.Generator())
    except ValueError:
        return False
    return True


def rotate_stream(model: nn.Module, roles: Roles, seed: int, inverse: bool = False) -> None:
    """R1: the residual stream is rotated, in all that writes and reads it; norms must have been fused."""
    writers = [roles.embedding, *(name for block in roles.blocks for name in block.writers)]
    readers = [reader for norm in roles.norms for reader in norm.readers]
    places: list[Applied] = [(writers, "weight_output", inverse), (readers, "weight_input", not inverse)]
    rotation_factory("R1", seed, places).apply_to_model(model, use_tqdm=False)


def rotate_values(model: nn.Module, blocks: Iterable[BlockRoles], seed: int, inverse: bool = False) -> None:
    """R2: the values of each head are rotated, in the layers around attention; one matrix for all heads and blocks."""
    blocks = list(blocks)
    for head_dim in sorted({block.head_dim for block in blocks if block.head_dim is not None}):
        chosen = [block for block in blocks if block.head_dim == head_dim]
        values = [block.value for block in chosen if block.value is not None]
        outputs = [block.output for block in chosen if block.output is not None]
        places: list[Applied] = [(values, "weight_output", inverse), (outputs, "weight_input", not inverse)]
        rotation_factory("R2", seed, places, head_dim).apply_to_model(model, use_tqdm=False)
