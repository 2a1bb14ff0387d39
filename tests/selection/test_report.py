"""What a report of a selection is made of: sizes of files, shares of saliency, and names and places of layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bases import DENSE, INT8, NF4, adapted

from peft_sgrq.formats.selectable_unit import SelectableUnit
from peft_sgrq.selection.layer_saliency import LayerSaliency
from peft_sgrq.selection.report.plot import cumulative_share
from peft_sgrq.selection.report.report import adapter_bytes, in_model_order, share_held, shorten


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", [NF4, INT8, DENSE], ids=lambda base: base.name)
@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_the_foretold_size_is_that_of_the_file(base, dtype, ratio, llama_dir, tmp_path):
    model = adapted(base, llama_dir, ratio=ratio, group_size=16, adapter_dtype=dtype)
    model.save_pretrained(tmp_path)
    shapes = {
        name.removeprefix("base_model.model."): (
            tuple(layer.sgrq_delta["default"].weight.shape),
            layer.scaled_weight.selectable,
        )
        for name, layer in model.named_modules()
        if hasattr(layer, "sgrq_delta")
    }
    assert adapter_bytes(shapes, dtype) == (tmp_path / "adapter_model.safetensors").stat().st_size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=64))
def test_the_cumulative_share_is_that_of_the_most_salient_columns(values):
    shares = cumulative_share(torch.tensor(values, dtype=torch.float64))
    assert shares[0] == 0 and float(shares[-1]) == pytest.approx(1) and (shares.diff() >= -1e-12).all()
    total, last = sum(values), len(shares) - 1
    for index in range(last + 1):
        count = round(index / last * len(values))
        expected = sum(sorted(values, reverse=True)[:count]) / total if total else count / len(values)
        assert float(shares[index]) == pytest.approx(expected, abs=1e-9)


def test_the_cumulative_share_of_columns_that_are_all_alike_is_their_number():
    shares = cumulative_share(torch.zeros(3, dtype=torch.float64))
    assert shares.dtype is torch.float64 and set(shares.tolist()) == {0, 1 / 3, 2 / 3, 1}


def test_the_share_held_is_by_group():
    layer = LayerSaliency(torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0]), (2, 6), SelectableUnit.GROUP, 2, "")
    assert [share_held(layer, count) for count in (1, 2, 3)] == pytest.approx([0.7, 1.0, 1.0])
    assert share_held(layer, 0, torch.tensor([0])) == pytest.approx(0.3)
    assert share_held(LayerSaliency(torch.zeros(6), (2, 6), SelectableUnit.GROUP, 2, ""), 1) == 1.0


def test_kinds_are_shortened_as_far_as_they_stay_different():
    assert shorten(["self_attn.q_proj", "mlp.down_proj"]) == ["q_proj", "down_proj"]
    assert shorten(["attn.c_proj", "mlp.c_proj", "mlp.c_fc"]) == ["attn.c_proj", "mlp.c_proj", "mlp.c_fc"]
    assert shorten(["lm_head"]) == ["lm_head"] and shorten([]) == []


def test_layers_of_other_architectures_stand_by_block_and_attention_first():
    names = ["lm_head", "h.10.mlp.c_proj", "h.2.mlp.c_proj", "h.2.mlp.c_fc", "h.2.attn.c_proj", "h.2.attn.c_attn"]
    assert in_model_order(sorted(names)) == [
        "h.2.attn.c_attn", "h.2.attn.c_proj", "h.2.mlp.c_fc", "h.2.mlp.c_proj", "h.10.mlp.c_proj", "lm_head",
    ]  # fmt: skip
