"""Groups that are split: the same bits on single layers of every format, and what is refused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.bases import NF4, adapted, logits
from support.packed_layers import packed_layer
from support.single_layers import linear_4bit, linear_8bit
from support.split_layers import CASES, COLUMNS, PACKED, ROWS, SCHEMES, Case, hqq_layer
from torch import nn

from peft_sgrq import SGRQConfig, split_groups
from peft_sgrq.formats.registry import resolve_weight
from peft_sgrq.formats.scaled_weight import ScaledWeight

each = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


def scaled_weight_of(layer: nn.Module) -> ScaledWeight:
    return resolve_weight(layer, 64)


def columns_of(layer: Any) -> int:
    return scaled_weight_of(layer).in_features


def stored_codes(case: Case, layer: nn.Module) -> torch.Tensor:
    return getattr(layer, case.codes).detach().view(torch.uint8)


def inputs(layer: nn.Module) -> torch.Tensor:
    return torch.randn(5, columns_of(layer), generator=torch.Generator().manual_seed(1))


@each(CASES)
def test_a_split_layer_gives_the_same_bits(case):
    # HQQ's input has the dtype of its scales. A layer each: GPTQModel rounds AWQ's scales to the dtype of its input.
    for dtype in [torch.float32] if case.library == "hqq" else [torch.float32, torch.bfloat16]:
        layer = case.layer()
        x = inputs(layer).to(dtype)
        before = passes(layer, x)
        model = nn.Sequential(layer)
        assert split_groups(model, case.size) is model
        assert all(torch.equal(*pair) for pair in zip(before, passes(layer, x), strict=True))


@torch.no_grad()
def passes(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return [layer.eval()(x), layer.train()(x), layer.eval()(x), layer(x[:1])]


@each(CASES)
def test_a_split_layer_has_more_scales_and_the_codes_it_had(case):
    layer = case.layer()
    whole = scaled_weight_of(layer)
    codes, scales, groups = stored_codes(case, layer).clone(), whole.scales().clone(), whole.scales_shape[1]
    levels = whole.codes(None, torch.float32)
    split_groups(nn.Sequential(layer), case.size)
    split = scaled_weight_of(layer)
    assert split.group_size == case.size
    assert split.scales_shape == (split.out_features, -(-split.in_features // case.size))
    assert split.scales().shape == split.scales_shape and split.scales_shape[1] > groups
    assert set(split.scales().unique().tolist()) == set(scales.unique().tolist())
    if case.library == "hqq":  # which packs them anew, as it keeps the parts of a matrix side by side in a byte
        assert torch.equal(split.codes(None, torch.float32), levels)
    else:
        assert torch.equal(stored_codes(case, layer), codes)


# A split layer is one of smaller groups, which is trained and copied like any other: one of each way to be split.
@each(SCHEMES)
def test_a_split_layer_is_trained_and_merged_exactly_and_its_codes_stay(case):
    layer = case.layer()
    split_groups(nn.Sequential(layer), case.size)
    codes, x = stored_codes(case, layer).clone(), inputs(layer)
    base = layer(x)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(layer), SGRQConfig(target_modules=["0"], ratio=0.5, init_weights=False))
    unmerged = model.eval()(x)
    assert not torch.equal(unmerged, base)
    plain = model.merge_and_unload()
    assert torch.equal(plain(x), unmerged)
    assert torch.equal(stored_codes(case, plain[0]), codes)
    assert scaled_weight_of(plain[0]).group_size == case.size


@each(SCHEMES)
def test_splitting_a_copy_leaves_the_original_alone(case):
    layer = case.layer()
    x, fingerprint = inputs(layer), scaled_weight_of(layer).fingerprint()
    before = layer(x)
    copied = copy.deepcopy(layer)
    split_groups(nn.Sequential(copied), case.size)
    assert torch.equal(layer(x), before) and scaled_weight_of(layer).fingerprint() == fingerprint
    assert torch.equal(copied(x), before) and scaled_weight_of(copied).fingerprint() != fingerprint


def test_a_split_copy_does_not_compute_with_the_original():
    layer = packed_layer("gptq", group_size=64).layer
    bound = layer.dequantize_weight
    layer.dequantize_weight = functools.wraps(bound)(lambda **options: bound(**options))  # as GPTQModel compiles it
    x = inputs(layer)
    before = layer(x)
    copied = copy.deepcopy(layer)
    split_groups(nn.Sequential(copied), 16)
    layer.scales.zero_()
    assert torch.equal(copied(x), before) and not torch.equal(layer(x), before)


def test_both_places_of_a_bitsandbytes_state_are_split():
    copied = copy.deepcopy(linear_4bit(64, 128))
    assert copied.quant_state is not copied.weight.quant_state  # bitsandbytes copies it twice
    split_groups(nn.Sequential(copied), 32)
    assert copied.quant_state is copied.weight.quant_state and copied.quant_state.blocksize == 32


@each([case for case in PACKED if "act-order" in case.name])
def test_columns_of_a_group_in_activation_order_are_dealt_to_its_parts_as_they_occur(case):
    layer = case.layer()
    before = layer.g_idx.tolist()
    split_groups(nn.Sequential(layer), case.size)
    after = layer.g_idx.tolist()
    part = 0
    for group in range(max(before) + 1):
        columns = [column for column, index in enumerate(before) if index == group]
        for start in range(0, len(columns), case.size):
            assert [column for column, index in enumerate(after) if index == part] == columns[
                start : start + case.size
            ]
            part += 1
    assert part == len(layer.scales) == len(layer.qzeros)


def test_splitting_twice_is_splitting_once():
    twice, once = (packed_layer("gptq", group_size=64, act_order=True).layer for _ in range(2))
    once.load_state_dict(twice.state_dict())
    for size in (32, 16):
        split_groups(nn.Sequential(twice), size)
    split_groups(nn.Sequential(once), 16)
    state = once.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in twice.state_dict().items())


def test_layers_that_have_the_size_and_dense_ones_are_left():
    model = nn.Sequential(linear_4bit(64, 128, block=32), nn.Linear(64, 128), linear_4bit(64, 128, block=64))
    absmax = model[0].weight.quant_state.absmax
    split_groups(model, 32)
    assert model[0].weight.quant_state.absmax is absmax
    assert model[2].weight.quant_state.blocksize == model[2].weight.blocksize == 32


# refusals


def check_refused(model: nn.Module, size: Any, *words: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error) as refusal:
        split_groups(model, size)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-1, ValueError), ("32", TypeError), (True, TypeError)])
def test_a_group_size_that_is_none_is_refused(size, error):
    check_refused(nn.Sequential(linear_4bit(64, 64)), size, f"group_size is {size!r}", "such as 32", error=error)


def test_a_model_without_quantized_layers_is_refused():
    check_refused(nn.Sequential(nn.Linear(64, 64)), 32, "no quantized layer", "bitsandbytes nf4 and fp4")


def test_a_model_with_an_adapter_is_refused(llama_dir):
    model = adapted(NF4, llama_dir)
    check_refused(model, 32, "has an adapter", "split its groups before `get_peft_model`")
    check_refused(model.base_model.model, 32, "has an adapter")


def test_a_size_that_does_not_divide_is_refused_before_any_layer_is_changed():
    model = nn.Sequential(linear_4bit(64, 128, block=128), linear_4bit(64, 128, block=64))
    check_refused(model, 128, "Layer '1' cannot be split: its group size is 64, expected a multiple of 128", "divisor")
    check_refused(model, 48, "Layer '0'", "its group size is 128, expected a multiple of 48")
    assert [layer.weight.quant_state.blocksize for layer in model] == [128, 64]


def test_blocks_below_32_of_bitsandbytes_are_refused():
    check_refused(nn.Sequential(linear_4bit(64, 128)), 16, "computes with no blocks of 16, expected 32", "pass 32")


def test_group_sizes_that_gptqmodel_does_not_load_are_refused():
    layer = packed_layer("gptq", group_size=64).layer
    check_refused(nn.Sequential(layer), 8, "GPTQModel loads no groups of 8, expected one of 16, 32, 64")
    assert scaled_weight_of(layer).group_size == 64


def test_an_index_that_leaves_several_groups_incomplete_is_refused():
    layer = packed_layer("gptq", columns=96, group_size=64).layer
    layer.g_idx.copy_((torch.arange(96) >= 40).int())
    check_refused(nn.Sequential(layer), 32, "its g_idx leaves several groups incomplete", "4 groups of 32, expected 3")


def test_formats_that_cannot_be_split_are_refused_by_name():
    model = nn.Sequential(linear_4bit(64, 128), linear_8bit(64, 128))
    check_refused(model, 32, "Layer '1' cannot be split: its format is bnb-int8", "GPTQ, AWQ, AutoRound", "was not")
    assert model[0].weight.quant_state.blocksize == 64


def test_hqq_along_columns_is_refused():
    pytest.importorskip("hqq")
    check_refused(nn.Sequential(hqq_layer(4, axis=0)), 16, "its format is hqq-4bit-axis0-64", "HQQ with axis=1")


def test_a_layer_that_cannot_be_read_is_refused_with_the_reason():
    check_refused(nn.Sequential(linear_4bit(ROWS, COLUMNS + 32)), 32, "Layer '0' cannot be split", "straddle rows")


class _Config:
    def __init__(self, **fields: Any) -> None:
        self.quantization_config = fields


@pytest.mark.parametrize("field", ["dynamic", "extra_config"])
def test_group_sizes_of_single_layers_in_the_config_are_refused(field):
    model: Any = nn.Sequential(packed_layer("gptq").layer)
    model.config = _Config(group_size=32, **{field: {"model.layers.0": {"bits": 4, "group_size": 32}}})
    check_refused(model, 16, f"of their own in `{field}`", "expected one group size for all layers")
    assert model[0].group_size == 32
    model.config = _Config(group_size=32, **{field: {"lm_head": {"bits": 16}}})
    split_groups(model, 16)
    assert model.config.quantization_config["group_size"] == model[0].group_size == 16


def test_an_adapter_of_the_split_base_is_refused_on_the_base_before_and_told_what_to_do(llama_dir, ids, tmp_path):
    from peft import PeftModel

    split = split_groups(NF4.load(llama_dir), 32)
    torch.manual_seed(0)
    model = get_peft_model(split, SGRQConfig(init_weights=False, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is quantized with bitsandbytes \(nf4-64\)") as error:
        PeftModel.from_pretrained(NF4.load(llama_dir), tmp_path)
    assert "`peft_sgrq.split_groups(model, 32)`" in str(error.value)
    again = PeftModel.from_pretrained(split_groups(NF4.load(llama_dir), 32), tmp_path).eval()
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_splitting_is_not_proposed_where_it_does_not_lead_to_the_base(llama_dir, tmp_path):
    from peft import PeftModel

    adapted(NF4, llama_dir).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit this base") as error:
        PeftModel.from_pretrained(split_groups(NF4.load(llama_dir), 32), tmp_path)
    assert "split_groups" not in str(error.value)
