"""`rotate`: a model that computes the same, with weights and activations that are easier to quantize."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from peft_sgrq.base.workarounds.dropped_rotations import has_online_rotations
from peft_sgrq.passes.data import Batch, load_batches
from peft_sgrq.passes.running import longest, runner
from peft_sgrq.passes.untouched import untouched
from peft_sgrq.rotation.architecture import find_roles
from peft_sgrq.rotation.errors import RotationError, measure_errors, possible
from peft_sgrq.rotation.fusing import fuse_norms, has_hadamard, rotate_stream, rotate_values, untie
from peft_sgrq.rotation.online import rotate_down, rotate_queries
from peft_sgrq.rotation.recorded_calls import recorded_calls
from peft_sgrq.rotation.refused import refuse_model
from peft_sgrq.rotation.roles import BlockRoles, Roles
from peft_sgrq.rotation.rotations import Rotations
from peft_sgrq.rotation.scheme import ROTATIONS, Scheme, parse_scheme, require_compressed_tensors
from peft_sgrq.rotation.snapshot import restored_on_failure

_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def rotate(
    model: nn.Module,
    data: Any = None,
    *,
    tokenizer: Any = None,
    scheme: str | Scheme = "W4A4KV4",
    rotations: Sequence[str] = ("R1", "R2"),
    select: Literal["measured", "all"] | None = None,
    group_size: int = 64,
    column: str | None = None,
    samples: int | None = 16,
    max_length: int = 512,
    batch_size: int = 4,
    seed: int = 0,
    tolerance: float | None = None,
) -> Rotations:
    """Rotates a dense causal language model, in place, so that what it computes stays and quantization costs less.

    The weights of its norms are fused into the layers behind them, and the output head gets a weight of its own. Then
    R1 rotates the residual stream and R2 the values of each head, fused into the weights: the result is an ordinary
    dense checkpoint that any quantizer takes. R3 (queries and keys) and R4 (the inputs of the layers that end MLPs)
    are computed at run time; a model with them must be loaded by [`load_rotated`]. Rotations are random Hadamard
    matrices of compressed-tensors. That the model computes the same is checked on a sequence, in every call.

    Args:
        model (`nn.Module`): A dense model with RMSNorm before its layers: Llama, Mistral, Qwen 2 and 3, SmolLM,
            Phi-3, Granite, Gemma 1. A copy of its weights is kept in memory meanwhile.
        data: Calibration data, as in [`calibrate`]: for errors. Without it R1 alone or all are chosen.
        tokenizer: The tokenizer for texts.
        scheme (`str`): The bits to come, as in [`quantize`]; errors are measured with them.
        rotations (`Sequence[str]`): What may be used, of "R1", "R2", "R3" and "R4".
        select (`"measured"`, `"all"` or `None`): Use R2, R3 and R4 in the blocks whose error they lower, or in all
            that can have them. `None` measures where there is data.
        group_size (`int`): Columns that will share a scale.
        column, samples, max_length, batch_size: How the data is read, as in [`calibrate`].
        seed (`int`): Of the random signs, and of the choice of samples.
        tolerance (`float` or `None`): The largest change of logits that is taken for rounding, relative to how much
            they vary; `None` is 1e-4 in float64, 1e-3 in float32, 2e-2 in float16 and 1e-1 in bfloat16.

    Returns:
        `Rotations`: Which rotations were chosen, the errors, and by how much logits changed.

    Raises:
        ValueError: If the model is quantized, has adapters, or has a part that no rotation can go through (LayerNorm,
            a norm behind a layer, experts, another part beside the language model), or would not compute the same.
            The model is as it was then, bit for bit.
        TypeError: If an argument has the wrong type.
        ImportError: If compressed-tensors is missing.

    Source: QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) for the rotations, RoSTE (Wei et al. 2025, arXiv
    2502.09003) for choosing them by layer.

    Example:
        ```py
        >>> print(peft_sgrq.rotate(model, texts, tokenizer=tokenizer, scheme="W4A8KV8"))
        >>> model.save_pretrained("rotated")
        ```
    """
    require_compressed_tensors()
    bits = parse_scheme(scheme, group_size)
    wanted = _check_rotations(rotations, select, data)
    if not isinstance(seed, int):
        raise TypeError(f"`seed` is {seed!r}, expected a whole number.")
    _check_tolerance(tolerance)
    select = select or ("measured" if data is not None else "all")
    refuse_model(model, "rotate")
    if has_online_rotations(model):
        raise ValueError("The model has online rotations, expected one without; rotate the original model.")
    batches: list[Batch] = []
    if data is not None:
        batches = load_batches(data, tokenizer, column, samples, longest(model, max_length), batch_size, seed)
    roles = find_roles(model)
    if "R1" in wanted and not has_hadamard(roles.hidden):
        raise ValueError(
            f"The residual stream has {roles.hidden} numbers, expected a multiple of 4 for which a Hadamard matrix is "
            'known; leave "R1" out of `rotations`.'
        )
    probe = batches[0].first() if batches else _random_batch(model)
    before = _observe(model, roles, probe)
    with restored_on_failure(model):
        found = _apply(model, roles, wanted, select, bits, batches, seed)
        found.difference = _compare(before, _observe(model, roles, probe), roles, tolerance, model)
    if "R3" in found.chosen or "R4" in found.chosen:
        warnings.warn(
            "The model has online rotations. Save it as usual and load it with `peft_sgrq.load_rotated`: transformers "
            "alone would drop them and compute something else."
        )
    return found


def _check_rotations(rotations: Sequence[str], select: str | None, data: Any) -> list[str]:
    if isinstance(rotations, str) or not isinstance(rotations, Sequence) or not rotations:
        raise TypeError(f"`rotations` is {rotations!r}, expected some of {ROTATIONS} in a list.")
    unknown = [name for name in rotations if name not in ROTATIONS]
    if unknown:
        raise ValueError(f"`rotations` has {unknown[0]!r}, expected some of {ROTATIONS}; leave it out.")
    if select not in (None, "measured", "all"):
        raise ValueError(f'`select` is {select!r}, expected "measured" or "all".')
    if select == "measured" and data is None:
        raise ValueError('`select` is "measured" and there is no data, expected some; give `data=`, or select "all".')
    return [name for name in ROTATIONS if name in rotations]


def _check_tolerance(tolerance: object) -> None:
    if tolerance is not None and (isinstance(tolerance, bool) or not isinstance(tolerance, (int, float))):
        raise TypeError(f"`tolerance` is {tolerance!r}, expected a number, or None for that of the dtype.")


def _apply(
    model: Any, roles: Roles, wanted: list[str], select: str, bits: Scheme, batches: list[Batch], seed: int
) -> Rotations:
    found = Rotations(seed, bits.name, {})
    if "R1" in wanted:
        found.untied_weights = untie(model, roles)
        fuse_norms(model, roles.norms)
        rotate_stream(model, roles, seed)
        found.chosen["R1"] = [block.name for block in roles.blocks]
    by_block = [name for name in wanted if name != "R1"]
    able = {block.name: possible(model, block) for block in roles.blocks}
    for name in by_block:
        unable = [block for block, layers in able.items() if name not in layers]
        if unable:
            found.left_out[name] = unable
    if select == "measured" and by_block:
        found.errors = measure_errors(model, roles.blocks, by_block, bits, batches, seed)
        pairs = choose(found.errors)
    else:
        pairs = [(block, name) for name in by_block for block, layers in able.items() if name in layers]
    for name in by_block:
        blocks = [block for block in roles.blocks if (block.name, name) in pairs]
        if blocks:
            found.chosen[name] = [block.name for block in blocks]
            _ROTATE[name](model, blocks, seed)
    return found


_ROTATE: dict[str, Callable[[Any, list[BlockRoles], int], None]] = {
    "R2": rotate_values,
    "R3": rotate_queries,
    "R4": rotate_down,
}


def choose(errors: Sequence[RotationError]) -> list[tuple[str, str]]:
    """The pairs of block and rotation with the least sum of errors: those where the rotation lowers its own."""
    return [(error.block, error.rotation) for error in errors if error.helps]


def _random_batch(model: Any) -> Batch:
    embedding = model.get_input_embeddings()
    length = longest(model, 32)
    ids = torch.randint(0, embedding.num_embeddings, (1, length), generator=torch.Generator().manual_seed(0))
    return Batch.of({"input_ids": ids})


class _Observed(NamedTuple):
    """Logits of a sequence, and the lengths of its residual stream behind each block, which rotations preserve."""

    logits: torch.Tensor
    lengths: dict[str, torch.Tensor]


def _observe(model: nn.Module, roles: Roles, batch: Batch) -> _Observed:
    names = {block.name for block in roles.blocks}
    with untouched(model), torch.no_grad(), recorded_calls(model, lambda name, _: name in names) as calls:
        logits = runner(model)(batch).logits
    lengths = {name: calls[name][0].y.double().norm(dim=-1) for name in calls}
    return _Observed(logits.double(), lengths)


def _compare(before: _Observed, after: _Observed, roles: Roles, tolerance: float | None, model: nn.Module) -> float:
    dtype = model.get_submodule(roles.embedding).weight.dtype
    allowed = _TOLERANCES.get(dtype, 1e-3) if tolerance is None else tolerance  # type: ignore[arg-type]
    spread = (before.logits - before.logits.mean()).norm()
    difference = float((after.logits - before.logits).norm() / spread)
    if difference <= allowed:  # not so for NaN
        return difference
    changed = next(
        (
            name
            for name, lengths in before.lengths.items()
            if not bool((after.lengths[name] - lengths).norm() <= allowed * lengths.norm())
        ),
        "the output head",
    )
    raise ValueError(
        f"The rotated model does not compute the same: logits changed by {difference:.2g} of their spread, expected "
        f"at most {allowed:.2g} in {dtype}, first at {changed}; the model is as it was. Report its architecture, or "
        "raise `tolerance` if that is rounding."
    )
