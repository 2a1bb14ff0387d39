"""Averages, casts and copies of models leave deltas on their groups: no integer of an adapter is averaged."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from support.single_layers import adapt, linear_4bit, linear_8bit, the_layer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from peft_sgrq import SGRQConfig
from peft_sgrq.layer.delta import Delta
from peft_sgrq.layer.masks import mask_of, pack_mask, read_mask

GROUPS = 16


def adapted(seed: int = 0) -> PeftModel:
    torch.manual_seed(seed)
    config = SGRQConfig(ratio=0.5, target_modules=["0"], init_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(64 * GROUPS, 8)), config)


def delta(model: nn.Module) -> Delta:
    return next(module for module in model.modules() if isinstance(module, Delta))


def by_averaged_model(average: Any) -> Callable[[PeftModel], nn.Module]:
    def run(model: PeftModel) -> nn.Module:
        averaged = AveragedModel(model, use_buffers=True, **average)
        for _ in range(50):  # the model does not change: its average is itself
            averaged.update_parameters(model)
        return averaged.module

    return run


def by_state_dict(update: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[PeftModel], nn.Module]:
    def run(model: PeftModel) -> nn.Module:
        average = copy.deepcopy(model.state_dict())
        for _ in range(50):
            for key, value in model.state_dict().items():
                average[key] = update(average[key], value)
        averaged = copy.deepcopy(model)
        averaged.load_state_dict(average)
        return averaged

    return run


def by_tensors_of_a_copy(model: PeftModel) -> nn.Module:
    averaged = copy.deepcopy(model)
    for _ in range(50):
        for mean, value in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
            mean.copy_(0.9 * mean + 0.1 * value)
    return averaged


def by_pickling(model: PeftModel) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_way_of(cast: Callable[[nn.Module], nn.Module]) -> Callable[[PeftModel], nn.Module]:
    return lambda model: cast(copy.deepcopy(model)).float()


WAYS = {
    "ema": by_averaged_model({"multi_avg_fn": get_ema_multi_avg_fn(0.9)}),
    "ema tensor by tensor": by_averaged_model({"avg_fn": get_ema_avg_fn(0.9)}),
    "swa": by_averaged_model({"multi_avg_fn": get_swa_multi_avg_fn()}),
    "plain mean": by_averaged_model({}),
    "state dicts": by_state_dict(lambda mean, value: 0.9 * mean + 0.1 * value),
    "state dicts in place": by_state_dict(lambda mean, value: mean.mul_(0.9).add_(value, alpha=0.1)),
    "state dicts in bfloat16": by_state_dict(lambda mean, value: (0.9 * mean + 0.1 * value).bfloat16().float()),
    "tensors of a copy": by_tensors_of_a_copy,
    "copy": copy.deepcopy,
    "pickle": by_pickling,
    "half": by_way_of(lambda model: model.half()),
    "to(bfloat16)": by_way_of(lambda model: model.to(torch.bfloat16)),
    "type": by_way_of(lambda model: model.type(torch.float16)),
    "double": by_way_of(lambda model: model.double()),
}


@pytest.mark.parametrize("way", WAYS)
def test_averages_casts_and_copies_keep_the_groups(way):
    model = adapted()
    averaged = WAYS[way](model)
    before, after = delta(model), delta(averaged)
    assert torch.equal(after.units, before.units) and torch.equal(after.selection, before.selection)
    torch.testing.assert_close(after.weight, before.weight, rtol=2e-2 if "bfloat16" in way else 1e-4, atol=0)
    assert type(after.weight) is type(before.weight) and after.weight.dtype == torch.float32
    assert averaged(torch.randn(2, 64 * GROUPS)).isfinite().all()  # and nothing is refused


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit])
def test_codes_that_an_average_has_cut_off_are_refused(make):
    model, x = adapt(make(8, 128)).eval(), torch.randn(3, 128)
    expected = model(x)
    mean = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
    mean.update_parameters(model)  # takes over
    assert torch.equal(mean.module(x), expected)
    mean.update_parameters(model)
    with pytest.raises(RuntimeError, match=r"codes .* are others than when its adapter was added"):
        mean.module(x)
    trained = [parameter for parameter in copy.deepcopy(model).parameters() if parameter.requires_grad]
    for average, parameter in zip(trained, filter(lambda each: each.requires_grad, model.parameters()), strict=True):
        average.data.lerp_(parameter.data, 0.5)
    assert torch.equal(model(x), expected)
    base = the_layer(model).base_layer
    with torch.no_grad():
        base.weight.copy_(base.weight.clone())  # as DistributedDataParallel does it
    assert torch.equal(model(x), expected)


def test_no_parameter_buffer_or_entry_of_a_state_dict_is_an_integer():
    model = adapted()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **model.state_dict()}
    assert [name for name in tensors if "sgrq_delta" in name and "selection" in name]
    assert all(value.is_floating_point() for value in tensors.values())
    assert {value.dtype for value in get_peft_model_state_dict(model).values()} == {torch.float32, torch.uint8}


def test_an_average_of_models_with_different_selections_is_refused():
    first, second = adapted(0), adapted(1)
    mean = {key: (value + second.state_dict()[key]) / 2 for key, value in first.state_dict().items()}
    with pytest.raises(RuntimeError, match="selection selects other than 8 of 16 groups"):
        first.load_state_dict(mean)


def test_a_state_dict_brings_its_selection():
    first, second = adapted(0), adapted(1)
    assert not torch.equal(delta(first).units, delta(second).units)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 64 * GROUPS)
    assert torch.equal(delta(first).units, delta(second).units) and torch.equal(first(x), second(x))
    packed = dict(first.state_dict())
    name = next(key for key in packed if key.endswith("selection"))
    packed[name] = delta(first).selection  # as state dicts had it before
    second = adapted(1)
    second.load_state_dict(packed)
    assert torch.equal(first(x), second(x))
    del packed[name]
    with pytest.raises(RuntimeError, match=r"Missing key.*selection"):
        second.load_state_dict(packed)


@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))), st.floats(0, 0.2))
def test_a_mask_is_read_as_it_was_written_packed_or_not_cast_or_blurred(mask, blur):
    selectable, chosen = mask
    groups = torch.tensor(sorted(chosen), dtype=torch.int64)
    for written in (mask_of(groups, selectable), pack_mask(groups, selectable)):
        for dtype in (torch.float32, torch.bfloat16, written.dtype):
            assert torch.equal(read_mask(written.to(dtype), selectable), groups)
        assert torch.equal(read_mask(written.float() + blur, selectable), groups)


@pytest.mark.parametrize(
    "mask", [[0.5, 1.0, 1.0], [1.0, 2.0, 0.0], [1.0, -1.0, 0.0], [1.0, 1.0], [16], [float("nan")]]
)
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(ValueError, match="expected"):
        read_mask(torch.tensor(mask), 3)
