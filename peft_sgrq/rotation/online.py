"""R3 and R4: rotations of activations at run time, by compressed-tensors' hooks, chosen layer by layer.

R3 rotates queries and keys of each head behind the position embeddings, R4 the input of the layer that ends an MLP,
whose weight is rotated back. Both are needed where activations or the KV cache have 4 bits. transformers 5.23 loads
what R4 did to the weights and drops the rotations themselves, with no more than a warning about tensors it does not
know. So a model with online rotations says in its config what they are (`online_rotations`), the matrices are saved
with it, and [`load_rotated`] puts both together.
`test_transformers_still_drops_online_rotations` fails once that is not needed any more.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peft_sgrq.base.workarounds.dropped_rotations import FIELD, has_online_rotations
from peft_sgrq.files.folder import CheckpointFolder
from peft_sgrq.files.sources import find_folder
from peft_sgrq.rotation.attention import hook_attention, rotate_queries_by
from peft_sgrq.rotation.fusing import Applied, has_hadamard, rotation_factory
from peft_sgrq.rotation.roles import BlockRoles

_LARGEST = 4096  # of a full rotation; larger ones are block-diagonal
_ONLINE = ("input", "q_attn", "k_cache")


def down_block(size: int) -> int | None:
    """The size of the blocks of R4 for an input of a size: all of it if there is such a rotation; `None` for none."""
    if size <= _LARGEST and has_hadamard(size):
        return size
    block = size & -size  # the largest power of two that divides it
    return min(block, 1024) if block >= 16 else None


def rotate_queries(model: Any, blocks: Iterable[BlockRoles], seed: int) -> None:
    """R3 in some blocks: queries and keys of each head, at run time."""
    blocks = list(blocks)
    if not blocks:
        return
    hook_attention(model)
    for head_dim in sorted({block.head_dim for block in blocks if block.head_dim is not None}):
        chosen = [block for block in blocks if block.head_dim == head_dim]
        names = [block.attention for block in chosen if block.attention is not None]
        _attach(model, "R3", seed, [(names, "q_attn", False), (names, "k_cache", False)], head_dim)


def rotate_down(model: Any, blocks: Iterable[BlockRoles], seed: int) -> None:
    """R4 in some blocks: the weight of the layer that ends the MLP now, its input at run time."""
    by_block: dict[int, list[str]] = {}
    for block in blocks:
        if block.down is not None:
            size = down_block(model.get_submodule(block.down).in_features)
            if size is not None:
                by_block.setdefault(size, []).append(block.down)
    for size, names in by_block.items():
        rotation_factory("R4", seed, [(names, "weight_input", True)], size).apply_to_model(model, use_tqdm=False)
        _attach(model, "R4" if len(by_block) == 1 else f"R4x{size}", seed, [(names, "input", False)], size)


def _attach(model: Any, name: str, seed: int, places: list[Applied], head_dim: int) -> None:
    factory = rotation_factory(name, seed, places, head_dim)
    if next(model.parameters()).dtype == torch.float64:
        factory.scheme.precision = torch.float64
    _apply(model, factory)
    _declare(model, {**(getattr(model.config, FIELD, None) or {}), name: factory.scheme.model_dump(mode="json")})


def _apply(model: Any, factory: Any) -> None:
    """What a factory's `apply_to_model` does, but for queries, where it would exchange the attention of all models."""
    scheme = factory.scheme
    for args in scheme.apply:
        if args.location == "q_attn":
            rotate_queries_by(model, factory, args)
    others = [args for args in scheme.apply if args.location != "q_attn"]
    factory.scheme = scheme.model_copy(update={"apply": others})
    factory.apply_to_model(model, use_tqdm=False)
    factory.scheme = scheme


def _declare(model: Any, groups: dict[str, Any]) -> None:
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    setattr(model.config, FIELD, groups)
    apply_transform_config(model, TransformConfig(config_groups={}))  # declares which matrices are one tensor
    model.transform_config = TransformConfig.model_validate({"config_groups": groups})


def load_rotated(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Loads a causal language model with the online rotations it was saved with.

    A checkpoint without any is loaded as transformers loads it.

    Args:
        path (`str` or path): A folder that a model with online rotations was saved to.
        **kwargs: What `AutoModelForCausalLM.from_pretrained` takes.

    Returns:
        `PreTrainedModel`: The model; it computes what was saved.

    Raises:
        ValueError: If the rotations, or their matrices, are not those of the model.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    groups: Mapping[str, Any] = getattr(model.config, FIELD, None) or {}
    if not groups or has_online_rotations(model):
        return model
    from peft_sgrq.rotation.scheme import require_compressed_tensors

    require_compressed_tensors()
    from compressed_tensors.transform import TransformFactory, TransformScheme

    schemes = {name: TransformScheme.model_validate(group) for name, group in groups.items()}
    modules = dict(model.named_modules())
    for name, scheme in schemes.items():
        unknown = [target for args in scheme.apply for target in args.targets if target not in modules]
        if unknown or not all(args.location in _ONLINE for args in scheme.apply):
            raise ValueError(
                f"{os.fspath(path)}: the rotation {name} is of {unknown[:1] or 'weights'}, expected layers of the "
                "model and online places; save the model anew."
            )
    if any(args.location in _ONLINE[1:] for scheme in schemes.values() for args in scheme.apply):
        hook_attention(model)
    for name, scheme in schemes.items():
        _apply(model, TransformFactory.from_scheme(scheme, name=name))
    _declare(model, dict(groups))
    with CheckpointFolder(find_folder(path, "model", kwargs.get("revision"))) as folder:
        _read_matrices(model, folder)
    return model


@torch.no_grad()
def _read_matrices(model: nn.Module, folder: CheckpointFolder) -> None:
    """Fills the matrices of online rotations, several of which are one tensor, from a checkpoint."""
    wanted: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "HadamardTransform":
            weight: Any = module.weight
            wanted.setdefault(id(weight), (weight, []))[1].append(f"{name}.weight")
    for parameter, names in wanted.values():
        found = next((name for name in names if name in folder), None)
        if found is None:
            raise ValueError(
                f"The checkpoint has no tensor {names[0]}, expected the matrix of a rotation; save the model anew."
            )
        parameter.copy_(folder.tensor(found))
