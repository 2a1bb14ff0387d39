"""Masks, counts and the saliency of magnitudes."""

from __future__ import annotations

import math
from fractions import Fraction

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from support.bases import DENSE, INT8, NF4, adapted
from support.single_layers import adapt, conv1d, linear_4bit, linear_8bit, linear_dense, the_layer

from peft_sgrq import SGRQConfig
from peft_sgrq.layer.masks import decode_mask, encode_mask, pack_mask, unpack_mask
from peft_sgrq.selection.criteria import weight_scores
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.ratio import count_selected, select_top

quick = settings(max_examples=100, deadline=None, derandomize=True)


@st.composite
def selections(draw: st.DrawFn) -> tuple[list[int], int]:
    selectable = draw(st.integers(1, 200))
    return sorted(draw(st.sets(st.integers(0, selectable - 1), min_size=1))), selectable


@quick
@given(selections())
def test_masks_round_trip(selection):
    groups, selectable = selection
    text = encode_mask(torch.tensor(groups), selectable)
    assert len(text) == 2 * math.ceil(selectable / 8)
    found = decode_mask(text, selectable)
    assert found.dtype == torch.int64 and found.tolist() == groups
    assert unpack_mask(pack_mask(torch.tensor(groups), selectable)).tolist() == groups


@quick
@given(selections())
def test_the_first_group_is_the_highest_bit(selection):
    groups, selectable = selection
    bits = bin(int("1" + encode_mask(torch.tensor(groups), selectable), 16))[3:]
    assert [index for index, bit in enumerate(bits) if bit == "1"] == groups


@quick
@given(selections(), st.randoms(use_true_random=False))
def test_the_order_of_the_groups_does_not_matter(selection, random):
    groups, selectable = selection
    shuffled = random.sample(groups, len(groups))
    assert encode_mask(torch.tensor(shuffled), selectable) == encode_mask(torch.tensor(groups), selectable)


@pytest.mark.parametrize(
    ("mask", "selectable"),
    [("00", 8), ("", 3), ("8000", 8), ("80", 9), ("20", 2), ("01", 7), ("000080", 16)],
    ids=["none-set", "empty", "too-long", "too-short", "beyond-the-last", "beyond-the-last-bit", "a-byte-too-many"],
)
def test_a_mask_that_does_not_fit_is_refused(mask, selectable):
    with pytest.raises(
        ValueError, match=rf"'{mask}' is not a mask over {selectable} groups \(expected \d+ bytes.*load"
    ):
        decode_mask(mask, selectable)


@pytest.mark.parametrize("mask", ["20", "8000", "00"])
def test_a_mask_that_does_not_fit_is_refused_with_the_name_of_the_layer(llama_dir, mask):
    plain = NF4.load(llama_dir)
    types = [type(module) for module in plain.modules()]
    selection = {"model.layers.1.mlp.down_proj": mask}
    with pytest.raises(ValueError, match=rf"'model\.layers\.1\.mlp\.down_proj' does not fit.*'{mask}' .* 2 groups"):
        get_peft_model(plain, SGRQConfig(selection=selection))
    assert [type(module) for module in plain.modules()] == types


@pytest.mark.parametrize("mask", ["8", "zz", "8O", "FF", 128])
def test_a_mask_that_is_not_hexadecimal_is_refused(mask):
    with pytest.raises((ValueError, TypeError), match="selection"):
        SGRQConfig(selection={"layer": mask})


# how many


@quick
@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10_000))
def test_the_count_is_the_nearest_whole_number_and_at_least_one(ratio, selectable):
    count = count_selected(ratio, selectable)
    assert 1 <= count <= selectable
    exact = Fraction(ratio) * selectable
    assert count == 1 or abs(count - exact) <= Fraction(1, 2) + Fraction(1, 10**9)
    assert count_selected(1.0, selectable) == selectable


@quick
@given(st.integers(1, 1000), st.floats(0.001, 1), st.floats(0.001, 1))
def test_a_larger_ratio_never_selects_fewer(selectable, one, other):
    low, high = sorted([one, other])
    assert count_selected(low, selectable) <= count_selected(high, selectable)


@pytest.mark.parametrize(
    ("ratio", "selectable", "count"), [(0.4, 1, 1), (0.4, 2, 1), (0.4, 10, 4), (0.25, 2, 1), (0.5, 3, 2)]
)
def test_counts_by_hand(ratio, selectable, count):
    assert count_selected(ratio, selectable) == count


@quick
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=60), st.data())
def test_the_highest_scores_are_taken_and_the_first_of_equal_ones(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count])
    found = select_top(torch.tensor(scores), count)
    assert found.dtype == torch.int64 and found.tolist() == expected


# by magnitude


@pytest.mark.parametrize("kind", ["nf4", "fp4-nested", "int8", "dense", "dense-bfloat16", "ragged", "conv1d"])
def test_magnitude_is_the_sum_of_squares_of_the_weight(kind):
    layer = {
        "nf4": lambda: linear_4bit(8, 320),
        "fp4-nested": lambda: linear_4bit(8, 320, "fp4", 32, nested=True),
        "int8": lambda: linear_8bit(8, 320),
        "dense": lambda: linear_dense(8, 320),
        "dense-bfloat16": lambda: linear_dense(8, 320, dtype=torch.bfloat16),
        "ragged": lambda: linear_dense(8, 300),
        "conv1d": lambda: conv1d(8, 300),
    }[kind]()
    if kind == "int8":
        weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    elif hasattr(layer.weight, "quant_state"):
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        weight = layer.weight.detach().T if kind == "conv1d" else layer.weight.detach()
    squares = weight.double().square()
    size = {"fp4-nested": 32}.get(kind, 64)
    expected = squares.sum(1) if kind == "int8" else torch.stack([part.sum() for part in squares.split(size, 1)])
    model = adapt(layer, ratio=0.5)
    scaled_weight = the_layer(model).scaled_weight
    found = LayerSaliency.of(scaled_weight, weight_scores("0", scaled_weight, "magnitude")).group_scores()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    count = count_selected(0.5, len(expected))
    top = sorted(expected.argsort(descending=True)[:count].tolist())
    assert the_layer(model).sgrq_delta["default"].units.tolist() == top
    assert decode_mask(model.peft_config["default"].selection["0"], len(expected)).tolist() == top


@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("ratio", [0.01, 0.4, 1.0])
def test_every_layer_trains_its_share_and_at_least_one(base, llama_dir, ratio):
    model = adapted(base, llama_dir, ratio=ratio)
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 14
    for layer in layers:
        rows, groups = layer.scaled_weight.scales_shape
        count = count_selected(ratio, rows if base.quant == "int8" else groups)
        expected = (count, 1) if base.quant == "int8" else (rows, count)
        assert tuple(layer.sgrq_delta["default"].weight.shape) == expected


def test_the_selection_does_not_depend_on_adapters_that_are_there(llama_dir):
    # Otherwise the same config selects other groups when it is added to a model with an adapter merged.
    selections = []
    for merged in (False, True):
        model = adapted(DENSE, llama_dir, group_size=16)
        for name, parameter in model.named_parameters():
            if "sgrq_delta" in name:
                parameter.data *= 5
        if merged:
            model.merge_adapter()
        model.add_adapter("b", SGRQConfig(group_size=16, ratio=0.5))
        selections.append(model.peft_config["b"].selection)
    assert selections[0] == selections[1]
