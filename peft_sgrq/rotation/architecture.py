"""Which modules of a model read and write its residual stream: found by running it, not by their names.

A rotation of the stream is right if every part of the model that reads or writes it is known. What reads it are linear
layers behind a norm; what writes it are the embedding and linear layers whose outputs are added to it. One forward
pass of sequences of one token shows all of it: the input of a layer is the very tensor a norm returned; what a block
adds to the stream is a sum of outputs of linear layers, up to factors; and attention to one token returns its value.
Anything else is refused, with the reason.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from peft_sgrq.passes.chain import find_stack
from peft_sgrq.passes.untouched import untouched
from peft_sgrq.rotation.recorded_calls import Call, recorded_calls, same_tensor
from peft_sgrq.rotation.roles import BlockRoles, NormRoles, Roles

_TOKENS = 8  # sequences of one token each


def find_roles(model: nn.Module) -> Roles:
    """Finds what reads and writes the residual stream of a causal language model.

    Args:
        model (`nn.Module`): A model that can be rotated or quantized (`refuse_model`). It is left as it was.

    Raises:
        ValueError: If a part of the model is none that a rotation of the stream can go through; the sentence names it.
    """
    _refuse_parts(model)
    embedding, head = (_embeddings(model, which) for which in ("input", "output"))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    stack = find_stack(model, linears)
    if stack is None:
        raise ValueError("The model has no list of transformer blocks, expected a causal language model; give one.")
    hidden = int(model.get_submodule(embedding).embedding_dim)  # type: ignore[arg-type]
    calls = _trace(model, stack[1], hidden)
    norms = _find_norms(model, calls, hidden)
    final = next((norm for norm in norms if head in norm.readers), None)
    if final is None:
        raise ValueError(f"{head} does not read a norm, expected a norm right before the output head.")
    names = [f"{stack[0]}.{index}" for index in range(len(stack[1]))]
    _check_stream(calls, embedding, final.name, names)
    known = {embedding, final.name, head}
    for name, module in model.named_modules():
        inside = name.startswith(f"{stack[0]}.")
        if not inside and name not in known and any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"{name} ({type(module).__name__}) has weights and is neither the embedding, a block, the last norm "
                "nor the output head, expected a model of those alone; rotate its language model by itself."
            )
    blocks = tuple(_block(model, name, norms, calls) for name in names)
    return Roles(hidden, embedding, head, final, blocks)


def _embeddings(model: nn.Module, which: str) -> str:
    getter: Any = getattr(model, f"get_{which}_embeddings", None)
    module = getter() if getter is not None else None
    kind, part = (nn.Embedding, "an embedding") if which == "input" else (nn.Linear, "a linear output head")
    if not isinstance(module, kind):
        raise ValueError(
            f"The model has {type(module).__name__} for its {which} embeddings, expected {part}; give a causal "
            "language model."
        )
    return next(name for name, found in model.named_modules() if found is module)


def _refuse_parts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        kind = type(module).__name__
        if isinstance(module, nn.LayerNorm) or (set(own) == {"weight", "bias"} and own["weight"].dim() == 1):
            raise ValueError(
                f"{name} is a {kind}, which takes the mean away, so that a rotation before it is not one after it, "
                "expected RMSNorm; choose a model with that."
            )
        if set(own) != {"weight"} or own["weight"].dim() != 1:
            raise ValueError(
                f"{name} is a {kind} with the parameters {sorted(own)}, expected linear layers and norms alone; such "
                "a model cannot be rotated."
            )


def _trace(model: nn.Module, blocks: nn.ModuleList, hidden: int) -> dict[str, Call]:
    of_stack = set(blocks)
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(0, vocabulary, (_TOKENS, 1), generator=torch.Generator().manual_seed(0))

    def wanted(name: str, module: nn.Module) -> bool:
        own = dict(module.named_parameters(recurse=False))
        return module in of_stack or isinstance(module, (nn.Linear, nn.Embedding)) or list(own) == ["weight"]

    device = next(model.parameters()).device
    with untouched(model), torch.no_grad(), recorded_calls(model, wanted) as calls:
        model(input_ids=ids.to(device), use_cache=False)
    several = next((name for name, found in calls.items() if len(found) > 1), None)
    if several is not None:
        raise ValueError(
            f"{several} is called several times in one forward pass, expected once; it cannot be rotated."
        )
    return {name: found[0] for name, found in calls.items()}


def _find_norms(model: nn.Module, calls: dict[str, Call], hidden: int) -> list[NormRoles]:
    """The norms that linear layers read, of the size of the stream."""
    modules = dict(model.named_modules())
    found = []
    for name, call in calls.items():
        weight = getattr(modules[name], "weight", None)
        if weight is None or weight.dim() != 1 or weight.numel() != hidden:
            continue
        readers = tuple(
            other
            for other, read in calls.items()
            if isinstance(modules[other], nn.Linear) and same_tensor(read.x, call.y)
        )
        if readers:
            found.append(NormRoles(name, _offset(name, modules[name]), readers))
    return found


def _offset(name: str, module: Any) -> int:
    """What a norm adds to its weight, from what it computes."""
    weight = module.weight.detach().double()
    generator = torch.Generator().manual_seed(0)
    x = 100 * torch.randn(4, weight.numel(), generator=generator)  # large, so that the epsilon does not count
    x = x.to(module.weight)
    with torch.no_grad():
        y = module(x).double()
    plain = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    for offset in (0, 1):
        expected = plain * (offset + weight)
        if bool((y - expected).norm() <= 2e-2 * expected.norm()):
            return offset
    raise ValueError(f"{name} ({type(module).__name__}) is no RMSNorm, expected one; the model cannot be rotated.")


def _misfit(target: torch.Tensor, parts: list[torch.Tensor], level: torch.Tensor) -> tuple[list[float], bool]:
    """The factors with which parts add up to a target, and whether they do, to the rounding of sums of a `level`."""
    dtype = target.dtype
    goal, matrix = target.double().flatten(), torch.stack([part.double().flatten() for part in parts], 1)
    factors = torch.linalg.lstsq(matrix.cpu(), goal.cpu().unsqueeze(1)).solution.squeeze(1)
    rest = (goal.cpu() - matrix.cpu() @ factors).norm()
    rounding = 8 * torch.finfo(dtype).eps * level.double().norm().cpu()
    return factors.tolist(), bool(rest <= 1e-3 * goal.norm().cpu() + rounding)


def _check_stream(calls: dict[str, Call], embedding: str, final: str, blocks: list[str]) -> None:
    first, last = calls[blocks[0]], calls[blocks[-1]]
    start = calls[embedding].y
    if start.shape != first.x.shape or not _misfit(first.x, [start], first.x)[1]:
        raise ValueError(
            f"{blocks[0]} does not start from the output of {embedding} alone, expected token embeddings and nothing "
            "added to them; the model cannot be rotated."
        )
    pairs = [(calls[one].y, calls[other].x) for one, other in pairwise(blocks)]
    if not all(torch.equal(y, x) for y, x in [*pairs, (last.y, calls[final].x)]):
        raise ValueError(
            f"The blocks {blocks[0]} to {blocks[-1]} and {final} do not follow one another, expected each to take "
            "what the one before returned; the model cannot be rotated."
        )


def _block(model: nn.Module, name: str, norms: list[NormRoles], calls: dict[str, Call]) -> BlockRoles:
    block = model.get_submodule(name)
    inside = {f"{name}.{part}": module for part, module in block.named_modules() if part}
    linears = [part for part, module in inside.items() if isinstance(module, nn.Linear)]
    idle = sorted(set(linears) - set(calls))
    if idle:
        raise ValueError(f"{idle[0]} takes no part in a forward pass, expected it to; a choice of experts, perhaps.")
    own = {part: calls[part] for part in linears}
    stream = calls[name]
    of_block = tuple(norm for norm in norms if norm.name.startswith(f"{name}."))
    readers = {reader for norm in of_block for reader in norm.readers}
    candidates = [part for part, call in own.items() if part not in readers and call.y.shape == stream.y.shape]
    outputs = [own[part].y for part in candidates]
    factors, fits = _misfit(stream.y - stream.x, outputs, stream.y) if outputs else ([], False)
    if not fits:
        raise ValueError(
            f"What {name} adds to the residual stream is not a sum of outputs of its linear layers, expected no norm "
            "or gate behind them (as Gemma 2, OLMo 2 and GLM-4 have); the model cannot be rotated."
        )
    writers = tuple(part for part, factor in zip(candidates, factors, strict=True) if abs(factor) > 1e-3)
    for part, call in own.items():
        if part not in readers and same_tensor(call.x, stream.x):
            raise ValueError(f"{part} reads the residual stream without a norm; the model cannot be rotated.")
    attention = next((part for part, module in inside.items() if _is_attention(module)), None)
    head_dim = getattr(inside[attention], "head_dim", None) if attention else None
    inner = [part for part in writers if attention and part.startswith(f"{attention}.")]
    outer = [part for part in writers if part not in inner]
    value, output = _around_attention(inner, readers, own, head_dim)
    return BlockRoles(
        name,
        of_block,
        writers,
        attention,
        head_dim,
        value,
        output,
        outer[0] if len(outer) == 1 else None,
    )


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() and isinstance(getattr(module, "head_dim", None), int)


def _around_attention(
    outputs: list[str], readers: set[str], calls: dict[str, Call], head_dim: int | None
) -> tuple[str | None, str | None]:
    """The layer that makes values and the one that takes what attention made of them, head by head."""
    if len(outputs) != 1 or not isinstance(head_dim, int):
        return None, None
    mixed = calls[outputs[0]].x
    for reader in sorted(readers):
        values = calls[reader].y
        if values.shape[-1] % head_dim or mixed.shape[-1] % values.shape[-1]:
            continue
        heads = values.unflatten(-1, (-1, 1, head_dim))
        taken = mixed.unflatten(-1, (heads.shape[-3], -1, head_dim))
        if torch.allclose(taken.double(), heads.double().expand_as(taken), rtol=1e-2, atol=1e-6):
            return reader, outputs[0]
    return None, None
