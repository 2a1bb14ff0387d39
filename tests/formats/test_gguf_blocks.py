"""The numerics of GGUF's block types, against ggml's C code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ggml import ALL_TYPES, dequantize, quantize, random_blocks, searches

from peft_sgrq.formats.gguf.block_scales import BlockScales
from peft_sgrq.formats.gguf.blocks import TYPES
from peft_sgrq.formats.gguf.sub_block_scales import SubBlockScales, scales_of

WITH_SUB_SCALES = [kind for kind in TYPES.values() if kind.sub is not None]
by_type = lambda kinds: pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.name)  # noqa: E731
few = settings(max_examples=4, deadline=None)
seeds = st.integers(0, 2**31)


def weight_of(held, dtype=torch.float32):
    return held.weight(held.factors(held.scales(), held.offsets()), dtype)


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    return np.array_equal(ours.contiguous().numpy().view(np.uint32), theirs.view(np.uint32))


def both(kind, packed):
    held = [BlockScales(kind, packed)]
    return [*held, SubBlockScales(kind, packed)] if kind in WITH_SUB_SCALES else held


@ALL_TYPES
@few
@given(seed=seeds)
def test_weights_have_the_bits_of_ggmls(kind, seed):
    packed = random_blocks(kind, 3, 512, seed)
    for held in both(kind, torch.from_numpy(packed)):
        assert same_bits(weight_of(held), dequantize(kind, packed))


@by_type([kind for kind in TYPES.values() if not searches(kind)])
def test_weights_that_ggml_quantized_have_the_bits_of_ggmls(kind):
    packed = quantize(kind, np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32) * 0.02)
    for held in both(kind, torch.from_numpy(packed)):
        assert same_bits(weight_of(held), dequantize(kind, packed))


@ALL_TYPES
def test_other_dtypes_are_float32_rounded_once_and_parts_change_nothing(kind, monkeypatch):
    held = BlockScales(kind, torch.from_numpy(random_blocks(kind, 6, 1024, 1)))
    whole = weight_of(held)
    monkeypatch.setattr("peft_sgrq.formats.gguf.blocks._PART_COLUMNS", 512)
    assert torch.equal(weight_of(held), whole)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(weight_of(held, dtype), whole.to(dtype))


@by_type([kind for kind in TYPES.values() if not kind.name.startswith("TQ")])
def test_weights_equal_those_of_gguf_py(kind):
    gguf = pytest.importorskip("gguf")
    packed = random_blocks(kind, 2, 512, 2)
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(kind.id))
    assert np.array_equal(weight_of(BlockScales(kind, torch.from_numpy(packed))).numpy(), theirs)


@by_type(WITH_SUB_SCALES)
@few
@given(seed=seeds)
def test_sub_scales_written_are_those_read(kind, seed):
    packed = torch.from_numpy(random_blocks(kind, 4, 512, seed)).view(-1, kind.nbytes)[:, kind.sub.at]
    sub = kind.sub.read(packed)
    assert torch.equal(kind.sub.write(sub), packed)
    assert sub.scales.min() >= kind.sub.lowest and sub.scales.max() <= kind.sub.highest


@ALL_TYPES
@few
@given(seed=seeds)
def test_changed_scales_change_scale_bytes_alone_and_are_what_is_read_again(kind, seed):
    packed = torch.from_numpy(random_blocks(kind, 3, 512, seed))
    torch.manual_seed(seed)
    for held in both(kind, packed):
        scales = held.round(held.scales() * (1 + 0.1 * torch.randn(held.scales().shape)))
        changed = held.with_scales(scales)
        again = type(held)(kind, changed)
        assert torch.equal(again.scales(), scales)
        expected = held.weight(held.factors(scales, held.changed_offsets(scales)), torch.float32)
        assert torch.equal(weight_of(again), expected)
        assert same_bits(expected + 0.0, dequantize(kind, changed.numpy()) + 0.0)
        differs = (changed != packed).view(-1, kind.nbytes).any(0).nonzero().flatten()
        assert set(differs.tolist()) <= set(held.scale_bytes)


@ALL_TYPES
@few
@given(seed=seeds)
def test_unchanged_blocks_keep_their_bytes(kind, seed):
    packed = torch.from_numpy(random_blocks(kind, 4, 1024, seed))
    for held in both(kind, packed):
        scales = held.scales()
        wanted = scales.clone()
        wanted[1:3, : 256 // held.group_size] *= 1.25
        assert torch.equal(held.with_scales(held.round(scales)), packed)
        changed = held.with_scales(held.round(wanted)).view(4, -1, kind.nbytes)
        first = 256 // kind.size
        assert torch.equal(changed[[0, 3]], packed.view(4, -1, kind.nbytes)[[0, 3]])
        assert torch.equal(changed[:, first:], packed.view(4, -1, kind.nbytes)[:, first:])


@by_type(WITH_SUB_SCALES)
@few
@given(seed=seeds)
def test_a_sub_block_that_is_to_stay_stays_in_a_super_block_that_changes(kind, seed):
    packed = torch.from_numpy(random_blocks(kind, 4, 512, seed))
    held = SubBlockScales(kind, packed)
    torch.manual_seed(seed)
    scales = held.scales()
    chosen = torch.rand(scales.shape) < 0.5
    rounded = held.round(torch.where(chosen, scales * (1 + 0.2 * torch.randn(scales.shape)), scales))
    changed = SubBlockScales(kind, held.with_scales(rounded))
    assert torch.equal(rounded[~chosen], scales[~chosen])
    size = held.group_size
    kept = (weight_of(changed) == weight_of(held)).view(*scales.shape, size).all(-1)
    assert kept[~chosen].all()


@by_type(WITH_SUB_SCALES)
def test_what_is_kept_of_a_change_of_sub_scales(kind):
    # The shares are of the change itself: 1 - |made - wanted| / |wanted - before|.
    weight = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32) * 0.1
    held = scales_of(kind, torch.from_numpy(quantize(kind, weight)))
    scales = held.scales()
    torch.manual_seed(0)
    direction = torch.randn(scales.shape)
    for change, share in ((0.05, 0.7), (0.16, 0.88)) if kind.name != "Q2_K" else ((0.05, 0.45), (0.16, 0.8)):
        wanted = scales * (1 + change * direction)
        kept = 1 - (held.round(wanted) - wanted).norm() / (wanted - scales).norm()
        assert kept > share


@by_type([kind for kind in WITH_SUB_SCALES if kind.offset_at is not None])
def test_minimums_that_are_all_zero_can_be_moved(kind):
    packed = torch.from_numpy(random_blocks(kind, 4, 1024, 4)).view(-1, kind.nbytes)
    packed[:, kind.offset_at : kind.offset_at + 2] = 0
    held = SubBlockScales(kind, packed.view(4, -1))
    scales = held.scales()
    moves = -torch.rand(scales.shape, generator=torch.Generator().manual_seed(0)) * scales.sign()
    moves[:, ::3] = 0
    wanted = (scales * moves).view(-1, 256 // held.group_size)  # not above zero, as all offsets are
    found = held.changed_offsets(scales, moves).view(wanted.shape)
    step = wanted.abs().amax(1, keepdim=True) / kind.sub.highest
    assert ((found - wanted).abs() <= 0.55 * step + 2**-24 * kind.sub.highest).all() and (wanted < 0).any()


@ALL_TYPES
def test_scales_that_are_zero_or_infinite_do_not_become_numbers(kind):
    for held in both(kind, torch.from_numpy(random_blocks(kind, 4, 1024, 3))):
        scales = held.scales()
        assert (scales == 0).any()
        rounded = held.round(scales * 1.5)
        assert (rounded[scales == 0] == 0).all()
        assert torch.isfinite(held.weight(held.unit_factors(), torch.float32)).all()
        broken = scales.clone()
        broken[0, 0] = torch.nan
        broken[1, 0] = torch.inf
        rounded = held.round(broken)
        assert not torch.isfinite(rounded[0]).all() and not torch.isfinite(rounded[1]).all()
